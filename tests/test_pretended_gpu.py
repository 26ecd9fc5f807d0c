"""What Python does only on a GPU: recording and replaying, pinned memory and streams, losses that come late.

The GPU is pretended (see pretended_gpu.py), in a process of its own; the numbers are those of the CPU.
"""

import json
import subprocess

import pytest

from tests import forked

CODE = """
import json, sys
import numpy as np, torch
from tests import pretended_gpu
from tests.test_rows import CALM_MODEL, learner_of, trained, rows_of
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[sys.argv[1]]
expected, weights, _ = trained(learner_of("packed" if dtype else "padded", model=CALM_MODEL))
pretended_gpu.install()
from gpuml.training.tune import tune
from gpuml.training.world import World

def on_gpu(**model):
    learner = learner_of("auto", world=World(device=pretended_gpu.GPU), dtype=dtype, note=notes.append, model=model)
    return learner, tune(learner, rows_of())

notes = []
calm, tuned = on_gpu(**CALM_MODEL)
pretended_gpu.OnThisGpu.full += [torch.OutOfMemoryError("CUDA out of memory.")] * (2 * bool(dtype))
losses, changed, steps = trained(calm)
drawing, plain = on_gpu()[0], on_gpu()[0]
plain.unrecord()
drawn = [trained(learner)[1] for learner in (drawing, plain)]
graphs = calm.replay.rows._graphs.values() if calm.replay else ()
print(json.dumps({
    "losses": np.abs(losses / expected - 1).max(), "weights": float(np.abs(changed - weights).max()),
    "packed": tuned.choices.packed, "notes": tuned.notes + notes, "late": calm.late, "graphs": len(graphs),
    "replays": sum(graph._recording.replays for _, graph in graphs), "same draws": bool((drawn[0] == drawn[1]).all()),
    "settled": [step.update.number for step in steps if step.settled], "full": len(pretended_gpu.OnThisGpu.full),
    "streams": pretended_gpu.Stream.made,
}))
"""


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_updates_on_a_gpu_are_those_of_the_cpu(precision):
    done = subprocess.run([forked.python(), "-c", CODE, precision], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["losses"] < 1e-4 and found["weights"] < 1e-4
    assert (found["notes"], found["late"], found["settled"]) == ([], 16, [4, 8])
    packed = precision != "fp32"
    assert found["packed"] == packed and (found["replays"] >= 8) == packed and (found["graphs"] > 1) == packed
    assert found["streams"] <= 3  # the usual one, one for copies, one for recordings: no copy is ever recorded
    assert found["full"] == 0  # memory was full when two rows were made ready, and they were made ready again
    assert found["same draws"]  # a recording draws what Python draws
    assert "prototype" not in done.stderr  # what torch says of a mode that only gpuml chose


RUN = """
import json, sys
from tests import pretended_gpu
pretended_gpu.install()
from gpuml.base.errors import Preempted
from gpuml.base.loading import load
from gpuml.training.fit import fit
from tests.test_interrupt import OVERRIDES, result, stop_at
line = [*OVERRIDES, *sys.argv[1:]]
calm = fit(load("dev", [*line, "output=calm"]))
for number, moment in enumerate((2, "evaluating", 7)):
    try:
        fit(load("dev", line), watch=stop_at(moment), resume="latest" if number else None)
    except Preempted as e:
        pass
done = fit(load("dev", line), resume="latest")
print(json.dumps({
    "equal": result(done) == result(calm), "notes": done.metrics["notes"],
    "choices": json.loads((done.folder / "machine.json").read_text()),
}))
"""


@pytest.mark.parametrize("line", [[], ["train.precision=fp16"], ["train.rows=padded", "train.precision=fp32"]])
def test_a_run_that_is_stopped_comes_to_the_same(line, project):
    "Trials, graphs, evaluation in rows, and what later attempts take over from the first"
    command = [forked.python(), "-c", RUN, "model.dropout=0", *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] and not [note for note in found["notes"] if "no MLflow server" not in note]
    packed = "train.rows=padded" not in line
    assert (found["choices"]["packed"], found["choices"]["graphs"]) == (packed, packed)
    assert (found["choices"]["device"], found["choices"]["max_tokens"]) == ("Pretended", 65_536)


BROKEN = """
import json
import torch
from tests import pretended_gpu
pretended_gpu.install()
from gpuml.training.graph import Graphs
from gpuml.training.row import Row, Shape

def compute(row):
    if row.shape.tokens == 128 and torch.cuda.current_stream() is not usual:
        row.targets.sum().item()  # waits for the GPU
    return row.targets.sum()

usual, notes, streams = torch.cuda.current_stream(), [], pretended_gpu.Stream.made
graphs = Graphs(compute, pretended_gpu.GPU, notes.append)
rows = [Row(Shape(n, 2), torch.zeros(Shape(n, 2).bytes, dtype=torch.uint8)) for n in (64, 192, 128, 64)]
for value, row in enumerate(rows):
    row.targets[:] = value
values = [graphs.run(row).item() for row in rows]
torch.cuda.empty_cache()
print(json.dumps({
    "values": values, "graphs": len(graphs), "notes": notes, "is back": torch.cuda.current_stream() is usual,
    "streams": pretended_gpu.Stream.made - streams,
}))
"""


def test_a_recording_that_fails_leaves_the_others_as_they_were():
    done = subprocess.run([forked.python(), "-c", BROKEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["values"], found["graphs"], found["is back"], found["streams"]) == ([0, 2, 4, 6], 2, True, 1)
    assert len(found["notes"]) == 1 and "operation failed" in found["notes"][0]
