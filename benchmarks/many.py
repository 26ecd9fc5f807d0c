"""How long people wait on a large cluster: 1,000 nodes of 8 GPUs, 10,000 pods, played by KWOK on a real control plane.

    python benchmarks/many.py [--nodes 1000] [--pods 10000] [--jobs 300] [--repeats 5]

Starts a control plane of its own and KWOK (tests/cluster, whose programs must be cached: `make servers`), fills all GPUs,
and lets a third of gpuml's jobs wait. Prints: the list of jobs as an administrator has it, who may see everything, and as
a user; why one job waits; the checks before a submission; who holds GPUs without use; and the requests behind them.
Target: 1 s for the list.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ruamel.yaml import YAML  # noqa: E402

from gpuml.base.loading import load  # noqa: E402
from gpuml.cluster import jobs as cluster  # noqa: E402
from gpuml.cluster.admission import check_cluster  # noqa: E402
from gpuml.cluster.api import Api  # noqa: E402
from gpuml.cluster.idle import look  # noqa: E402
from gpuml.cluster.manifest import Source, manifest  # noqa: E402
from gpuml.cluster.usage import limits  # noqa: E402
from tests.cluster.administer import Administrator  # noqa: E402
from tests.cluster.kwok import GPUS, ManyNodes, idle_gpus  # noqa: E402

ACTIVE = "status.phase!=Succeeded,status.phase!=Failed"


def show(what: str, call, repeats: int) -> None:
    "Median, least and most of some calls"
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    print(f"{what:<52} {statistics.median(taken):7.2f} s  ({min(taken):.2f}–{max(taken):.2f})", flush=True)


def config(*overrides: str):
    return load("dev", ["compute.image=gpuml", "compute.cpu=1", *overrides], start=ROOT)


def fill(many: ManyNodes, given: argparse.Namespace) -> None:
    "All GPUs are held; two thirds of the jobs run"
    begun = time.perf_counter()
    for namespace in ("gpuml-dev", "gpuml-prod", "others", "cpus"):
        many.make_namespace(namespace)
    run = given.jobs * 2 // 3
    many.submit(config(), "running", run)
    many.wait_running("gpuml-dev", run, 600)
    others = given.nodes * GPUS - run
    many.fill("others", others)
    many.wait_running("others", others, 1200)
    many.fill("cpus", max(1, given.pods - others - given.jobs), gpus=0)
    many.wait_running("cpus", max(1, given.pods - others - given.jobs), 600)
    many.submit(config(), "waiting", given.jobs - run)
    pods = len(many.admin.get("pods", resourceVersion="0")["items"])
    print(f"{given.nodes} nodes, {pods} pods, {given.jobs} jobs; {time.perf_counter() - begun:.0f} s to make them")


def permit(many: ManyNodes) -> None:
    "What users may, as an administrator applies it"
    administrator = Administrator(many.plane)
    for rule in YAML(typ="safe").load_all((ROOT / "k8s" / "cluster" / "access.yaml").read_text()):
        administrator.apply(rule)


def measure(many: ManyNodes, user: str, repeats: int) -> None:
    "What one waits for, as this user"
    os.environ["KUBECONFIG"] = str(many.plane.kubeconfig(user, "gpuml-dev"))
    api, wanted = Api(), config()
    listed = cluster.jobs([wanted])
    print(f"as {user}: {dict(Counter(state.phase for _, state in listed))}")
    show("  list of jobs", lambda: cluster.jobs([wanted]), repeats)
    job, state = next(pair for pair in listed if pair[1].phase == "pending")
    print(f"  {state.why}")
    show("  why one job waits", lambda: job.status, repeats)
    running = next(job for job, state in listed if state.phase == "running")
    show("  state of one that runs", lambda: running.status, repeats)
    new = manifest(wanted, "new-1", Source("1", "s3://m/b", "a.ipynb"))
    show("  checks before a submission", lambda: check_cluster(api, wanted, new), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("nodes", 1000), ("pods", 10_000), ("jobs", 300), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        many = ManyNodes(Path(folder), given.nodes)
        try:
            many.start()
            fill(many, given)
            permit(many)
            for user in ("admin", "dev-user"):
                measure(many, user, given.repeats)
            os.environ["KUBECONFIG"] = str(many.plane.kubeconfig("admin", "gpuml-dev"))
            api = Api()
            show("request: all pods", lambda: api.items("/api/v1/pods", fieldSelector=ACTIVE), given.repeats)
            show("request: nodes", lambda: api.items("/api/v1/nodes"), given.repeats)
            show("request: events", lambda: api.items("/api/v1/namespaces/gpuml-dev/events"), given.repeats)
            pods = [pod["metadata"]["name"] for pod in many.admin.get("pods", "gpuml-dev")["items"]]
            with idle_gpus(pods) as address:
                show("gpuml idle", lambda: look(api, address, limits(["gpuml-dev=1/2"])), given.repeats)
        finally:
            many.stop()


if __name__ == "__main__":
    main()
