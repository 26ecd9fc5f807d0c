"""Training speed on one GPU, against HuggingFace's Trainer in the same run, and a whole `gpuml train` on it.

    python benchmarks/gpu.py [--limit 240] [--results FOLDER]     about 4 minutes on an H100 or H200
    python benchmarks/gpu.py --tiny                               its whole logic on the CPU, in under a minute

Two shapes with random weights, DistilBERT-base's and ModernBERT-base's, on R8 cut at 128 tokens, at batches of 8, 32, 128 and 512:
  default          Trainer's defaults (float32, dynamic padding) at that batch
  group_by_length  Trainer with bf16 and batches of similar length
  gpuml            updates as `gpuml train` makes them, with equal bits each time
  gpuml:any        the same with train.deterministic=false: what equal bits cost
All arms run in one process after the other, each for some seconds once it is warm. The table has the milliseconds of an
update, real (not padding) tokens a second, the share of the matrix peak that the same process measured, and gpuml's rate over
the others'. Before that, `gpuml train` on R8 as reuters.yaml has it (MiniLM, 256 tokens, 3 epochs): test accuracy, seconds of
training, seconds from the command to its first update, and the GPU's utilisation between the first update and the last.
Writes what it has to results/DEVICE.json after each arm: one that fails, hangs or finds no time left loses no other.
Needs no network where MiniLM's package and R8 are there: see gpu.sh.
"""

import argparse
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES = ("distilbert", "modernbert")
ARMS = ("gpuml", "default", "group_by_length", "gpuml:any")  # what is wanted most comes first, while there is time
BATCHES, TINY_BATCHES = (8, 32, 128, 512), (4,)
PATIENCE = 60.0  # seconds that a process may say nothing, in its imports or in one arm
TRAINING = 75.0  # seconds of the limit that `gpuml train` gets


def devices() -> list[str]:
    "The names of this machine's GPUs"
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    return []


def versions() -> dict[str, str]:
    "Of what computes"
    return {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}


def environment() -> dict[str, str]:
    "The environment of what is measured"
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # Trainer would take all
    always = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": first}
    return {**os.environ, **always, "PYTHONPATH": path}


class Broken(Exception):
    "How a process ended that did not end well"


@dataclass(frozen=True)
class Time:
    "How long processes may take"

    deadline: float  # of the monotonic clock
    patience: float = PATIENCE  # seconds without a word

    @property
    def left(self) -> float:
        "Seconds until the deadline"
        return self.deadline - time.monotonic()


def lines_of(command: list[str], limit: Time, **options: Any) -> Iterator[str]:
    "The lines that a process prints; raises `Broken`, also where it is silent or its time is over"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(),
        start_new_session=True,
        **options,
    )
    lines = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while line := lines.get(timeout=max(0.1, min(limit.patience, limit.left))):
            yield line
        process.wait(limit.patience)
    except (queue.Empty, subprocess.TimeoutExpired):
        raise Broken("no time was left" if limit.left <= 0 else f"silent for {limit.patience:.0f} s") from None
    finally:
        with suppress(ProcessLookupError):  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that a GPU holds is left behind
            process.wait(10)
    if process.returncode:
        raise Broken(f"ended its process with {process.returncode}")


def measured(names: list[str], limit: Time, command: list[str]) -> Iterator[dict[str, Any]]:
    "What gpu_arms.py says of each arm; where one breaks its process, the others get a new one"
    left = list(names)
    while left and limit.left > 0:
        before = len(left)
        try:
            for line in lines_of([*command, *left], limit):
                if not line.startswith("{"):
                    print(line.rstrip(), flush=True)
                    continue
                result = json.loads(line)
                left.remove(result["arm"])
                yield result
            problem = "" if len(left) < before else "not measured"
        except Broken as e:
            problem = str(e)
        if left and problem:
            yield {"arm": left.pop(0), "error": problem}
    for name in left:
        yield {"arm": name, "error": "no time was left"}


