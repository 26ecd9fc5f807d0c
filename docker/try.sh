#!/usr/bin/env bash
# Build the image of a job without Docker, and run a job in it as a cluster does: user 10001, no capabilities, no
# network, and a root file system that can't be written. Needs root, buildah, debootstrap and 10 GB.
#
#   docker/try.sh [FOLDER]     # works there; /var/tmp/gpuml-try by default
#   buildah rmi -a             # removes the images that it leaves for the next time
#
# REGISTRY=FILE is the registry of train.Dockerfile. SHOW="/a /b" are folders that the build sees, read-only, where
# the registry is one. DEBIAN=ADDRESS is a mirror. UV_TORCH_BACKEND=cpu leaves CUDA out.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(realpath -m "${1:-/var/tmp/gpuml-try}") build=(buildah build --isolation chroot --layers -q --build-arg EXTRA=offline)
mkdir -p "$place"
say() { printf '%s  %s\n' "$(date +%T)" "$*"; }

if ! buildah inspect --type image localhost/gpuml-base >/dev/null 2>&1; then
    say "a base: Debian with Python"
    include=python3,python3-venv,ca-certificates
    [ -d "$place/base/usr/bin" ] || debootstrap --variant=minbase --include=$include bookworm "$place/base" ${DEBIAN:-} >"$place/debootstrap.log"
    container=$(buildah from scratch)
    buildah add -q "$container" "$place/base" / >/dev/null
    buildah commit -q --rm "$container" gpuml-base >/dev/null
    rm -rf "$place/base"
fi

say "the image"
[ -z "${REGISTRY:-}" ] || build+=(--secret "id=registry,src=$REGISTRY")
[ -z "${UV_TORCH_BACKEND:-}" ] || build+=(--build-arg "UV_TORCH_BACKEND=$UV_TORCH_BACKEND")
for folder in ${SHOW:-}; do build+=(--volume "$folder:$folder:ro"); done
"${build[@]}" --build-arg BASE=localhost/gpuml-base --build-arg "COMMIT=$(git rev-parse HEAD)" \
    -f docker/train.Dockerfile -t gpuml-train . >/dev/null
buildah images --format '{{.Name}}  {{.Size}}' | grep localhost/gpuml
echo "user and commit: $(buildah inspect --type image --format '{{.OCIv1.Config.User}} {{index .OCIv1.Config.Labels "org.opencontainers.image.revision"}}' gpuml-train)"

say "a job in it"
container=$(buildah from gpuml-train)
root=$(buildah mount "$container")
trap 'umount "$place/root" 2>/dev/null || true; buildah rm "$container" >/dev/null; rm -rf "$place/work" "$place/tmp"; rmdir "$place/root"' EXIT
mkdir -p "$place"/{work,tmp,root}
cp docker/try.py "$place/tmp/"
chown -R 10001:10001 "$place/work" "$place/tmp"
mount --bind -o ro "$root" "$place/root" && mount -o remount,bind,ro "$place/root"
inside() {  # as process 1 of a container
    unshare --mount --pid --net --ipc --uts --fork --propagation private bash -euc '
        root=$1 place=$2; shift 2
        mount -t proc proc "$root/proc"; mount -t tmpfs -o mode=755 dev "$root/dev"; mkdir "$root/dev/shm"
        for device in null zero random urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
        ln -s /proc/self/fd "$root/dev/fd"
        mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
        mount --bind "$place/work" "$root/work"; mount --bind "$place/tmp" "$root/tmp"
        cd "$root/work"
        exec env -i PATH=/opt/gpuml/bin:/usr/local/bin:/usr/bin:/bin HOME=/work TMPDIR=/tmp PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 \
            "$(command -v chroot)" "$root" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
            sh -c "cd /work && exec \"\$@\"" sh "$@"
    ' bash "$place/root" "$place" "$@"
}
inside python3 /tmp/try.py >/dev/null
inside gpuml run /work/bundle.tar.gz --run try-1
inside sh -c 'id -u; ls outputs/try-1 outputs/try-1/model; ! touch /opt/gpuml/x 2>/dev/null && echo "the root can not be written"'
test -s "$place/work/outputs/try-1/certificate.json"
say "done and certified"
