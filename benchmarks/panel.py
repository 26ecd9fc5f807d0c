"""What the panel costs.

    python benchmarks/panel.py

In a fresh kernel, from running `%gpuml` to its widget (target: 500 ms, torch not imported). In a small project on the
offline encoder: the share of training time that keeping its progress in a file takes (target: 1 %), what the panel
sends while it trains (target: 4 updates a second of 2 kB), and the CPU time that drawing them takes in the kernel. Then the
tab with 500 jobs of this machine (target: 1 s), and what a panel that was opened and closed 100 times leaves: widgets,
threads, memory.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"


def make_project(folder: Path) -> None:
    "A small project with the offline encoder"
    from tests.conftest import CONFIG, OFFLINE, free_port, rows

    for name in ("config", "data"):
        (folder / name).mkdir()
    (folder / "config" / "dev.yaml").write_text(CONFIG.format(cache=folder / "cache", model=OFFLINE, port=free_port()))
    lines = "".join(f"{text},{label}\n" for text, label in rows(200))
    (folder / "data" / "a.csv").write_text(f"text,label\n{lines}")
    os.chdir(folder)


def on_screen() -> tuple[float, str]:
    "Milliseconds from the cell to its widget in a fresh kernel, and the heavy packages that it has imported"
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute("%load_ext gpuml", reply=True, timeout=60)
        begun, shown, printed = time.perf_counter(), 0.0, ""
        client.execute("%gpuml")
        while not shown:
            message = client.get_iopub_msg(timeout=60)
            if "application/vnd.jupyter.widget-view+json" in message["content"].get("data", {}):
                shown = time.perf_counter() - begun
        client.execute("import sys; print(*{'torch', 'transformers', 'mlflow', 'kubernetes'} & set(sys.modules))")
        while not printed:
            message = client.get_iopub_msg(timeout=60)
            printed = message["content"].get("text", "") if message["msg_type"] == "stream" else ""
        return shown * 1000, printed.strip()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def while_training() -> dict[str, float]:
    "What the panel sends while it trains, and what drawing that costs here"
    from gpuml.ui.panel import panel
    from gpuml.ui.panel_train import training_html

    opened, sent, seconds = panel(), [], []
    tab = opened.tabs["Train"]
    tab.form.fields.inputs["train.epochs"].value = 12
    tab.view.observe(lambda change: sent.append((time.monotonic(), len(change.new.encode()))), "value")
    tab.start.click()
    while tab.training.alive():
        begun = time.thread_time()
        training_html(tab.training)
        seconds.append(time.thread_time() - begun)
        time.sleep(0.2)
    opened.close()
    live = [n for _, n in sent[:-1]]  # the last one is the report
    spans = [sum(1 for u, _ in sent if t <= u < t + 1) for t, _ in sent]
    return {
        "most": max(spans),
        "bytes": max(live),
        "median": statistics.median(live),
        "draw": statistics.median(seconds),
    }


def in_training() -> tuple[float, float]:
    "Share of the training time that keeping the progress takes, and milliseconds each time"
    from gpuml.base.loading import load
    from gpuml.training.fit import fit
    from gpuml.ui.views import FileView

    view, spent = FileView(Path("progress.json").absolute()), []

    def timed(progress):
        begun = time.perf_counter()
        view(progress)
        spent.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    fit(load("dev", ["train.epochs=6"]), watch=timed)
    return sum(spent) / (time.perf_counter() - begun), statistics.median(spent) * 1000


def many_jobs(count: int = 500) -> float:
    "Seconds until the tab shows so many jobs"
    from gpuml.base.loading import load
    from gpuml.cluster.local import jobs_folder
    from gpuml.cluster.manifest import Source, manifest
    from gpuml.ui.panel import panel

    config = load("dev")
    for i in range(count):
        folder = jobs_folder(config) / f"dev-{i:010x}-1"
        folder.mkdir(parents=True)
        made = manifest(config, folder.name, Source("b" * 40, "bundle", "train.ipynb", "me"))
        (folder / "job.json").write_text(json.dumps(made))
        state = {
            "phase": "succeeded",
            "why": "",
            "attempts": [{"started": "2026-11-01T10:00:00+00:00", "exit_code": 0}],
        }
        (folder / "state.json").write_text(json.dumps(state))
    opened = panel()
    opened.tab.selected_index = 2
    tab = opened.tabs["Jobs"]
    while not tab.list.table.value:
        time.sleep(0.01)
    begun = time.perf_counter()
    tab.show_list()
    seconds = time.perf_counter() - begun
    opened.close()
    return seconds


def opened_and_closed(times: int = 100) -> tuple[int, int, float]:
    "Widgets, threads and megabytes that are left"
    import psutil
    from ipywidgets.widgets.widget import _instances

    from gpuml.ui.panel import panel

    def once():
        opened = panel()
        for tab in range(4):
            opened.tab.selected_index = tab
        opened.close()

    for _ in range(10):
        once()
    gc.collect()
    before = len(_instances), threading.active_count(), psutil.Process().memory_info().rss
    for _ in range(times):
        once()
    gc.collect()
    after = len(_instances), threading.active_count(), psutil.Process().memory_info().rss
    return after[0] - before[0], after[1] - before[1], (after[2] - before[2]) / 1e6


def main() -> None:
    "Measure, and print it as a table"
    with tempfile.TemporaryDirectory() as folder:
        make_project(Path(folder))
        shown = [on_screen() for _ in range(5)]
        heavy = ", ".join(sorted({names for _, names in shown} - {""})) or "no heavy package"
        print(f"%gpuml in a fresh kernel    {statistics.median(ms for ms, _ in shown):6.0f} ms   {heavy}")
        left = opened_and_closed()
        print(f"opened and closed 100 times  {left[0]} widgets, {left[1]} threads, {left[2]:.1f} MB more")
        print(f"a tab with 500 jobs         {many_jobs() * 1000:6.0f} ms")
        sent = while_training()
        print(
            f"updates while training       at most {sent['most']} a second, {sent['median']:.0f} bytes, at most {sent['bytes']}"
        )
        print(f"drawing them in the kernel   {sent['draw'] * 1000:.1f} ms each")
        share, each = in_training()
        print(f"keeping progress in a file   {share:.2%} of the training time, {each:.2f} ms each")


if __name__ == "__main__":
    main()