class Utilisation:
    "How busy the first GPU is, again and again, until it is asked"

    def __init__(self, gpu: bool, interval: float = 0.05):
        self.samples: list[tuple[float, int]] = []  # seconds since 1970, per cent
        self._over = threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if gpu:
            self._thread.start()

    def _sample(self) -> None:
        import pynvml

        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._over.wait(self._interval):
            with suppress(pynvml.NVMLError):
                self.samples.append((time.time(), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))

    def end(self) -> None:
        "Ask no more"
        self._over.set()

    def between(self, first: float, last: float) -> float | None:
        "The mean of that time, per cent; none where nothing was measured"
        values = [percent for moment, percent in self.samples if first <= moment <= last]
        return statistics.mean(values) if values else None


def train_whole(gpu: bool, limit: Time, output: Path, overrides: list[str]) -> dict[str, Any]:
    "`gpuml train` on R8 from the command to its end, in a process of its own"
    places = [
        f"output={output / 'runs'}",
        f"data.cache={output / 'cache'}",
        f"tracking.uri=sqlite:///{output}/mlflow.db",
    ]
    command = [sys.executable, "-m", "gpuml", "train", str(HERE / "reuters.yaml"), *places, *overrides]
    utilisation = Utilisation(gpu)
    started = time.time()
    printed = []  # seconds since the command, and a line
    try:
        for line in lines_of(command, limit, stderr=subprocess.STDOUT):
            printed.append(f"{time.time() - started:6.2f} {line.rstrip()}")
        ended = time.time()
        (metrics,) = output.glob("runs/*/metrics.json")
        scores = json.loads(metrics.read_text())
        spool = metrics.with_name("metrics.jsonl").read_text().splitlines()
        moments = [moment / 1000 for moment, _, kind, _ in map(json.loads, spool) if kind == "update"]
        return {
            "accuracy": scores["accuracy"],
            "updates": scores["updates"],
            "training_seconds": scores["seconds"],
            "first_update_seconds": moments[0] - started,
            "total_seconds": ended - started,
            "utilisation_percent": utilisation.between(moments[0], moments[-1]),
            "notes": scores["notes"],
            "printed": printed,
        }
    except Exception as e:  # the arms are measured all the same
        return {"error": f"{type(e).__name__}: {e}", "printed": printed}
    finally:
        utilisation.end()


def rate(table: dict[str, dict[str, Any]], *name: str) -> float:
    "Tokens a second of an arm, not a number where it was not measured"
    return table.get("/".join(name), {}).get("tokens_per_second", float("nan"))


def row(table: dict[str, dict[str, Any]], shape: str, batch: str, arm: str) -> str:
    "An arm's line in the table"
    result = table.get(f"{shape}/{batch}/{arm}", {"error": "not measured"})
    if "error" in result:
        return f"{batch:>5} {arm:<16} {result['error'].splitlines()[-1][:100]}"
    ratio = rate(table, shape, batch, "gpuml") / rate(table, shape, batch, arm)
    times = "–" if math.isnan(ratio) else f"{ratio:.2f}x"
    speed = f"{result['ms']:9.1f} {result['tokens_per_second']:13,.0f} {100 * result['share']:7.1f}%"
    return f"{batch:>5} {arm:<16} {speed} {times:>15} {result['memory_gb']:6.1f}  {result['how']}"


def table_lines(arms: list[dict[str, Any]]) -> list[str]:
    "What is printed of the arms, by shape and batch; and their notes, each once"
    table = {result["arm"]: result for result in arms}
    names = [name.split("/") for name in table]
    lines = [
        f"{'batch':>5} {'arm':<16} {'ms/update':>9} {'real tokens/s':>13} {'of peak':>8} {'gpuml over it':>15} {'GB':>6}"
    ]
    for shape in SHAPES:
        batches = sorted({int(batch) for of, batch, _ in names if of == shape})
        lines += [shape, *(row(table, shape, str(batch), arm) for batch in batches for arm in ARMS)]
    notes = {}
    for result in arms:
        for note in result.get("notes", ()):
            notes.setdefault(note[:300], []).append(result["arm"])
    return [*lines, *(f"note of {', '.join(where[:4])} ({len(where)} in all): {note}" for note, where in notes.items())]


