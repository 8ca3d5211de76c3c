#!/usr/bin/env bash
# Builds the Dockerfile's `cpu` stage where no container engine and no image registry is reached: by
# Debian's buildah (chroot isolation), on a base made by debootstrap with bookworm's own Python 3.11.
# As root, after `apt-get install buildah debootstrap`:
#
#   scripts/build_image.sh [DIRECTORY] [arguments of `buildah bud`]
#
# DIRECTORY (default /var/tmp/budgeted-lora-image) takes the storage, several gigabytes. Arguments
# such as `-v /path/pip.conf:/etc/pip.conf:ro` lend the build this machine's pip settings; of a volume
# the image keeps an empty file or directory where it was, not what it held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(realpath -m "${1:-/var/tmp/budgeted-lora-image}")
shift $(($# > 0))
mkdir -p "$work/tmp"
export TMPDIR=$work/tmp
base=localhost/debian-python:bookworm
image=localhost/budgeted-lora:cpu

b() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

if ! b inspect --type image "$base" >/dev/null 2>&1; then
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
    bookworm "$work/rootfs"
  container=$(b from scratch)
  b add -q "$container" "$work/rootfs" /
  b commit -q --rm "$container" "$base"
  rm -rf "$work/rootfs"
fi

b bud --isolation chroot --network host --pull-never --target cpu \
  --build-arg CPU_BASE="$base" -t "$image" "$@" .

container=$(b from "$image")
trap 'b rm "$container" >/dev/null' EXIT
for command in "make help" "python -m distill --help" "python -m export --help" \
  "python -m deploy --help" "python -m evaluate --help"; do
  echo "+ $command"
  # shellcheck disable=SC2086
  b run --isolation chroot "$container" -- $command
done
b images "$image"
