"What the panel offers to start after: a person's jobs that have not ended, and a sweep as one"

import json

from gpuml.base.person import person_mark
from gpuml.cluster.answers import NoServer
from gpuml.cluster.facts import job_facts
from gpuml.cluster.remote import ClusterJob
from gpuml.jobs.handle import Job, State
from gpuml.training.own_job import CHILD
from gpuml.ui.panel_production import offers_after


def job(name, phase, sweep="", namespace="gpuml-dev", mine=True):
    "A job of the list, as the API server has it"
    variables = [{"name": CHILD, "value": json.dumps({"sweep": sweep, "number": 1})}] if sweep else []
    notes = {"gpuml.io/person": person_mark() if mine else "somebody"}
    pod = {"spec": {"containers": [{"name": "train", "env": variables}]}}
    facts = job_facts({"metadata": {"name": name, "annotations": notes}, "spec": {"template": pod}})
    place = f"s3://models/{name}"
    return ClusterJob(name, place, None, facts, "", NoServer(), namespace), State(phase)


def test_a_sweep_is_one_entry():
    pairs = [
        job("autumn-3-rate", "pending", "autumn"),
        job("spring", "running"),
        job("autumn-2-rate", "running", "autumn"),
        job("autumn-1-rate", "succeeded", "autumn"),
        job("winter", "succeeded"),
        job("others", "running", mine=False),
        job("others-1", "running", "others", mine=False),
        (Job("here", "outputs/here", None, {}), State("running")),
    ]
    assert offers_after(pairs) == [
        ("autumn · sweep, 2 jobs: 1 pending, 1 running", "autumn"),
        ("spring · running", "spring"),
    ]


def test_names_that_others_have_too_say_where():
    pairs = [
        job("a-1", "running", "a"),
        job("a-1", "running", "a", namespace="gpuml-prod"),
        job("b-1", "running", "b"),
        job("b", "running", namespace="gpuml-prod"),
        job("c-1", "running", "c"),
    ]
    assert [name for _, name in offers_after(pairs)] == [
        "gpuml-dev/a",
        "gpuml-prod/a",
        "gpuml-dev/b",
        "gpuml-prod/b",
        "c",
    ]
