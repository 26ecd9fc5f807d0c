"Kubernetes' published schemas: kubernetes-validate, in an environment of its own: where it is installed, imports get slow"

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import functools, json, sys
import yaml
from kubernetes_validate import utils

utils.schema_contents = functools.cache(utils.schema_contents)  # or every object parses all of its version's anew

@functools.cache
def parse(text):
    return [manifest for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest]

def problem(manifest, version):
    try:
        utils.validate(manifest, version, strict=True)
    except Exception as e:
        return f"{manifest['kind']}/{manifest['metadata']['name']}: {getattr(e, 'message', e)}"

for line in sys.stdin:
    version, text = json.loads(line)
    print(json.dumps([problem(manifest, version) for manifest in parse(text)]), flush=True)
"""


def install() -> Path:
    "The environment's Python; what is installed stays for other sessions"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuml-tests" / "kubernetes-validate"
    python, uv = home / "bin" / "python", [sys.executable, "-m", "uv"]
    if not (home / "bin" / "kubernetes-validate").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, home], check=True)
        subprocess.run([*uv, "pip", "install", "-q", "--python", python, "kubernetes-validate==1.37.0"], check=True)
    return python


@pytest.fixture(scope="module")
def validate():
    "A function of version and YAML: for each object what is wrong with it, or None; one process knows all versions"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([install(), "-c", PROGRAM], text=True, **pipes) as process:

        def ask(version: str, text: str) -> list[str | None]:
            print(json.dumps([version, text]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
