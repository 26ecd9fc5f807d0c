# JupyterLab on top of the image of a job: what runs here has the same packages there.
#
#   docker build -f docker/dev.Dockerfile -t gpuml-dev --build-arg TRAIN=gpuml-train .

ARG TRAIN=gpuml-train
FROM ${TRAIN}
USER 0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y -q --no-install-recommends git openssh-client && rm -rf /var/lib/apt/lists/*
# boto3 is for the MLflow server in compose.yaml, which keeps its artifacts on S3
RUN --mount=type=secret,id=registry \
    set -a; if [ -f /run/secrets/registry ]; then . /run/secrets/registry; fi; set +a; \
    python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir -q -c /opt/gpuml/constraints.txt uv \
    && VIRTUAL_ENV=/opt/gpuml /tmp/uv/bin/uv pip install -q --no-cache --compile-bytecode -c /opt/gpuml/constraints.txt \
       -r /opt/gpuml/pyproject.toml --extra lab boto3 \
    && rm -r /tmp/uv
COPY docker/ipython_config.py /etc/ipython/
COPY --chmod=755 docker/lab.sh /usr/local/bin/lab
RUN install -d -o 10001 -g 10001 /work/project
WORKDIR /work/project
USER 10001:10001
EXPOSE 8888
HEALTHCHECK --start-period=30s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8888/api', timeout=3)"]
CMD ["lab"]
ARG COMMIT=""
LABEL org.opencontainers.image.title="gpuml-dev" \
      org.opencontainers.image.description="JupyterLab with gpuml" \
      org.opencontainers.image.revision="$COMMIT"
