"The benchmark of training on a GPU, on the CPU with tiny shapes: all of its arms, and the whole training"

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_the_whole_table(tmp_path):
    pytest.importorskip("accelerate", reason="HuggingFace's Trainer needs accelerate: pip install 'gpuml[benchmarks]'")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
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
