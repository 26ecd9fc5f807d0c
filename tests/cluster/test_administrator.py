"What an administrator applies, by docs/administrator.md and with kubectl, on a real control plane"

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster.administer import Administrator
from tests.cluster.agent import Agent
from tests.cluster.api import Api
from tests.cluster.applied import job_as
from tests.cluster.plane import Plane
from tests.cluster.programs import program
from tests.conftest import ROOT
from tests.manifests import prepared
from tests.waiting import until

PAGE = (ROOT / "docs" / "administrator.md").read_text()


class Shell:
    "The administrator's: kubectl is the one of the tests' servers, and asks this plane"

    def __init__(self, plane: Plane, folder: Path):
        (folder / "bin").mkdir()
        (folder / "bin" / "kubectl").symlink_to(program("kubectl"))
        self.folder = folder
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "KUBECONFIG": str(plane.kubeconfig()),
        }

    def run(self, *words) -> subprocess.CompletedProcess:
        "kubectl with these words"
        return subprocess.run(
            ["kubectl", *map(str, words)], env=self.env, cwd=self.folder, capture_output=True, text=True
        )

    def line(self, text: str) -> subprocess.CompletedProcess:
        "A line of a page"
        return subprocess.run(["sh", "-c", text], env=self.env, cwd=self.folder, capture_output=True, text=True)


@pytest.fixture
def empty(tmp_path):
    "A control plane of its own, on which nothing was applied, without nodes"
    (tmp_path / "plane").mkdir()
    plane = Plane(tmp_path / "plane")
    plane.start()
    yield plane
    plane.stop()


def test_the_administrator_s_own_commands(empty, tmp_path):
    "As docs/administrator.md has them: apply, again, diff, who may, delete"
    overlay, shell = prepared(tmp_path) / "overlays" / "team", Shell(empty, tmp_path)
    run = shell.run
    first = run("apply", "-k", overlay)
    assert first.returncode == 0 and "statefulset.apps/postgres created" in first.stdout, first.stderr
    assert not first.stderr  # no warning either
    again = run("apply", "-k", overlay)
    changed = [line for line in again.stdout.splitlines() if not line.endswith(" unchanged")]
    kinds = {line.split(".")[0] for line in changed}
    assert kinds == {"statefulset", "validatingadmissionpolicy"}, changed  # by what the server adds: diff says no
    assert (difference := run("diff", "-k", overlay)).returncode == 0, difference.stdout
    for upgrading in ("scale", "patch"):  # MLflow; the overlay, applied again, sets it right
        (line,) = re.findall(rf"^kubectl (-n gpuml-system {upgrading} deployment/mlflow .+)$", PAGE, re.M)
        assert (done := run(*shlex.split(line))).returncode == 0, done.stderr
        assert run("diff", "-k", overlay).returncode == 1
        assert "deployment.apps/mlflow configured" in run("apply", "-k", overlay).stdout
    assert (difference := run("diff", "-k", overlay)).returncode == 0, difference.stdout
    asked = ["auth", "can-i", "use", "priorityclass/gpuml-prod", "-n", "gpuml-prod", "--as", "ada", "--as-group"]
    assert [run(*asked, group).stdout.strip() for group in ("gpuml-prod", "gpuml-dev")] == ["yes", "no"]
    gone = run("delete", "-k", overlay, "--timeout=600s")
    assert gone.returncode == 0, gone.stderr
    left = {n["metadata"]["name"] for n in empty.api().get("namespaces")["items"]}
    assert not left & {"gpuml-dev", "gpuml-prod", "gpuml-system"}


@pytest.mark.parametrize("time", range(int(os.environ.get("GPUML_TIMES", "2"))))
def test_from_nothing_to_the_first_job(time, empty, tmp_path):
    "The page's own lines, each once, and right after them a job from JupyterLab's account: it runs, and no pod has a token"
    prepared(tmp_path)
    shell, agent = Shell(empty, tmp_path), Agent(empty, tmp_path / "agent")
    (block,) = re.findall(r"\*\*Secrets, and everything else\.\*\*\n\s+```sh\n(.*?)```", PAGE, re.S)
    lines = [line.strip() for line in block.splitlines() if " wait " not in line]  # no images of servers are here
    assert [line.split()[0] for line in lines if line] == ["k8s/secrets.sh", "kubectl"]
    agent.start()
    try:
        agent.add_node("gpu-1")
        for line in filter(None, lines):
            done = shell.line(line)
            assert done.returncode == 0 and not done.stderr, done.stderr
        token = Administrator(empty).token("gpuml-system", "notebook")
        notebook = Api(empty.url, token, str(empty.certificate))
        notebook.create("jobs", "gpuml-prod", job_as("gpuml-prod", "first", "true"))
        until(lambda: notebook.get("jobs", "gpuml-prod", "first")["status"].get("succeeded") == 1)
        (pod,) = notebook.get("pods", "gpuml-prod")["items"]
        assert not any("projected" in volume for volume in pod["spec"].get("volumes", []))
    finally:
        agent.stop()
