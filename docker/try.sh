#!/usr/bin/env bash
# Build both images without Docker, and try them as a cluster runs them: user 10001, no capabilities, no network, and a
# root file system that can't be written. A job in the one, JupyterLab in the other. Needs root, buildah, debootstrap,
# iproute2 and, with CUDA, 21 GB while it builds.
#
#   docker/try.sh [FOLDER]     # works there; /var/tmp/gpuml-try by default
#   buildah rmi -a             # removes the images that it leaves for the next time
#
# REGISTRY=FILE is the registry of the Dockerfile. SHOW="/a /b" are folders that the build sees, read-only, where the
# registry is one. DEBIAN=ADDRESS is a mirror. UV_TORCH_BACKEND=cpu leaves CUDA out. BASE=IMAGE is another base than
# Debian 12, whose Python is too old for JupyterLab's image; without it only the image of a job is tried.
# PUSH=HOST:PORT is a registry for images that gets them, and gives them back by their digests.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(realpath -m "${1:-/var/tmp/gpuml-try}") build=(buildah build --isolation chroot --layers -q --build-arg EXTRA=offline)
images=(train ${BASE:+dev}) base=${BASE:-localhost/gpuml-base} container=''
mkdir -p "$place"
say() { printf '%s  %s\n' "$(date +%T)" "$*"; }

if ! buildah inspect --type image "$base" >/dev/null 2>&1 && [ -z "${BASE:-}" ]; then
    say "a base: Debian with Python"
    include=python3,python3-venv,ca-certificates
    [ -d "$place/base/usr/bin" ] || debootstrap --variant=minbase --include=$include bookworm "$place/base" ${DEBIAN:-} >"$place/debootstrap.log"
    container=$(buildah from scratch)
    buildah add -q "$container" "$place/base" / >/dev/null
    buildah commit -q --rm "$container" gpuml-base >/dev/null
    rm -rf "$place/base"
fi

[ -z "${REGISTRY:-}" ] || build+=(--secret "id=registry,src=$REGISTRY")
[ -z "${UV_TORCH_BACKEND:-}" ] || build+=(--build-arg "UV_TORCH_BACKEND=$UV_TORCH_BACKEND")
for folder in ${SHOW:-}; do build+=(--volume "$folder:$folder:ro"); done
for image in "${images[@]}"; do
    say "the image $image"
    "${build[@]}" --build-arg BASE="$base" --build-arg "COMMIT=$(git rev-parse HEAD)" \
        -f docker/Dockerfile --target "$image" -t "gpuml-$image" . >/dev/null
    echo "user and commit: $(buildah inspect --type image --format '{{.OCIv1.Config.User}} {{index .OCIv1.Config.Labels "org.opencontainers.image.revision"}}' "gpuml-$image")"
done
buildah images --format '{{.Name}}  {{.Size}}' | grep localhost/gpuml

enter() {  # a container of an image; its root is not to be written
    container=$(buildah from "$1")
    root=$(buildah mount "$container")
    mkdir -p "$place"/{work,tmp,root}
    cp docker/try*.py "$place/tmp/"
    chown -R 10001:10001 "$place/work" "$place/tmp"
    mount --bind -o ro "$root" "$place/root" && mount -o remount,bind,ro "$place/root"
}
leave() {
    [ -n "$container" ] || return 0
    umount "$place/root" 2>/dev/null || true
    buildah rm "$container" >/dev/null
    container=''
    rm -rf "$place/work" "$place/tmp"
    rmdir "$place/root"
}
trap leave EXIT
inside() {  # as process 1 of a container
    unshare --mount --pid --net --ipc --uts --fork --propagation private bash -euc '
        root=$1 place=$2; shift 2
        ip link set lo up
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

say "a job"
enter gpuml-train
inside python3 /tmp/try.py >/dev/null
inside gpuml run /work/bundle.tar.gz --run try-1
inside sh -c 'id -u; ls outputs/try-1 outputs/try-1/model; ! touch /opt/gpuml/x 2>/dev/null && echo "the root can not be written"'
test -s "$place/work/outputs/try-1/certificate.json"
leave
say "done and certified"

if [ -n "${BASE:-}" ]; then
    say "JupyterLab"
    enter gpuml-dev
    inside python3 /tmp/try_lab.py
    leave
fi

for image in ${PUSH:+"${images[@]}"}; do
    say "$image to $PUSH"
    buildah push -q --tls-verify=false --digestfile "$place/digest" "gpuml-$image" "docker://$PUSH/gpuml-$image:try"
    echo "$PUSH/gpuml-$image@$(cat "$place/digest")"
    pulled=$(buildah --root "$place/pulled" --runroot "$place/pulled" pull -q --tls-verify=false "$PUSH/gpuml-$image@$(cat "$place/digest")")
    test "$pulled" = "$(buildah inspect --type image --format '{{.FromImageID}}' "gpuml-$image")"
    rm -rf "$place/pulled"
done
