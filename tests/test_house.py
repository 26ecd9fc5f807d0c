"The rules of the house: light imports, one direction, generated files in step with their sources"

import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from gpuml.base.errors import Exit
from tests.conftest import ROOT, gpuml
from tests.house import WINGS, counts, module_offenders, new_offenders, page_offenders

PAGES = [p for wing in WINGS for p in sorted((ROOT / "nbs" / wing).glob("*.ipynb"))]
MODULES = {f"{p.parent.name}.{re.sub(r'^[0-9]+_', '', p.stem)}": p for p in PAGES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {
    "torch",
    "fastapi",
    "uvicorn",
    "transformers",
    "mlflow",
    "kubernetes",
    "papermill",
    "nbclient",
    "nbformat",
    "jupyter_client",
    "s3fs",
    "pandas",
    "pyarrow",
    "matplotlib",
    "sklearn",
}


# Rooms whose subject is a heavy package: others import them inside a function
HEAVY_ROOMS = {
    "base.s3_errors",
    "base.s3_connection",
    "base.s3_requests",
    "base.s3_read",
    "base.s3_write",
    "cluster.api",
    "jobs.engine",
    "training.attention",
    "training.bounds",
    "training.desk",
    "training.deterministic",
    "training.epochs",
    "training.evaluation",
    "training.loss",
    "training.mlflow_page",
    "training.own_model",
    "training.forward",
    "training.hardware",
    "training.head",
    "training.hub",
    "training.ahead",
    "training.alone",
    "training.descent",
    "training.graph",
    "training.graph_trial",
    "training.inference",
    "training.host_copy",
    "training.learner",
    "training.outcomes",
    "training.replay",
    "training.row",
    "training.row_model",
    "training.shard",
    "training.slots",
    "training.loop",
    "training.memory",
    "training.onnx_file",
    "training.mlflow_model",
    "training.mlflow_run",
    "training.mlflow_sweep",
    "training.packing",
    "training.result_files",
    "training.saver",
    "training.snapshot",
    "training.training",
    "training.trial",
    "training.tune",
    "training.node_metrics",
    "training.world",
    "training.common_stop",
    "training.heartbeat",
    "training.member",
    "training.member_stop",
    "training.peers",
    "training.follow",
    "training.gradients",
    "training.hand_over",
    "training.shared_evaluation",
    "ui.web",
}


def imports(module):
    "Names of the gpuml modules that a module imports, at the top or inside functions: `wing.room`"
    file = ROOT / "gpuml" / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            home = ["gpuml", *module.split(".")][: -node.level]
            parent = ".".join([*home, *filter(None, [node.module])])
            names = [f"{parent}.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent, names = node.module, [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            parent, names = None, [a.name for a in node.names]
        else:
            continue
        for name in filter(None, [parent, *names]):
            if (room := name.removeprefix("gpuml.")) in MODULES and name.startswith("gpuml."):
                yield room
        if parent == "gpuml":
            assert all(a.name in ("__version__", "train") for a in node.names), f"{module}:{node.lineno}"


def test_every_module_has_a_page_in_its_wing():
    modules = {".".join(p.relative_to(ROOT / "gpuml").with_suffix("").parts) for p in (ROOT / "gpuml").rglob("*.py")}
    assert modules - set(MODULES) == {
        "__init__",
        "__main__",
        "_modidx",
        "train",
        *(f"{wing}.__init__" for wing in WINGS),
    }
    assert {p.name for p in (ROOT / "nbs").iterdir()} - {".ipynb_checkpoints"} >= {*WINGS, "index.ipynb", "train.ipynb"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_to_the_left_and_smaller_numbers(module):
    "base < data < training < jobs < cluster < ui, and in a wing the pages' numbers"
    order = list(MODULES)
    for other in imports(module):
        assert order.index(other) < order.index(module), f"{module} imports {other}"


@pytest.fixture(scope="module")
def heavy_imports():
    "By module, in their order: which heavy packages its import brings in; one process imports them all"
    code = f"""
import importlib, json, sys
brought, before = {{}}, set()
for module in {[m for m in MODULES if m not in HEAVY_ROOMS]!r}:
    importlib.import_module(f"gpuml.{{module}}")
    loaded = set(sys.modules) & {HEAVY!r}
    brought[module], before = sorted(loaded - before), loaded
print(json.dumps(brought))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", [m for m in MODULES if m not in HEAVY_ROOMS])
def test_heavy_packages_are_imported_where_they_are_used(module, heavy_imports):
    assert heavy_imports[module] == []


OFFENDERS = {
    "import across wings": "from gpuml.ui import cli",
    "vague name": "found = 1",
    "class made in a function": "def make():\n    class Made: ...",
    "private attribute of another": "config._root = None",
    "many assignments in a line": "a, b, c = 1, 2, 3",
    "long module": "a = 1\n" * 401,
    "long function": "def f():\n" + "    a = 1\n" * 40,
}


@pytest.mark.parametrize("rule", OFFENDERS)
def test_what_breaks_a_rule_is_seen(rule):
    (place,) = module_offenders("gpuml/base/place.py", OFFENDERS[rule])
    assert place.rule == rule and str(place).startswith("gpuml/base/place.py:")


def test_what_keeps_the_rules_passes():
    source = (
        "from gpuml.base import config\nself._root = None\na, b, c = triple\nclass A: ...\ndef f(names): return names"
    )
    assert not list(module_offenders("gpuml/data/place.py", source))
    assert not list(module_offenders("gpuml/train.py", "from gpuml.training import run"))


def test_cells_that_break_a_rule_are_seen():
    sources = ["#| export\nclass A: ...\nclass B: ...", "#| export\n" + "a = 1\n" * 61, "a = 1\n" * 61]
    page = json.dumps({"cells": [{"cell_type": "code", "source": [source]} for source in sources]})
    places = list(page_offenders("nbs/base/10_place.ipynb", page))
    assert [(place.rule, place.what) for place in places] == [
        ("second class in a cell", "B"),
        ("long cell", "61 lines"),
    ]


def test_offenders_may_move_but_not_become_more():
    one, two = (list(module_offenders(f"gpuml/base/{name}.py", "found = told = 1")) for name in ("one", "two"))
    assert new_offenders(two, counts(one)) == [] == new_offenders([], counts(one))
    assert new_offenders(one + two, counts(one)) == two


def test_load_ext_and_a_typo_import_nothing_heavy():
    code = f"""
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "gpuml")
print(*(set(sys.modules) & {HEAVY | {"pydantic", "rich", "ruamel"}!r}))
shell.run_cell("%gpu_train dev train.epoch=5")
shell.run_cell("%gpu_train?")
shell.Completer.complete(line_buffer="%gpu_train dev train.ep", cursor_pos=23)
print(*(set(sys.modules) & {HEAVY!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[0] == "" and lines[-1] == "", done.stdout
    assert "did you mean 'train.epochs'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_settings_ini_mirrors_pyproject():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    mirror, truth = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, nbdev = truth["project"], truth["tool"]["nbdev"]
    for key in ("lib_path", "nbs_path", "doc_path", "title", "branch", "tst_flags"):
        assert mirror[key] == nbdev[key], key
    assert mirror["allowed_cell_metadata_keys"].split() == nbdev["allowed_cell_metadata_keys"]
    assert mirror["lib_name"] == project["name"] and mirror["description"] == project["description"]
    assert mirror["min_python"] == project["requires-python"].lstrip(">=")
    assert mirror["keywords"].split() == project["keywords"]
    assert mirror["author"] == project["authors"][0]["name"]
    assert project["urls"]["Repository"].endswith(f"/{mirror['user']}/{mirror['repo']}")
    assert f'__version__ = "{mirror["version"]}"' in (ROOT / "gpuml" / "__init__.py").read_text()
    assert (ROOT / "settings.ini").read_text().startswith("# A mirror for nbdev 2")


def test_shipped_configs_are_valid_by_the_schema():
    import jsonschema
    from ruamel.yaml import YAML

    schema = json.loads((ROOT / "config" / "schema.json").read_text())
    for file in (ROOT / "config").glob("*.yaml"):
        jsonschema.Draft202012Validator(schema).validate(YAML(typ="safe", pure=True).load(file.read_text()))
    with pytest.raises(jsonschema.ValidationError, match="epoch"):
        jsonschema.validate({"data": {"train": "a"}, "train": {"epoch": 1}}, schema)


def test_prod_is_as_designed():
    from gpuml.base.loading import load

    prod = load("prod", start=ROOT)
    assert (prod.data.train, prod.tracking.uri, prod.output) == (
        "s3://datasets/large-dataset", "http://mlflow:5000", "s3://models/production",
    )  # fmt: skip


def test_dependencies_have_floors_and_constraints():
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    everything = PROJECT["dependencies"] + [d for extra in PROJECT["optional-dependencies"].values() for d in extra]
    for requirement in everything:
        name = re.match(r"[A-Za-z0-9.-]+", requirement)[0].lower()
        assert name == "gpuml" or (">=" in requirement and name.replace(".", "-") in pins), requirement


def excludes(requirements, package, version):
    "Whether one of a package's requirements rules that version of another out"
    parsed = [Requirement(text) for text in requirements]
    return any(r.name == package and not r.specifier.contains(version) for r in parsed if not r.marker)


def test_the_cap_of_kubernetes_is_still_needed():
    "37.0.2 wants python-dateutil 3; what s3fs stands on holds it below"
    capped = any("kubernetes" in text and "<37.0.2" in text for text in PROJECT["dependencies"])
    holding = [name for name in ("botocore", "aiobotocore") if excludes(requires(name), "python-dateutil", "3.0.0")]
    assert holding or not capped, (
        "botocore and aiobotocore take python-dateutil 3 by now: the cap kubernetes<37.0.2 in pyproject.toml, and its "
        "comment, can go"
    )
    assert excludes(["python-dateutil (<3.0.0,>=2.1)"], "python-dateutil", "3.0.0")
    assert not excludes(["python-dateutil>=2.1", "urllib3<3"], "python-dateutil", "3.0.0")


def test_wheel_lays_down_a_project(tmp_path):
    "The wheel carries what `gpuml init` copies"
    from gpuml.ui.project import project_files

    subprocess.run([sys.executable, "-m", "uv", "build", "-q", "--wheel", "-o", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"gpuml/project/{name}" for name in project_files()} | {"gpuml/ui/panel.css"} <= inside


def test_init(tmp_path):
    done = gpuml("init", cwd=tmp_path)
    assert done.returncode == 0 and "gpuml train" in done.stdout
    assert (tmp_path / "nbs" / "train.ipynb").is_file() and (tmp_path / "config" / "dev.yaml").is_file()
    again = gpuml("init", cwd=tmp_path)
    assert (
        again.returncode == Exit.NOT_WRITTEN
        and "overwrites nothing" in again.stderr
        and "Traceback" not in again.stderr
    )


def test_the_offline_encoder_is_named_with_what_suits_it(tmp_path):
    "By `gpuml init --offline`, `make demo`, the shipped config's remark and the README: with another's learning rate it learns little"
    from gpuml.base.keys import flat
    from gpuml.base.loading import load
    from gpuml.training.package import OFFLINE, OFFLINE_LINE

    done = gpuml("init", "--offline", cwd=tmp_path)
    assert done.returncode == 0 and "model hub" not in done.stdout, done.stderr
    for name in ("dev", "prod"):
        shipped, laid = flat(load(name, start=ROOT)), flat(load(name, start=tmp_path))
        assert {key: laid[key] for key in laid if laid[key] != shipped[key]} == {
            "model.name": OFFLINE,
            "train.learning_rate": 4e-4,
        }
    for file in ("Makefile", "config/dev.yaml", "README.md"):
        assert OFFLINE_LINE in (ROOT / file).read_text(), file


def test_parameters_tag_survives_cleaning(tmp_path):
    "Without it papermill injects at the top, the defaults win, and production trains with dev settings"
    (tmp_path / "nbs").mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    copy = tmp_path / "nbs" / "train.ipynb"
    copy.write_text((ROOT / "nbs" / "train.ipynb").read_text())
    subprocess.run([f"{sys.prefix}/bin/nbdev-clean"], cwd=tmp_path, check=True)
    tagged = [c for c in json.loads(copy.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and "".join(tagged[0]["source"]) == 'config = "dev"'


@pytest.mark.parametrize(
    ("pattern", "rooms"),
    [
        (r"\bis_s3\b|[\"']s3://[\"']", r"base\.\w+"),  # others have a place
        (r"\bpsutil\b", r"base\.process"),
        (r"\bfcntl\b|\bFileLock\b", r"base\.lock"),
    ],
)
def test_one_place_knows_s3_processes_and_locks(pattern, rooms):
    asking = [m for m in MODULES if re.search(pattern, (ROOT / "gpuml" / f"{m.replace('.', '/')}.py").read_text())]
    assert asking and [module for module in asking if not re.fullmatch(rooms, module)] == []


def test_one_place_writes_csv_and_internal_patterns_begin_behind_a_folder():
    "A bare `\\r` needs quotes that Python's writer gives from 3.11.9 on only; a folder's name is no pattern"
    for module in MODULES:
        text = (ROOT / "gpuml" / f"{module.replace('.', '/')}.py").read_text()
        assert text.count("csv.writer(") + text.count("csv.DictWriter(") == (module == "base.files"), module
        assert not re.search(r"storage\.find\(f\"[^\"]*[*?]|\)\.find\(f\"[^\"]*[*?]", text), module
        assert "sqlite:///{" not in text.replace('return f"sqlite:///{str(path)', ""), module
