"""What is said of a job at every moment of its life, held against recordings of a real control plane

A recording, by tests/cluster/record.py, has every change of a Job, its pods, the events about them, the nodes, and the
run's own record. Who looks reads them one after another: pods, then the Job, then the record and events. So a look at a
busy moment mixes what was true at several: each pair of moments that are at most `SKEW` seconds apart is tried too.
"""

import json
import re
from functools import cache

import pytest

from gpuml.cluster.events import events_about
from gpuml.cluster.manifest import PREFIX
from gpuml.cluster.snapshot import snapshot_of
from gpuml.cluster.state import Seen, explain
from tests.conftest import ROOT

RUN, SKEW = "spring-model", 1.0
NEXT = "Kubernetes starts the next attempt after 10 s, after more the more often it happens"
AGAIN = "submitted again with a longer one, the same run goes on from update 6"
SAVED = "stopped at update 6 of 270, with a checkpoint (exit code 75)"
S3 = "S3 did not answer for 150 s (exit code 75)"
DIED = "the kernel died in cell 3 (exit code 70)"
CANCELLED = f"cancelled at update 6 of 270; its checkpoint stays in s3://models/production/{RUN}, submitting the same with `--name {RUN}` or `gpuml train prod --resume {RUN}` goes on with it"
UNSTARTED = "cancelled before it ran; nothing was saved, and submitting the same begins anew"
REMOVED = "its pod is being removed, and nothing runs in it"
PREEMPTED = "preempted: something of higher priority needed its place on node NODE"
LIMIT = "compute.deadline=LIMIT hours"
NOT_MADE = ("pending", "Kubernetes has not made its pod yet", 0)


def begins(attempt):
    "What is said until an attempt runs"
    return [("pending", "the scheduler has not looked at it yet", attempt), ("pending", "no node takes it: WORDS", attempt),
            ("pending", "POD starts on NODE since TIME", attempt)]  # fmt: skip


def runs(attempt):
    return [*begins(attempt), ("running", "", attempt)]


FIRST = [NOT_MADE, *runs(1)]
SAID = {  # of each recording what follows each other: phase, sentence, attempts; the last is always said
    "success": [*FIRST, ("succeeded", "", 1)],
    "bad-data": [*FIRST, ("failed", "data/a.csv:3: bad row (exit code 65)", 1)],
    "killed": [*FIRST, ("failed", "killed, though not by its own memory limit (exit code 137); its node may have run out; the log ends: Killed", 1)],
    "retries": [*FIRST, ("waiting", f"{DIED}; {NEXT}", 1), *runs(2), ("failed", f"gave up after 2 failures; the last: {DIED}", 2)],
    "deadline": [
        *FIRST, ("stopping", "saves a checkpoint; it was stopped", 1),
        ("stopping", f"saves a checkpoint; its deadline has come, {LIMIT}", 1), ("failed", f"ended by its deadline, {LIMIT}; {AGAIN}", 1),
    ],
    "deadline-unstarted": [
        NOT_MADE, *begins(1), ("stopping", f"{REMOVED}; it was stopped", 1),
        ("stopping", f"{REMOVED}; its deadline has come, {LIMIT}", 1),
        ("failed", f"ended by its deadline, {LIMIT}, before it ran; submit it again with a longer one", 1),
    ],
    "deadline-between": [
        *FIRST, ("waiting", f"{S3}; its deadline comes before Kubernetes starts another attempt", 1),
        ("failed", f"ended by its deadline, {LIMIT}; {AGAIN}", 1),
    ],
    "cancelled": [
        *FIRST, ("stopping", f"it was cancelled, and {REMOVED}", 1), ("stopping", "it was cancelled, and saves a checkpoint", 1),
        ("cancelled", CANCELLED, 1),
    ],
    "cancelled-unstarted": [
        NOT_MADE, *begins(1), ("stopping", f"{REMOVED}; it was stopped", 1), ("stopping", f"it was cancelled, and {REMOVED}", 1),
        ("cancelled", UNSTARTED, 0),
    ],
    "cancelled-between": [*FIRST, ("waiting", f"{S3}; {NEXT}", 1), ("cancelled", CANCELLED, 1)],
    "deleted-in-background": FIRST,
    "suspended": [
        *FIRST, ("stopping", f"{REMOVED}; it was suspended", 1), ("stopping", "saves a checkpoint; it was suspended", 1),
        ("waiting", f"{SAVED}; it is suspended: `kubectl patch job` with suspend=false lets it go on", 1),
        ("waiting", f"{SAVED}; it was let on, and Kubernetes starts the next attempt", 1), *runs(2), ("succeeded", "", 2),
    ],
    "queued": [("pending", "waits in the queue team-a; its Workload says why, which you may not read: an administrator lets you list workloads.kueue.x-k8s.io", 0), ("cancelled", UNSTARTED, 0)],
    "managed": [("pending", "the controller example.com/other is to run it, and has made no pod here", 0)],
    "gated": [
        NOT_MADE, ("pending", "is held back by the scheduling gate example.com/quota: what set it takes it away, such as a queue", 1),
        *runs(1), ("succeeded", "", 1),
    ],
    "preempted": [
        *FIRST, ("stopping", f"saves a checkpoint; {PREEMPTED}", 1), ("waiting", f"{PREEMPTED}; {SAVED}; {NEXT}", 1),
        ("pending", "the scheduler has not looked at it yet", 2),
        ("pending", "needs 1 GPU: gpu-1 has 1 of 1 free, the others none; held by 1 production job; it starts when one ends", 2),
        *runs(2), ("waiting", f"{DIED}; {NEXT}", 2), *runs(3), ("stopping", "saves a checkpoint; it was stopped", 3),
        ("waiting", "node NODE is gone; Kubernetes removes its pod within minutes, and starts the next attempt", 3),
    ],
    "preempted-and-done": [*FIRST, ("stopping", f"saves a checkpoint; {PREEMPTED}", 1), ("succeeded", "", 1)],
    "pod-deleted": [
        *FIRST, ("stopping", "saves a checkpoint; it was stopped", 1), ("waiting", f"{SAVED}; {NEXT}", 1), *runs(2), ("succeeded", "", 2),
    ],
    "evicted": [*FIRST, ("waiting", f"evicted: node NODE was low on memory; {NEXT}", 1), *runs(2), ("succeeded", "", 2)],
    "node-lost": [
        *FIRST, ("waiting", "node NODE does not answer since TIME; if it is lost, an administrator says so: kubectl taint node NODE node.kubernetes.io/out-of-service=:NoExecute", 1),
        ("waiting", "node NODE is gone; Kubernetes removes its pod within minutes, and starts the next attempt", 1),
        ("waiting", f"node NODE is gone, or was given up; {NEXT}", 1), *runs(2), ("succeeded", "", 2),
    ],
    "quota": [NOT_MADE, ("pending", "quota gpuml-dev: 0 of 0 pods used; it starts when others end", 0), *runs(1), ("succeeded", "", 1)],
    "image": [
        NOT_MADE, *begins(1), ("pending", "image can't be pulled: WORDS; check compute.image", 1),
        ("stopping", f"it was cancelled, and {REMOVED}", 1), ("cancelled", UNSTARTED, 0),
    ],
}  # fmt: skip
CODES = {"bad-data": 65, "killed": 137, "retries": 70}  # of those that fail otherwise than by their deadline
VARY = {  # what is another in each recording
    rf"{RUN}-[a-z0-9]{{5}}\b": "POD",
    r"\d+ \w{3} \d\d:\d\d UTC|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ": "TIME",
    r"starts on \S+ since": "starts on NODE since",
    r"\bnode (?!takes)[a-z]+-[a-z0-9-]+": "node NODE",
    r"compute.deadline=[0-9.]+": "compute.deadline=LIMIT",
    r"no node takes it: .*": "no node takes it: WORDS",
    r"can't be pulled: .*; check": "can't be pulled: WORDS; check",
}


