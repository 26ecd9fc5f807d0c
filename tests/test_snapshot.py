"One count of who holds which GPU: by it a job waits, a submission is refused, and an idle GPU is released"

import pytest

from gpuml.cluster.demand import pod_devices
from gpuml.cluster.devices import own_gpus
from gpuml.cluster.snapshot import snapshot_of

GPU = "nvidia.com/gpu"


def asks(count, name=GPU, **settings):
    return {"name": "c", "resources": {"limits": {name: count, "cpu": "4"}}, **settings}


def pod(spec, phase="Running", node="n1", **metadata):
    return {"metadata": {"name": "p", **metadata}, "spec": {"nodeName": node, **spec}, "status": {"phase": phase}}


NODES = [{"metadata": {"name": "n1"}, "status": {"allocatable": {GPU: "8", "cpu": "64"}}}]
DIFFERED = {  # a pod; the GPUs that it holds; what the list of jobs and `gpuml idle` each once counted
    "an init container needs more": ({"containers": [asks(1)], "initContainers": [asks(3)]}, 3, 1, 3),
    "an init container alone": ({"containers": [asks(0)], "initContainers": [asks(2)]}, 2, 0, 2),
    "a native sidecar beside it": ({"containers": [asks(1)], "initContainers": [asks(2, restartPolicy="Always")]}, 3, 1, 2),
    "a sidecar, then an init container": (
        {"containers": [asks(1)], "initContainers": [asks(1, restartPolicy="Always"), asks(4)]}, 5, 1, 4,
    ),
    "only requests": ({"containers": [{"resources": {"requests": {GPU: "2"}}}]}, 2, 2, 0),
}  # fmt: skip


def by_containers(spec):
    "The rule that explained what a job waits for"
    resources = [c.get("resources", {}) for c in spec["containers"]]
    return sum(int((r.get("requests") or r.get("limits", {})).get(GPU, 0)) for r in resources)


def by_limits(spec):
    "The rule that found GPUs without use"

    def of(container):
        return int(container.get("resources", {}).get("limits", {}).get(GPU, 0))

    return max([sum(map(of, spec["containers"])), *map(of, spec.get("initContainers") or [])])


@pytest.mark.parametrize("name", DIFFERED)
def test_one_count_where_there_were_two(name):
    "As the scheduler counts: the most that a pod needs at any moment; neither of the two rules did in all cases"
    spec, count, waiting, idle = DIFFERED[name]
    assert (by_containers(spec), by_limits(spec)) == (waiting, idle) and {waiting, idle} != {count}
    assert pod_devices(spec) == {GPU: count} and own_gpus(pod_devices(spec)) == count
    assert snapshot_of(NODES, [pod(spec)]).free() == {"n1": (8 - count, 8)}


@pytest.mark.parametrize(
    "made, held",
    [
        (pod({"containers": [asks(2)]}), 2),
        (pod({"containers": [asks(2)]}, "Pending"), 2),  # its image is being pulled
        (pod({"containers": [asks(2)]}, "Unknown"), 2),  # its node does not answer
        (pod({"containers": [asks(2)]}, deletionTimestamp="2026-11-26T12:00:00Z"), 2),  # it saves a checkpoint
        (pod({"containers": [asks(2)]}, "Succeeded"), 0),
        (pod({"containers": [asks(2)]}, "Failed"), 0),
        (pod({"containers": [asks(2)]}, "Pending", None), 0),
        (pod({"containers": [asks(2, "nvidia.com/mig-1g.10gb")]}), 0),
    ],
)
def test_a_pod_holds_from_its_node_to_its_end(made, held):
    snapshot = snapshot_of(NODES, [made])
    assert snapshot.free() == {"n1": (8 - held, 8)} and snapshot.holders_of().total() == bool(held)


def test_what_may_not_be_seen_is_not_known():
    snapshot = snapshot_of(None, [])
    assert snapshot.nodes is None and snapshot.free() == {}
