#!/usr/bin/env bash
# lock.sh: look up the present digests of the images in images.lock and write them there. Needs docker with buildx; commit what changed.
# An image whose registry does not answer keeps its line, and the script ends with 1.
set -euo pipefail
lock=$(dirname "${BASH_SOURCE[0]}")/images.lock
command -v docker > /dev/null || {
    echo "lock.sh: docker is not installed here; a digest comes from a registry alone, so images.lock stays as it is." >&2
    exit 78
}
failed=0 lines=()
while read -r argument image digest; do
    if [ "$argument" = "#" ] || [ -z "$argument" ]; then
        lines+=("$argument${image:+ $image}${digest:+ $digest}")
        continue
    fi
    if found=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image") && [[ $found =~ ^sha256:[0-9a-f]{64}$ ]]; then
        digest=$found
    else
        echo "lock.sh: no digest for $image; its line stays as it is ($digest)." >&2
        failed=1
    fi
    lines+=("$argument $image $digest")
done < "$lock"
printf '%s\n' "${lines[@]}" > "$lock.new" && mv "$lock.new" "$lock"
exit $failed
