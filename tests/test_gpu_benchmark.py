"The benchmark of training on a GPU, on the CPU with tiny shapes: all of its arms, and the whole training"

import json
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import Broken, Time, lines_of, measured
from tests.conftest import ROOT

ARMS = """
import json, os, sys
for arm in sys.argv[1:]:
    if arm == "dies":
        os._exit(3)
    print(json.dumps({"arm": arm}), flush=True)
    if arm == "leaves":
        break
"""


def test_an_arm_that_breaks_its_process_loses_no_other():
    names = ["leaves", "second", "dies", "last"]
    results = list(measured(names, Time(time.monotonic() + 600, 600), [sys.executable, "-c", ARMS]))
    assert results == [
        {"arm": "leaves"},
        {"arm": "second"},
        {"arm": "dies", "error": "ended its process with 3"},
        {"arm": "last"},
    ]
    assert [arm["error"] for arm in measured(names[:2], Time(time.monotonic()), ["none"])] == 2 * ["no time was left"]


def test_a_process_that_hangs_is_ended():
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(Broken, match="no time was left"):
        list(lines_of(hangs, Time(time.monotonic())))
    with pytest.raises(Broken, match="silent for 0 s"):
        list(lines_of(hangs, Time(time.monotonic() + 600, 0.1)))


def test_the_whole_table(tmp_path):
    pytest.importorskip("accelerate", reason="HuggingFace's Trainer needs accelerate: pip install 'gpuml[benchmarks]'")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--tiny",
        "--limit",
        "1200",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert [arm["arm"] for arm in results["arms"]] == [
        f"{shape}/4/{arm}"
        for shape in ("distilbert", "modernbert")
        for arm in ("gpuml", "default", "group_by_length", "gpuml:any")
    ]
    assert not [arm for arm in results["arms"] if "error" in arm]
    assert all(arm["tokens_per_second"] > 0 and arm["updates"] >= 3 for arm in results["arms"])
    assert results["training"]["updates"] == 4 and results["training"]["first_update_seconds"] > 0
    assert "gpuml train, R8: test accuracy" in done.stdout
