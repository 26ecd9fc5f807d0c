"""What a job costs beside its training: from the line to a Job on a real control plane, the list, and the runner.

    python benchmarks/submit.py [--jobs 2000] [--at-once 100] [--repeats 5]

Starts the tests' control plane (tests/cluster, whose servers must be cached: `make servers`) and SeaweedFS, both on
loopback. Prints: seconds from `submit` to the Job that the API server accepted, with the bundle new and there already;
the bundle's time and size; one Job out of many submissions at once; the list of jobs with thousands present; and the
runner against the same code as a script, whose ratio is the notebook's price.
Targets: 1 s for a submission with its bundle there, 2 s for the list, 2 s + 15 ms a cell for the runner.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from gpuml.cluster import jobs as cluster  # noqa: E402
from gpuml.cluster.submission import prepare  # noqa: E402
from gpuml.jobs import bundle  # noqa: E402
from tests import s3  # noqa: E402
from tests.cluster.cluster import Cluster  # noqa: E402
from tests.cluster.plane import Plane  # noqa: E402
from tests.cluster.site import Site  # noqa: E402


def seconds(call, repeats: int = 1) -> tuple[float, float, float]:
    "Median, least and most of some calls"
    taken = []
    for i in range(repeats):
        begun = time.perf_counter()
        call(i)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken), min(taken), max(taken)


def show(what: str, taken: tuple[float, float, float], more: str = "") -> None:
    print(f"{what:<58} {taken[0]:8.3f} s  ({taken[1]:.3f}–{taken[2]:.3f})  {more}", flush=True)


def submitting(site: Site, given: argparse.Namespace) -> None:
    "From the call to the accepted Job"
    site.submit("train.epochs=99")  # imports
    show("submit, bundle new", seconds(lambda i: site.submit(f"train.epochs={100 + i}"), given.repeats))
    show("submit, bundle there", seconds(lambda i: site.submit("train.epochs=99", again=True), given.repeats))
    config = site.config()
    packed = bundle.pack(config, site.notebook)
    show(
        "bundle",
        seconds(lambda i: bundle.pack(config, site.notebook), given.repeats),
        f"{len(packed.archive)} bytes",
    )
    begun = time.perf_counter()
    with ThreadPoolExecutor(given.at_once) as pool:
        made = list(pool.map(lambda _: site.submit("train.epochs=50").run_id, range(given.at_once)))
    taken = time.perf_counter() - begun
    show(f"{given.at_once} submissions of the same at once", (taken, taken, taken), f"{len(set(made))} Job")


def listing(site: Site, given: argparse.Namespace) -> None:
    "The list with many jobs present"
    planned = prepare(site.config(), site.notebook)
    body = json.dumps(planned.manifest)

    def make(i):
        manifest = json.loads(body.replace(planned.manifest["metadata"]["name"], f"many-{i}"))
        manifest["spec"]["parallelism"] = 0  # as one that has ended: no pods
        site.cluster.admin.create("jobs", site.namespace, manifest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(given.jobs)))
    found = cluster.jobs([site.config()])
    show(f"%gpu_jobs with {len(found):,} jobs", seconds(lambda i: repr(cluster.jobs([site.config()])), given.repeats))


def running(folder: Path, given: argparse.Namespace, cells: int = 40) -> None:
    "`gpuml run` against the same code as a script"
    sources = ['config = "dev"', *(f"x{i} = {i}" for i in range(cells))]
    made = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"] if not i else []}, "source": s, "outputs": [], "execution_count": None} for i, s in enumerate(sources)]  # fmt: skip
    tree = {"cells": made, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "dev.yaml").write_text(f"data:\n  train: data\noutput: {folder / 'out'}\n")
    (folder / "a.ipynb").write_text(json.dumps(tree))
    (folder / "a.py").write_text("\n".join(sources))
    (folder / "bundle.json").write_text(
        json.dumps({"format": 1, "notebook": "a.ipynb", "config": "dev", "path": ["."], "root": "."})
    )

    def run(*command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    script = seconds(lambda i: run(sys.executable, "a.py"), given.repeats)
    as_job = seconds(lambda i: run(sys.executable, "-m", "gpuml", "run", str(folder), "--run", f"r{i}"), given.repeats)
    show("python script.py", script)
    show(
        f"gpuml run, {cells + 1} cells",
        as_job,
        f"{as_job[0] - script[0]:.2f} s more; target {2 + 0.015 * (cells + 1):.2f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside, pytest.MonkeyPatch.context() as patch:
        folder = Path(aside)
        running(folder / "runner", given)
        process, endpoint = s3.start(folder)
        plane = Plane(folder / "plane")
        (folder / "plane").mkdir()
        try:
            s3.keys_in_environment(patch)
            s3._ready(endpoint, process, folder / "weed.log")
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.chdir(folder)
            (folder / "config").mkdir()
            made = Cluster(plane.start(), folder / "pods")
            made.agent.add_node("large", gpus=8, taints=[{"key": "kept", "effect": "NoSchedule"}])
            site = Site(made, made.make_namespace("benchmark"), folder, s3.S3(endpoint, "s3://datasets/b"), patch)
            held = {"hard": {"pods": "0"}}  # what is submitted here need not run
            made.admin.create("resourcequotas", "benchmark", {"metadata": {"name": "none"}, "spec": held})
            submitting(site, given)
            listing(site, given)
            made.stop()
        finally:
            plane.stop()
            process.kill()


if __name__ == "__main__":
    main()