def training_lines(training: dict[str, Any]) -> list[str]:
    "What is printed of a whole training"
    if "error" in training:
        return [f"gpuml train, R8: {training['error']}", *(line[:200] for line in training["printed"][-15:])]
    busy = training["utilisation_percent"]
    return [
        f"gpuml train, R8: test accuracy {training['accuracy']:.4f} after {training['training_seconds']:.1f} s of training",
        f"  {training['updates']:,} updates; first update {training['first_update_seconds']:.1f} s after the command, end after {training['total_seconds']:.1f} s",
        f"  utilisation between the first update and the last: {'not measured' if busy is None else f'{busy:.0f} %'}",
        *(f"  note: {note}" for note in training["notes"]),
    ]


def tiny_overrides(folder: Path) -> list[str]:
    "What makes a training of some seconds on a CPU"
    words = ["crude", "grain", "ship", "trade", "corn", "oil", "wheat", "port"]
    lines = [f"{words[i % 8]} {words[i % 5]} {i},{'ab'[i % 2]}" for i in range(32)]
    file = folder / "tiny.csv"
    file.write_text("text,label\n" + "\n".join(lines))
    data = [f"data.train={file}", f"data.validation={file}", "data.max_length=16"]
    return [*data, "train.epochs=1", "train.batch_size=8"]


def file_name(device: str) -> str:
    "A device's name in those of files"
    return "-".join(device.lower().split())


def write(folder: Path, results: dict[str, Any]) -> Path:
    "Write the results to a file with the device's name"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{file_name(results['device'])}.json"
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def measure_all(given: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    "Run everything within the limit, and say how far it is; all results so far, again and again"
    begin = time.monotonic()
    limit = Time(begin + given.limit, given.limit if given.tiny else PATIENCE)
    facts = {"device": device, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        overrides = tiny_overrides(Path(folder)) if given.tiny else []
        own = limit if given.tiny else Time(begin + min(given.limit, TRAINING))
        training = train_whole(not given.tiny, own, Path(folder), overrides)
    print("\n".join(training_lines(training)), flush=True)
    results = {**facts, "training": training, "arms": []}
    yield results
    batches = TINY_BATCHES if given.tiny else BATCHES
    options = ["--tiny", "--seconds", "0.1"] if given.tiny else ["--seconds", str(given.seconds)]
    names = [f"{shape}/{batch}/{arm}" for shape in SHAPES for arm in ARMS for batch in batches]
    for result in measured(names, limit, [sys.executable, str(HERE / "gpu_arms.py"), *options]):
        results["arms"].append(result)
        if limit.left > 0:
            figure = result.get("error") or f"{result['ms']:.1f} ms"
            print(f"{limit.left:5.0f} s left  {result['arm']}: {figure}", flush=True)
        yield results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=2.5, help="that an arm is measured")
    parser.add_argument("--results", type=Path, help="folder; benchmarks/results by default")
    parser.add_argument("--tiny", action="store_true", help="try the script on the CPU")
    given = parser.parse_args()
    names = devices()
    if not names and not given.tiny:
        print("this machine has no GPU: nothing is measured; --tiny tries the script on the CPU")
        return
    if given.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = "tiny" if given.tiny else names[0]
    started = time.monotonic()
    for results in measure_all(given, device):
        if given.results or not given.tiny:
            write(given.results or HERE / "results", results)
    print("\n".join([*training_lines(results["training"]), *table_lines(results["arms"])]))
    print(f"{device}: {len(results['arms'])} arms in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
