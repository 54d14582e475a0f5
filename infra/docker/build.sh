#!/usr/bin/env bash
# build.sh TARGET TAG [options of docker build]: build the image from the bases in images.lock. TARGET: launcher or apex.
# LOCKED=1 refuses bases without a digest: set it for builds that others should be able to repeat.
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 2 ] && [[ $1 =~ ^(launcher|apex)$ ]] || {
    echo "usage: build.sh launcher|apex TAG [options of docker build]" >&2
    exit 64
}
target=$1 tag=$2 arguments=()
shift 2
while read -r argument image digest; do
    [ "$argument" != "#" ] && [ -n "$argument" ] || continue
    if [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]]; then
        arguments+=(--build-arg "$argument=$image@$digest")
    elif [ "$digest" = not-pulled ] && [ -z "${LOCKED:-}" ]; then
        echo "build.sh: $image has no digest in images.lock (not pulled yet): this build takes what the name means today; infra/docker/lock.sh records it." >&2
        arguments+=(--build-arg "$argument=$image")
    else
        echo "build.sh: $image: '$digest' in images.lock is no digest; run infra/docker/lock.sh where docker can reach the registry." >&2
        exit 78
    fi
done < "$folder/images.lock"
exec docker build -f "$folder/Dockerfile" --target "$target" -t "$tag" "${arguments[@]}" "$@" "$folder/../.."
