#!/bin/sh
# The Dockerfile's two images, built where there is neither Docker nor a registry, for tests:
#
#     tests/cluster/images.sh FOLDER [TAG]     # FOLDER/operator.tar, FOLDER/trainer.tar
#
# It needs Debian, root, buildah and debootstrap. What it builds upon is not Docker Hub's
# python:3.11-slim, but Debian's own Python 3.11 under the same name. pip's settings in the
# environment hold inside, too.
set -eu
folder=$1 tag=${2:-0.1.0}
cd "$(dirname "$0")/../.."
mkdir -p "$folder"
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot  # in a container, too

base=localhost/python:3.11-slim
if ! buildah inspect --type image $base >/dev/null 2>&1; then
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root"
    ln -s python3 "$root/usr/bin/python"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" /
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        "$container"
    buildah commit --quiet --rm "$container" $base
    rm -rf "$root"
fi

set -- --from $base --pull-never --network host
for place in PIP_FIND_LINKS PIP_CERT; do
    value=$(printenv $place || true)
    [ -z "$value" ] || set -- "$@" --env "$place=$value" --volume "$value:$value:ro"
done
for target in operator trainer; do
    name=demoreset-$target:$tag
    buildah bud --layers "$@" --target $target --tag "localhost/$name" .
    rm -f "$folder/$target.tar"
    buildah push --quiet "localhost/$name" "docker-archive:$folder/$target.tar:$name"
done
