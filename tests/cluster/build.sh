#!/usr/bin/env bash
# Puts into the cache what the cluster tests start: etcd and three servers of Kubernetes, from Debian bookworm's
# packages. Only what is missing is made; the servers are compiled once, in about 14 minutes of one core.
set -euo pipefail
version=1.20.2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gpuml-tests/kubernetes-$version
servers="kube-apiserver kube-scheduler kube-controller-manager"
unset MAKEFLAGS MFLAGS MAKELEVEL    # of the make that called this

say() { echo "cluster tests: $*" >&2; }
give_up() { say "$*; or name other servers with GPUML_TEST_KUBERNETES=FOLDER"; exit 1; }
has() { command -v "$1" >/dev/null; }
missing_servers() {
    [ -n "${GPUML_TEST_KUBERNETES:-}" ] && return
    for server in $servers; do [ -x "$cache/$server" ] || echo "$server"; done
}
missing_etcd() { PATH=${GPUML_TEST_KUBERNETES:-}:$PATH:$cache has etcd && return 1 || return 0; }

fetch() {    # apt-get with lists of its own, so that a package's source can be had, and nothing is changed for apt
    apt-get -qq -o Dir::State::lists="$work/lists" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
        -o APT::Sandbox::User="" "$@"
}

prepare_apt() {
    { has apt-get && grep -q 'VERSION_CODENAME=bookworm' /etc/os-release; } || give_up "they are made on Debian bookworm only"
    mkdir -p "$work/lists/partial" "$work/sources"
    [ ! -e /etc/apt/sources.list ] || sed -n 's/^deb \(.*\)/deb \1\ndeb-src \1/p' /etc/apt/sources.list > "$work/sources/debian.list"
    [ ! -e /etc/apt/sources.list.d/debian.sources ] \
        || sed 's/^Types: deb$/Types: deb deb-src/' /etc/apt/sources.list.d/debian.sources > "$work/sources/debian.sources"
    fetch update
}

fetch_etcd() {    # the package's program alone: installing the package would also start a server
    say "fetching etcd"
    (cd "$work" && fetch download etcd-server && dpkg-deb -x etcd-server_*.deb etcd)
    mv "$work/etcd/usr/bin/etcd" "$cache/etcd"
}

install_go() {
    has go && has rsync && return
    [ "$(id -u)" = 0 ] || give_up "compiling needs Go 1.19 and rsync: install golang-go and rsync"
    say "installing Go and rsync"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq golang-go rsync >/dev/null
}

build_servers() {
    say "fetching the source of Kubernetes $version"
    (cd "$work" && fetch source --download-only kubernetes)
    local source=$work/go/src/k8s.io/kubernetes
    mkdir -p "$source"
    tar xzf "$work"/kubernetes_*.orig.tar.gz -C "$source" --strip-components 1
    printf '%s\n' "KUBE_GIT_COMMIT='debian'" "KUBE_GIT_TREE_STATE='clean'" "KUBE_GIT_VERSION='v$version'" \
        "KUBE_GIT_MAJOR='${version%%.*}'" "KUBE_GIT_MINOR='$(cut -d. -f2 <<< $version)'" > "$work/version"
    say "compiling $(echo $1): about 14 minutes of one core, 7 with two"
    (cd "$source" && GOPATH=$work/go GO111MODULE=off GOCACHE=$work/objects KUBE_GIT_VERSION_FILE=$work/version \
        make WHAT="$(printf 'cmd/%s ' $1)" GOFLAGS=-buildvcs=false) >&2
    for server in $1; do mv "$source/_output/local/bin/linux/"*"/$server" "$cache/$server"; done
}

mkdir -p "$cache"
exec 9> "$cache/.lock"
flock 9
wanted=$(missing_servers)
if [ -n "$wanted" ] || missing_etcd; then
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
    prepare_apt
    if missing_etcd; then fetch_etcd; fi
    if [ -n "$wanted" ]; then install_go; build_servers "$wanted"; fi
    say "ready in $cache"
fi
