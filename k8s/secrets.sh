#!/bin/sh
# Makes an overlay's secrets: k8s/secrets.sh single-node
# Each *.env.example becomes a *.env, with a new random value for every RANDOM; what is there already stays.
set -eu
cd "$(dirname "$0")/overlays/${1:?name an overlay: single-node or team}/secrets"
umask 077
for example in *.env.example; do
    file=${example%.example}
    if [ ! -e "$file" ]; then
        while IFS= read -r line; do
            case $line in
                *=RANDOM) echo "${line%RANDOM}$(od -An -N20 -tx1 /dev/urandom | tr -d ' \n')" ;;
                *) echo "$line" ;;
            esac
        done < "$example" > "$file"
    fi
done
if grep -n FILL-IN ./*.env; then
    echo "these are yours to fill in, in $PWD" >&2
    exit 1
fi
