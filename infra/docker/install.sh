#!/usr/bin/env bash
# install.sh VENV FOLDER: make an environment from the requirements.txt and constraints.txt in FOLDER, without the packages in its unneeded.txt. Needs Python
# 3.11 or 3.12 with venv.
# TORCH_INDEX: the package index for torch, if it is not the default one. pip's own variables (PIP_CONFIG_FILE ...) work as usual.
# CLOUDS: libraries of storages other than S3 ("gcsfs google-auth-oauthlib" for gs://, "adlfs" for az://); what of unneeded.txt they need comes back with them.
set -euo pipefail
venv=$1 folder=$2
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "install.sh: $(python3 --version) is not supported; 3.11 and 3.12 are." >&2
    exit 78
}
python3 -m venv "$venv"
pip=("$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --no-input -c "$folder/constraints.txt")
[ -z "${TORCH_INDEX:-}" ] || PIP_INDEX_URL=$TORCH_INDEX "${pip[@]}" torch torchvision
"${pip[@]}" -r "$folder/requirements.txt"
"$venv/bin/python" -m pip check
# Only after "pip check", which would report them as missing.
sed 's/#.*//' "$folder/unneeded.txt" | xargs "$venv/bin/python" -m pip uninstall -q -y
read -ra clouds <<< "${CLOUDS:-}"
[ ${#clouds[@]} -eq 0 ] || "${pip[@]}" "${clouds[@]}"
# Compile byte code now: at run time the file system may be read-only.
"$venv/bin/python" -m compileall -q "$venv/lib" > /dev/null || true
