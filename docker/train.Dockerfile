# The image of a job: gpuml and PyTorch with CUDA, as user 10001, on a root file system that may be read-only.
#
#   docker build -f docker/train.Dockerfile -t gpuml-train --build-arg COMMIT=$(git rev-parse HEAD) .
#
# A registry of your own, or a mirror: --secret id=registry,src=FILE, where FILE sets PIP_INDEX_URL, UV_DEFAULT_INDEX
# and the like, a NAME=value a line; nothing of it stays in the image. Without CUDA: --build-arg UV_TORCH_BACKEND=cpu.

# Debian or Ubuntu with Python 3.11 or later; torch brings CUDA, the node the driver. For the same image on any day: NAME:TAG@sha256:…
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

FROM ${BASE} AS base
# NVIDIA_VISIBLE_DEVICES stays unset: an image that says "all" gives a pod without GPUs every GPU of its node
ENV PATH=/opt/gpuml/bin:$PATH HOME=/work PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MLFLOW_DISABLE_TELEMETRY=true HF_HUB_DISABLE_TELEMETRY=1
RUN groupadd --gid 10001 gpuml \
    && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /work --create-home --shell /bin/bash gpuml

# Nothing of the next two stages is in the image
FROM base AS uv
COPY constraints.txt /tmp/
RUN --mount=type=secret,id=registry \
    set -a; if [ -f /run/secrets/registry ]; then . /run/secrets/registry; fi; set +a; \
    python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir -q -c /tmp/constraints.txt uv \
    && mv /tmp/uv/bin/uv /usr/local/bin/uv && rm -r /tmp/uv

FROM uv AS wheel
COPY pyproject.toml README.md LICENSE /src/
COPY nbs/train.ipynb /src/nbs/
COPY config /src/config
COPY data/sample-small /src/data/sample-small
COPY gpuml /src/gpuml
RUN --mount=type=secret,id=registry \
    set -a; if [ -f /run/secrets/registry ]; then . /run/secrets/registry; fi; set +a; \
    uv build -q --no-cache --wheel --out-dir /dist /src

FROM base AS train
# What gpuml needs: gigabytes that change only with these two files
COPY pyproject.toml constraints.txt /opt/gpuml/
ARG UV_TORCH_BACKEND
ARG EXTRA=""
RUN --mount=type=secret,id=registry --mount=type=bind,from=uv,source=/usr/local/bin,target=/mnt/uv \
    set -a; if [ -f /run/secrets/registry ]; then . /run/secrets/registry; fi; set +a; \
    /mnt/uv/uv venv -q --no-cache --python python3 --allow-existing /opt/gpuml \
    && VIRTUAL_ENV=/opt/gpuml /mnt/uv/uv pip install -q --no-cache --compile-bytecode -c /opt/gpuml/constraints.txt \
       -r /opt/gpuml/pyproject.toml ${EXTRA:+--extra "$EXTRA"}
# The address of a flash-attn wheel for this Python and torch; without one, torch's own kernel is used
ARG FLASH_ATTN=""
RUN --mount=type=secret,id=registry --mount=type=bind,from=uv,source=/usr/local/bin,target=/mnt/uv \
    set -a; if [ -f /run/secrets/registry ]; then . /run/secrets/registry; fi; set +a; \
    if [ -n "$FLASH_ATTN" ]; then VIRTUAL_ENV=/opt/gpuml /mnt/uv/uv pip install -q --no-cache --compile-bytecode \
       --no-deps --only-binary :all: "$FLASH_ATTN"; fi
# A change of gpuml's code: two layers of some megabytes. COPY, as not every builder sees that what is behind a mount has changed
COPY --from=wheel /dist /tmp/dist
RUN --mount=type=bind,from=uv,source=/usr/local/bin,target=/mnt/uv \
    VIRTUAL_ENV=/opt/gpuml /mnt/uv/uv pip install -q --no-cache --compile-bytecode --offline --no-deps /tmp/dist/*.whl

WORKDIR /work
USER 10001:10001
CMD ["gpuml", "--help"]
ARG COMMIT=""
LABEL org.opencontainers.image.title="gpuml-train" \
      org.opencontainers.image.description="What a gpuml job runs in" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/gpuml/gpuml" \
      org.opencontainers.image.revision="$COMMIT"