def merge(before, patch):
    "The object with a JSON merge patch applied"
    if not isinstance(patch, dict):
        return patch
    merged = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


@cache
def moments(name):
    "[(seconds, objects by kind and key)]: everything that there is after each change"
    changes = json.loads((ROOT / "tests" / "recordings" / f"{name}.json").read_text())
    objects, found = {}, []
    for seconds, kind, key, patch in changes:
        objects = dict(objects)
        if patch is None:
            del objects[kind, key]
        else:
            objects[kind, key] = merge(objects.get((kind, key)), patch)
        found.append((seconds, objects))
    return found


def of_kind(objects, kind):
    return [item for (its_kind, _), item in objects.items() if its_kind == kind]


def look(pods, job, rest):
    "What is seen of the job where its pods, itself, and all else are read at three moments; none where it is not there"
    made = job.get(("jobs", RUN))
    if made is None:
        return None
    all_pods = of_kind(pods, "pods")
    own = [pod for pod in all_pods if pod["metadata"]["labels"].get(f"{PREFIX}/run") == RUN]
    record = max(of_kind(rest, "attempts"), key=lambda attempt: attempt["attempt"], default={})
    active = [pod for pod in all_pods if pod["status"]["phase"] not in ("Succeeded", "Failed")]
    seen = Seen(made, own, [], snapshot_of(of_kind(rest, "nodes"), active), record)
    events = events_about(of_kind(rest, "events"), made, seen.own_pods())
    return Seen(made, own, events, seen.snapshot, record)


def told(state):
    "Phase, sentence without what varies, and attempts"
    words = state.why
    for pattern, word in VARY.items():
        words = re.sub(pattern, word, words)
    return state.phase, words, state.attempts


def looks(name):
    "Whoever looks for no time at all: what each moment shows"
    for _, objects in moments(name):
        if (seen := look(objects, objects, objects)) is not None:
            yield explain(seen)


def slow_looks(name):
    "Who reads pods, Job and the rest at moments that are up to `SKEW` seconds apart"
    found = moments(name)
    for i, (began, pods) in enumerate(found):
        near = [j for j in range(i, len(found)) if found[j][0] - began <= SKEW]
        for j in near:
            for k in near[near.index(j) :]:
                if (seen := look(pods, found[j][1], found[k][1])) is not None:
                    yield explain(seen)


@pytest.mark.parametrize("name", SAID)
def test_no_moment_has_a_wrong_word(name):
    "What is said follows the job's life, in its order, and nothing else is said"
    order = [told(state) for state in looks(name)]
    place = 0
    for said in order:
        assert said in SAID[name][place:], (said, SAID[name][place:])
        place += SAID[name][place:].index(said)
    assert order[-1] == SAID[name][-1]


@pytest.mark.parametrize("name", SAID)
def test_no_slow_look_has_a_wrong_word(name):
    assert {told(state) for state in slow_looks(name)} <= {*SAID[name]}


@pytest.mark.parametrize("name", SAID)
def test_a_job_that_is_over_stays_so_and_ends_with_one_code(name):
    states = [*looks(name)]
    ends = [state.over for state in states]
    assert ends == sorted(ends)
    codes = {state.command_code for state in states if state.over}
    expected = {"failed": CODES.get(name, 75), "succeeded": 0}.get(SAID[name][-1][0], 75)
    assert codes <= {expected}, codes


def test_everything_recorded_is_held_against_something():
    recorded = {path.stem for path in (ROOT / "tests" / "recordings").glob("*.json")}
    assert recorded == SAID.keys()
