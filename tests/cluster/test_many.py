"Hundreds of nodes: the list of jobs, why they wait, checks and idle GPUs are right there; benchmarks/many.py has their times with a thousand"

from collections import Counter

import pytest

from gpuml.base.loading import load
from gpuml.cluster import jobs as c
from gpuml.cluster.admission import check_cluster
from gpuml.cluster.api import Api
from gpuml.cluster.idle import look
from gpuml.cluster.manifest import Source, manifest
from gpuml.cluster.usage import limits
from tests.cluster.kwok import GPUS, ManyNodes, idle_gpus
from tests.cluster.programs import missing
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(bool(missing(["kwok"])), reason="no kwok for a cluster: `make servers` builds it")
NODES, RUN, WAIT = 300, 60, 40


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "All GPUs are held, by 60 of our jobs and others' pods, and 40 of our jobs wait"
    cluster = ManyNodes(tmp_path_factory.mktemp("many"), NODES)
    try:
        cluster.start()
        for namespace in ("gpuml-dev", "others"):
            cluster.make_namespace(namespace)
        cluster.fill("others", NODES - RUN, gpus=GPUS)
        cluster.wait_running("others", NODES - RUN)
        cluster.submit(config(cluster, f"compute.gpus={GPUS}"), "running", RUN)
        cluster.wait_running("gpuml-dev", RUN)
        cluster.submit(config(cluster), "waiting", WAIT)
        yield cluster
    finally:
        cluster.stop()


def config(many, *overrides):
    "With a cache of the test's own: this checkout may have jobs on this machine"
    cache = f"data.cache={many.folder / 'cache'}"
    return load("dev", [cache, "compute.image=gpuml", "compute.cpu=1", *overrides], start=ROOT)


@pytest.fixture
def api(many, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(many.plane.kubeconfig("admin", "gpuml-dev")))
    return Api()


def test_jobs_on_many_nodes(many, api):
    "The list, and one of them"
    held = f"needs 1 GPU: none of {NODES * GPUS} is free; held by {NODES} development jobs; it starts when one ends"
    expected = {"": RUN, held: WAIT}

    def whys():
        return Counter(state.why for _, state in c.jobs([config(many)]))

    many.wait(lambda: whys() == expected, 60, "all to be said")
    listed = c.jobs([config(many)])
    assert Counter(state.phase for _, state in listed) == {"running": RUN, "pending": WAIT}
    job, _ = next(pair for pair in listed if pair[1].phase == "pending")
    assert job.status.why == held


def test_checks_on_many_nodes(many, api):
    "What fits, and what never does"
    for count, good in ((8, True), (9, False)):
        wanted = config(many, f"compute.gpus={count}")
        findings = check_cluster(api, wanted, manifest(wanted, "new-1", Source("1", "s3://m/b", "a.ipynb")))
        (finding,) = [finding for finding in findings if finding.subject == "GPUs"]
        assert finding.good is good and ("never fit" in finding.text) is not good, finding


def test_idle_on_many_nodes(many, api):
    "Who holds GPUs without use"
    pods = [pod["metadata"]["name"] for pod in many.admin.get("pods", "gpuml-dev")["items"]]
    with idle_gpus(pods) as address:
        idle = look(api, address, limits(["gpuml-dev=1/2"]))
    assert len(idle) == RUN and {(holder.kind, holder.gpus) for holder in idle} == {("Job", GPUS)}
    assert all(holder.idle is not None for holder in idle)
