"""A job's metrics, the rules on them, and the dashboard: a real job, Prometheus itself, and what the exporters say.

The pages in tests/monitoring are as the DCGM exporter, kube-state-metrics and the scheduler write them; scenario.py
there makes four hours of such pages. The picture of the dashboard goes to the folder named by GPUML_PICTURES.
"""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import requests
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.jobs.bundle import pack, put
from gpuml.jobs.exporter import Metrics, served
from gpuml.jobs.log import Log
from tests import forked
from tests.conftest import CONFIG, ROOT, free_port, rows
from tests.monitoring import picture, scenario
from tests.prometheus import OPENMETRICS, RULES, TEXT, Prometheus, exporter, needs_prometheus
from tests.test_lab import CHROMIUM, FLAGS
from tests.test_run import PARAMETERS, write_notebook
from tests.waiting import until

MONITORING, PAGES = ROOT / "k8s" / "monitoring", ROOT / "tests" / "monitoring"


# ---- a job

CALM = """\
import os, time
from torch.optim import optimizer

begun, stops = [], [100, 200, 300, 400, 500, 600, 700, 790]

def before(*_):
    "An update takes 10 ms at least, and the n-th stop is over once n of them were served"
    time.sleep(0.01)
    begun.append(1)
    while len(begun) in stops and len(os.listdir({shown!r})) <= stops.index(len(begun)):
        time.sleep(0.01)

optimizer.register_optimizer_step_pre_hook(before)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory, mlflow_template, tiny):
    "A job that has run, and every page that it served meanwhile: (its output folder, the pages)"
    home, port = tmp_path_factory.mktemp("job"), free_port()
    project = home / "project"
    for folder in ("config", "data"):
        (project / folder).mkdir(parents=True)
    text = CONFIG.format(cache=home / "cache", model=tiny, port=free_port()).replace("epochs: 2", "epochs: 4")
    (project / "config" / "dev.yaml").write_text(text)
    (project / "data" / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows(2000)))
    shutil.copy(mlflow_template, project / "mlflow.db")
    shown, looked = home / "updates that were served", home / "its last page was served"
    shown.mkdir()
    wait = f"while not os.path.exists({str(looked)!r}): time.sleep(0.01)"
    cells = [PARAMETERS, "%load_ext gpuml", CALM.format(shown=str(shown)), "run = %gpu_train", wait]
    notebook = write_notebook(project / "nbs" / "n.ipynb", *cells)
    made = [
        f"output={home / 'outputs'}",
        f"data.train={project / 'data'}",
        f"tracking.uri=sqlite:///{project / 'mlflow.db'}",
    ]
    address = put(pack(load("dev", made, start=project), notebook), str(home / "outputs"), Storage())
    command = [forked.python(), "-m", "gpuml", "run", address, "--run", "dev-1"]
    environment = {**os.environ, "GPUML_METRICS_PORT": str(port)}
    process = subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    pages, accept = [], {"Accept": "application/openmetrics-text; version=1.0.0"}
    while process.poll() is None:
        try:
            pages.append(requests.get(f"http://127.0.0.1:{port}/metrics", headers=accept, timeout=60).text)
            for update in re.findall(r"^gpuml_updates{.*} (\S+)$", pages[-1], re.MULTILINE):
                (shown / update).touch()
            if 'phase="done"' in pages[-1]:
                looked.touch()
        except requests.RequestException:
            pass
        time.sleep(0.05)
    assert process.returncode == 0, process.stdout.read()
    return home / "outputs" / "dev-1", pages


def samples(page: str) -> dict[str, float]:
    "Name → value of what a page says of the run"
    found = [s for family in text_string_to_metric_families(page) for s in family.samples]
    assert all(s.labels["run"] == "dev-1" for s in found)
    return {s.labels.get("phase") or s.name: s.value for s in found}


def test_a_job_says_how_far_it_is(job):
    "What was served while it trained is what metrics.jsonl has, update by update"
    folder, pages = job
    spool = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {step: m["loss"] for _, step, kind, m in spool if kind == "update"}
    evaluated = {m["validation_loss"] for _, _, kind, m in spool if kind == "evaluation"}
    seen = [samples(page) for page in pages]
    trained = [s for s in seen if "gpuml_loss" in s]
    updates = [int(s["gpuml_updates"]) for s in trained]
    assert len(set(updates)) > 5 and updates == sorted(updates)
    for s in trained:
        assert s["gpuml_loss"] == losses[s["gpuml_updates"]]
        assert s["gpuml_updates_planned"] == max(losses) and s["gpuml_epochs_planned"] == 4
        if "gpuml_validation_loss" in s:
            assert s["gpuml_validation_loss"] in evaluated
    assert {"training", "done"} <= {name for s in seen for name in s if not name.startswith("gpuml_")}
    assert min(s["gpuml_seconds_left"] for s in trained if "gpuml_seconds_left" in s) < 60
    assert any(s.get("gpuml_examples_per_second", 0) > 0 for s in trained)


@pytest.mark.parametrize("port", ["taken", "x", "99999"])
def test_a_port_that_can_not_be_had_costs_a_note(port, capsys):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1]) if port == "taken" else port
        with served(Metrics(), port, Log()):
            pass
    assert re.fullmatch(rf"note: GPUML_METRICS_PORT={port}: .+; no metrics are served\n", capsys.readouterr().out)


# ---- rules


@pytest.fixture
def rules(tmp_path):
    "promtool over the rules, changed as is said: its verdict"
    yaml = YAML(typ="safe", pure=True)

    def run(*arguments, change=("", "")):
        text = RULES.read_text()
        assert change[0] in text
        yaml.dump(yaml.load(text.replace(*change))["spec"], tmp_path / "rules.yml")
        shutil.copy(PAGES / "alerts.yaml", tmp_path)
        done = subprocess.run(["promtool", *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@needs_prometheus
def test_rules(rules):
    code, said = rules("check", "rules", "rules.yml")
    assert code == 0, said
    code, said = rules("test", "rules", "alerts.yaml")
    assert code == 0, said
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert len(alerts) == 4 and all(f"alertname: {name}" in (PAGES / "alerts.yaml").read_text() for name in alerts)


MUTATIONS = [
    ("for: 30m", "for: 25m"),
    ("for: 30m", "for: 35m"),
    ("< 0.02", "< 0"),
    (r'{priority_class=~"gpuml-prod.*"} > 900', "> 900"),
    ("> 900", "> 850"),
    ("> 900", "> 1100"),
    ("> 3\n", "> 2\n"),
    ("> 3\n", "> 4\n"),
    ("gpuml:pod:info[1h]", "gpuml:pod:info[5m]"),
    ("kube_pod_created[1h]", "kube_pod_created[5m]"),
    ("time() - 3600", "time() - 86400"),
    ('{condition="true"}', ""),
    ('{label_gpuml_io_owner!=""}', '{label_gpuml_io_owner=""}'),
    ('{namespace=~"gpuml-.+"}', '{namespace=~".+"}'),
    ('or kube_pod_labels{namespace=~"gpuml-.+"}', 'or kube_pod_labels{namespace="no"}'),
    ('"label_gpuml_io_run", "(.+)"', '"label_gpuml_io_run", "(.*)"'),
    ("DCGM_FI_PROF_GR_ENGINE_ACTIVE or ", ""),
    ('"pod", "$1", "exported_pod", "(.+)"), "namespace"', '"pod", "$1", "no", "(.+)"), "namespace"'),
    ("unless on (namespace, pod) kube_pod_info", "unless on (namespace, pod) no_pod_info"),
    ("nvidia_com_.+", "nvidia_com_gpu"),
]


@needs_prometheus
@pytest.mark.parametrize("change", MUTATIONS, ids=lambda c: f"{c[0].strip()} -> {c[1].strip()}"[:60])
def test_cases_notice_a_change_of_the_rules(rules, change):
    assert rules("test", "rules", "alerts.yaml", change=change)[0] != 0


# ---- the dashboard


@pytest.fixture(scope="module")
def prometheus(job, tmp_path_factory):
    "Prometheus over the exporters' pages, and the last page of the job's training"
    count, created = itertools.count(3), f"{time.time() - 1800:.0f}"
    trained = [page for page in job[1] if 'phase="training"' in page and "gpuml_validation_loss{" in page][-1]

    def page(text):
        return lambda: (TEXT, text.replace("CREATED", created).replace("COUNT", str(next(count))))

    pages = {f"/{path.stem}": page(path.read_text()) for path in PAGES.glob("*.prom")}
    pages["/job"] = lambda: (OPENMETRICS, trained)
    labels = dict.fromkeys(pages, {})
    labels["/job"] = {"namespace": "gpuml-prod", "pod": "prod-0f2a9c11d4-1-x7k2p"}  # as a PodMonitor adds them
    with exporter(pages) as target, Prometheus(tmp_path_factory.mktemp("prometheus")).look_at(target, labels) as server:
        server.created = float(created)
        yield server


def board() -> dict:
    return json.loads((MONITORING / "gpuml.json").read_text())


def panels() -> list[dict]:
    return board()["panels"]


@needs_prometheus
def test_every_panel_finds_data(prometheus):
    queries = {(p["title"], t["expr"].replace("$namespace", ".*")) for p in panels() for t in p["targets"]}
    assert len(queries) > 15

    def look():
        found = {query: prometheus.ask(query=query[1]) for query in queries}
        return {
            title: {tuple(r["metric"].values()): float(r["value"][1]) for r in data}
            for (title, _), data in found.items()
        }

    expected = {
        "GPUs of the cluster": {(): 2},
        "GPUs held": {("gpuml-prod",): 1, ("gpuml-dev",): 1},
        "GPUs held and idle": {(): 1},
        "GPU utilisation by job": {("prod-0f2a9c11d4-1",): 0.961, ("dev-91be02aa17-1",): 0},
        "Queue length by class": {("gpuml-dev",): 1, ("gpuml-prod",): 0},
        "Failed jobs": {("gpuml-prod",): 1, ("gpuml-dev",): 0},
    }

    def agreeing():
        "All that is shown, once it agrees: the rules build on each other, and a page that comes late has no values"
        shown = look()
        agrees = all(shown.values()) and expected.items() <= shown.items() and len(shown["Jobs"]) == 3
        return agrees and shown

    shown = until(agreeing, pause=0.5)
    assert shown["GPU memory by job"][("prod-0f2a9c11d4-1",)] == 31250 * 2**20
    assert 0.5 <= shown["Longest wait by class"][("gpuml-dev",)] <= (time.time() - prometheus.created) / 3600
    assert 0 < shown["Training done"][("dev-1",)] <= 1


@needs_prometheus
def test_panels_keep_to_the_namespaces_that_are_chosen(prometheus):
    expr = next(t["expr"] for p in panels() if p["title"] == "GPUs held" for t in p["targets"])
    found = until(lambda: prometheus.ask(query=expr.replace("$namespace", "gpuml-dev")), pause=0.5)
    assert [r["metric"] for r in found] == [{"priority_class": "gpuml-dev"}]


END = datetime(2026, 11, 24, 15, tzinfo=UTC).timestamp()
START = END - 60 * scenario.MINUTES


@pytest.fixture(scope="module")
def scenario_asked(tmp_path_factory):
    "Prometheus over the scenario, with the rules evaluated every 15 seconds: what asks it"
    home = tmp_path_factory.mktemp("scenario")
    (home / "page").write_text(scenario.page(END))
    server = Prometheus(home, "--query.lookback-delta=59999ms")  # what was not said this minute is over

    def fill(*arguments):
        command = ["promtool", "tsdb", "create-blocks-from", *arguments]
        subprocess.run(command, cwd=home, check=True, capture_output=True)

    fill("openmetrics", "page", "data")
    for _ in range(3):  # each time over what the times before have recorded: a rule may build on two others
        with server:
            times = [f"--start={START:.0f}", f"--end={END:.0f}", "--eval-interval=15s"]
            fill("rules", f"--url={server.url}", *times, "--output-dir=data", "rules.yml")
    with server:
        yield server.ask


@pytest.fixture(scope="module")
def drawn(scenario_asked):
    "What each panel draws of the scenario: title → [(name in the legend, labels, [(time, value), …]), …]"
    chosen = chosen_namespaces(scenario_asked)
    return {p["title"]: picture.series(p, scenario_asked, START, END, chosen) for p in panels()}


def chosen_namespaces(ask) -> str:
    "What $namespace is when all are chosen"
    variable = next(v for v in board()["templating"]["list"] if v["name"] == "namespace")
    metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]["query"]).groups()
    found = ask(query=f"group by ({label}) (last_over_time({metric}[{scenario.MINUTES}m]))", time=END)
    return variable.get("allValue") or "|".join(sorted(r["metric"][label] for r in found))


def minutes(found: list, name: str) -> dict[int, float]:
    "Minute of the scenario → value of the series with this name"
    return {round((t - START) / 60): v for each, _, points in found if each == name for t, v in points}


@needs_prometheus
def test_every_panel_draws_the_scenario(drawn):
    assert not [title for title, found in drawn.items() if not any(v for *_, points in found for _, v in points)]
    assert all(name for title, found in drawn.items() if title != "Jobs" for name, *_ in found)


@needs_prometheus
def test_what_the_panels_say_of_the_scenario(drawn):
    "Who holds what, what waits, what was interrupted; and nothing of other teams, or of what is over"
    now = {title: {name: points[-1][1] for name, _, points in found} for title, found in drawn.items()}
    assert now["GPUs held"] == {"gpuml-dev": 6, "gpuml-prod": 2} and now["GPUs held and idle"] == {"idle": 1}
    jobs = {labels["run"]: (labels["phase"], points[0][1]) for _, labels, points in drawn["Jobs"]}
    assert len(jobs) == 7 and jobs["prod-77aa01c3d9-1"] == ("Running", 2) and jobs["dev-b9186fe2a0-1"] == ("Pending", 1)
    queue = minutes(drawn["Queue length by class"], "gpuml-dev")
    assert (max(queue.values()), queue[200], queue[240]) == (4, 0, 1) and len(queue) >= scenario.MINUTES
    assert minutes(drawn["Starts by job"], "dev-c47d19a5b3-1")[100] == 2
    assert max(minutes(drawn["Starts by job"], "dev-3b8e61f0c2-1")) < 30  # it began 40 minutes before
    assert minutes(drawn["Failed jobs"], "gpuml-dev")[100] == 0 and now["Failed jobs"] == {
        "gpuml-dev": 1,
        "gpuml-prod": 0,
    }
    assert max(minutes(drawn["Examples per second"], "dev-5e02f7b961-1")) < 125  # it has nothing to do from then on
    assert now["GPU utilisation by job"]["dev-5e02f7b961-1"] == 0


def test_numbers_look_as_what_they_are():
    "Counts have no decimals, and no count is red because a cluster is large, as Grafana's own threshold says from 80"
    for panel in panels():
        config, counts = panel["fieldConfig"]["defaults"], panel["targets"][0]["expr"].startswith("count")
        assert panel["type"] != "stat" or config["thresholds"]["steps"]
        assert not (panel["type"] == "timeseries" and counts) or config["decimals"] == config["min"] == 0


@needs_prometheus
def test_picture(scenario_asked, tmp_path):
    "Each panel is in it; where pictures are asked for, it is taken"
    html = picture.dashboard(board(), scenario_asked, START, END, chosen_namespaces(scenario_asked))
    assert html.count("<section") == len(panels()) and "No data" not in html
    if not (CHROMIUM and "GPUML_PICTURES" in os.environ):
        return
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": picture.WIDTH, "height": 800}, device_scale_factor=1.5)
        page.set_content(html)
        page.screenshot(path=tmp_path / "dashboard.png", full_page=True)
        browser.close()
    folder = Path(os.environ["GPUML_PICTURES"])
    folder.mkdir(parents=True, exist_ok=True)
    taken = Image.open(tmp_path / "dashboard.png").convert("RGB")
    taken.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(folder / "dashboard.png", optimize=True)


# ---- the manifests


def test_pods_of_jobs_are_selected():
    "PodMonitor and NetworkPolicies name the labels and the port that a job's manifest has"
    from tests.test_job import made

    template = made("compute.metrics_port=9464")["spec"]["template"]
    labels, (port,) = template["metadata"]["labels"], template["spec"]["containers"][0]["ports"]
    yaml = YAML(typ="safe")
    found = [yaml.load(MONITORING / name) for name in ("podmonitor.yaml", "rules.yaml")]
    assert [m["metadata"]["labels"] for m in found] == [
        {"release": "kube-prometheus-stack"}
    ] * 2  # the chart's selector
    monitor = found[0]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    policies = list(yaml.load_all(MONITORING / "network.yaml"))
    for line in (
        "gpuml_loss",
        "gpuml_examples_per_second",
        "DCGM_FI_DEV_GPU_UTIL",
        "gpuml:gpu:utilization",
        "kube_pod_info",
    ):
        kept = all(re.fullmatch(r["regex"], line) for r in endpoint["metricRelabelings"] if r["action"] == "keep")
        assert kept is line.startswith("gpuml_")  # a job's author can't speak for the exporters
    assert {p["metadata"]["namespace"] for p in policies} == set(monitor["namespaceSelector"]["matchNames"])
    for policy in policies:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        assert policy["spec"]["ingress"][0]["ports"] == [{"port": port["name"]}]


def test_values_of_the_chart():
    "kube-state-metrics says the labels that the rules read"
    values = YAML(typ="safe").load(MONITORING / "kube-prometheus-stack.values.yaml")
    (allowed,) = values["kube-state-metrics"]["metricLabelsAllowlist"]
    read = {f"gpuml.io/{name}" for name in re.findall(r"label_gpuml_io_(\w+)", RULES.read_text())}
    assert set(re.fullmatch(r"pods=\[(.*)\]", allowed)[1].split(",")) == read


def test_kustomize_renders_them():
    kubectl = shutil.which("kubectl", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if not kubectl:
        pytest.skip("no kubectl: install it to render k8s/monitoring")
    done = subprocess.run([kubectl, "kustomize", MONITORING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = list(YAML(typ="safe").load_all(done.stdout))
    kinds = sorted(m["kind"] for m in made)
    assert kinds == ["ConfigMap", "NetworkPolicy", "NetworkPolicy", "PodMonitor", "PrometheusRule"]
    carrier = next(m for m in made if m["kind"] == "ConfigMap")
    assert carrier["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(carrier["data"]["gpuml.json"])["title"] == "gpuml"
