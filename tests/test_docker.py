"Images, compose file and workflows: what their linters say, and what no linter knows. docker/try.sh builds the image"

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gpuml.base.errors import Exit
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOOLS = {
    "hadolint": ["hadolint", DOCKERFILE],
    "compose-lint": ["compose-lint", "--fail-on", "high", DOCKER / "compose.yaml"],
    "actionlint": ["actionlint", *WORKFLOWS],
}


def step(workflow: str, job: str, name: str) -> str:
    "The script of a workflow's step, by its id or name"
    steps = YAML(typ="safe").load(ROOT / ".github" / "workflows" / workflow)["jobs"][job]["steps"]
    (found,) = (s for s in steps if "run" in s and name in (s.get("id"), s.get("name", "").partition(";")[0]))
    assert "${{" not in found["run"], "what others choose belongs into env, not into a script"
    return found["run"]


def as_runner(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    "Runs it as a runner of GitHub does"
    file, path = folder / "step.sh", f"{folder}:{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
    file.write_text(script)
    own = {"GITHUB_OUTPUT": str(folder / "output"), "GITHUB_STEP_SUMMARY": str(folder / "summary")}
    environment = {"PATH": path, "HOME": str(folder), "RUNNER_TEMP": str(folder), **own, **environment}
    return subprocess.run(["bash", "-e", file], cwd=folder, env=environment, capture_output=True, text=True)


def run(tool: str, *arguments, **more) -> subprocess.CompletedProcess:
    command = [f"{sys.prefix}/bin/{tool}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)


@pytest.mark.parametrize("name", TOOLS)
def test_linter(name):
    done = run(*TOOLS[name])
    assert done.returncode == 0, done.stdout + done.stderr


WRONG = {
    "hadolint": ("a.Dockerfile", "FROM debian:latest\nRUN cd /x && apt-get install y\n"),
    "compose-lint": ("compose.yaml", "services:\n  a:\n    image: a:1\n    privileged: true\n"),
    "actionlint": ("a.yml", "on: push\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    steps:\n      - run: echo ${{ github.shaa }}\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_linter_finds_what_is_wrong(name, tmp_path):
    file, text = WRONG[name]
    (tmp_path / file).write_text(text)
    tool, *options = [a for a in TOOLS[name] if not isinstance(a, Path)]
    assert run(tool, *options, tmp_path / file).returncode != 0


def test_actions_of_others_are_pinned():
    "By commit: a tag may be moved to other code, which would see the registry's token and the cluster's key"
    for workflow in WORKFLOWS:
        for used in re.findall(r"uses: (.+)", workflow.read_text()):
            assert re.fullmatch(r"\./.+|[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), (
                f"{workflow.name}: {used}"
            )


DIGEST = "sha256:" + "5f" * 32


def test_delivery_names_images_and_records_their_digests(tmp_path):
    done = as_runner(step("deliver.yml", "images", "names"), tmp_path, GITHUB_REPOSITORY="Some-One/GPUml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == "train=ghcr.io/some-one/gpuml-train\ndev=ghcr.io/some-one/gpuml-dev\n"
    (tmp_path / "output").unlink()
    images = {"TRAIN": f"ghcr.io/some-one/gpuml-train@{DIGEST}", "DEV": "ghcr.io/some-one/gpuml-dev@sha256:11"}
    done = as_runner(step("deliver.yml", "images", "record"), tmp_path, **images)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    recorded = {"train": images["TRAIN"], "dev": images["DEV"]}
    assert YAML(typ="safe").load(tmp_path / "images.yaml") == recorded
    assert (tmp_path / "summary").read_text() == (tmp_path / "images.yaml").read_text()
    assert dict(line.split("=") for line in (tmp_path / "output").read_text().split()) == recorded


def test_delivery_builds_a_commit_once(tmp_path):
    "What the registry has already is taken; docker is not to be had here, so a stand-in that knows one image"
    (tmp_path / "docker").write_text(f"""#!/bin/sh
[ "$1 $2 $3 $5" = "buildx imagetools inspect --format" ] || exit 2
case $4 in
    */gpuml-train:0f2a) echo '"{DIGEST}"' ;;
    */gpuml-train:busy) echo "ERROR: unexpected status: 503 Service Unavailable" >&2; exit 1 ;;
    *) echo "ERROR: $4: not found" >&2; exit 1 ;;
esac
""")
    (tmp_path / "docker").chmod(0o755)
    images = {"TRAIN": "ghcr.io/some-one/gpuml-train:0f2a", "DEV": "ghcr.io/some-one/gpuml-dev:0f2a"}
    done = as_runner(step("deliver.yml", "images", "there"), tmp_path, **images)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text() == f"train={DIGEST}\ndev=\n"
    images["TRAIN"] = "ghcr.io/some-one/gpuml-train:busy"
    done = as_runner(step("deliver.yml", "images", "there"), tmp_path, **images)
    assert done.returncode == 1 and "503" in done.stderr  # not taken for one that nobody has built


def test_delivery_submits_what_is_on_main(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"]
        return subprocess.check_output(["git", *names, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "on main")
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    git("commit", "-q", "--allow-empty", "-m", "elsewhere")
    for commit, code in ((git("rev-parse", "HEAD~"), 0), (git("rev-parse", "HEAD"), 1)):
        script = step("deliver.yml", "on-main", "The commit is on main")
        done = as_runner(script, tmp_path, GITHUB_SHA=commit, GITHUB_REF_NAME="v1")
        assert done.returncode == code, done.stderr
    assert done.stdout == "::error::v1 is not on main\n"


def instructions(name: str, stage: str = "") -> list[str]:
    "All of a kind in the Dockerfile, or those of one stage"
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    if stage:
        text = re.search(rf"^FROM \S+ AS {stage}$(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    return re.findall(rf"^{name} +(.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("image", ["train", "dev"])
def test_images(image):
    "The manifest demands user 10001; a change of gpuml's code makes small layers only, after those of packages"
    assert instructions("USER", image) == ["10001:10001"]
    assert instructions("COPY", image) == ["--from=wheel /dist /tmp/dist"]
    (installed,) = instructions("RUN", image)
    assert "--offline --no-deps /tmp/dist/" in installed
    stages = dict(reversed(line.split(" AS ")) for line in instructions("FROM"))
    below = image
    while below in stages:
        below = stages[below]
        copied = instructions("COPY", below) if below in stages else []
        assert not any(word in line for line in copied for word in ("gpuml ", "wheel")), below
    assert below == "${BASE}", "only ARG names an image that is pulled"
    assert list(stages)[-1] == "train", "what a build without --target makes"
    assert not re.search(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)[1].endswith(":latest")


def test_the_builder_gets_what_is_copied_and_no_more():
    import pathspec

    left_out = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".dockerignore").read_text().splitlines())
    lines = [line for line in instructions("COPY") if not line.startswith("--from=")]
    copied = {part for line in lines for part in line.split()[:-1] if not part.startswith("--")}
    assert copied >= {"gpuml", "config", "constraints.txt", "docker/lab.sh"}
    for name in copied:
        path = ROOT / name
        assert path.exists(), name
        some = path if path.is_file() else next(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        assert not left_out.match_file(some.relative_to(ROOT)), name
    for name in (
        ".env",
        "docker/.env",
        ".git/config",
        "outputs/dev/x",
        "mlflow.db",
        "data/own.csv",
        "nbs/training/80_fit.ipynb",
    ):
        assert left_out.match_file(name), name


def test_everything_that_the_package_needs_is_copied():
    "The wheel is made from what the Dockerfile copies: pyproject.toml's force-include and readme are part of it"
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    copied = " ".join(instructions("COPY")).split()
    for name in [*included, *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], "README.md", "LICENSE"]:
        assert name in copied, name


def test_compose_names_no_secret_and_env_example_all_variables():
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / "env.example").read_text(), re.MULTILINE))
    assert asked == {"JUPYTER_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY"} and asked <= example.keys()
    assert not example["JUPYTER_TOKEN"] and not example["S3_SECRET_KEY"]
    assert subprocess.run(["git", "check-ignore", "-q", "docker/.env"], cwd=ROOT).returncode == 0


def test_compose_listens_on_this_machine_only_and_names_what_the_configs_name():
    services = YAML(typ="safe").load(DOCKER / "compose.yaml")["services"]
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert ":latest" not in service["image"] and service["read_only"] and service["cap_drop"] == ["ALL"]
    prod = YAML(typ="safe").load(ROOT / "config" / "prod.yaml")
    assert prod["tracking"]["uri"] == "http://mlflow:5000" and "mlflow" in services
    buckets = services["buckets"]["command"][2]
    for place in (prod["data"]["train"], prod["output"]):
        assert f'"{place.split("/")[2]}"' in buckets


def test_compose_makes_the_buckets(s3):
    "On a real S3 server, and again when they are there"
    import s3fs

    command = YAML(typ="safe").load(DOCKER / "compose.yaml")["services"]["buckets"]["command"]
    assert command[:2] == ["python3", "-c"]
    for _ in range(2):
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    there = s3fs.S3FileSystem(skip_instance_cache=True).ls("")
    assert {"datasets", "models", "mlflow"} <= set(there)


@pytest.mark.parametrize("token", ["", "short"])
def test_jupyterlab_does_not_start_without_a_token(token, tmp_path):
    "What it does with one: test_k8s.py"
    environment = {**os.environ, "JUPYTER_TOKEN": token}
    done = subprocess.run(
        [DOCKER / "lab.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == Exit.BAD_CONFIG and "JUPYTER_TOKEN: must be set to 16 characters or more" in done.stderr
    assert not list(tmp_path.iterdir())


def test_kernels_of_the_dev_image_know_the_magics(tmp_path):
    profile = tmp_path / "profile_default"
    profile.mkdir()
    shutil.copy(DOCKER / "ipython_config.py", profile)
    code = "print(get_ipython().find_line_magic('gpu_train') is not None)"
    done = run("ipython", "--no-banner", "-c", code, env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    assert done.stdout.strip() == "True", done.stdout + done.stderr
    assert "docker/ipython_config.py /etc/ipython/" in instructions("COPY")
