"""The lessons of the pages: run once, their outputs stored in the notebooks or compared with what is stored there.

    python tests/lessons.py              runs all pages; exit code 1 where a lesson fails or a stored output is stale
    python tests/lessons.py --store      runs them, and stores the outputs
    python tests/lessons.py --tidy       runs nothing; takes from the stored outputs what belongs to one kernel only
    python tests/lessons.py PAGE ...     these pages only

Each page runs in a process of its own, two at a time; one whose process dies is named, and the others go on.
What is stored is the same whoever runs a lesson, and whenever: without counters, addresses, warnings and the state of
widgets. A lesson that shows times, random names or folders is stale at its next run: it has to show something else.
"""

import argparse
import difflib
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from execnb.shell import CaptureShell
from fastcore.nbio import write_nb
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.test import nb_test_cells

ROOT = Path(__file__).parent.parent
HIDDEN = {"export", "exporti", "exports", "hide", "default_exp"}
WIDGET = "application/vnd.jupyter.widget-"  # kinds of output that name an object of one kernel
SLOW = 5  # seconds of a page that is named for them


def pages() -> list[Path]:
    "All notebooks with lessons; `train.ipynb` is executed by the tests, in a real kernel"
    return [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def name_of(path: Path) -> str:
    "A page's name in messages"
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def shown(outputs: list[dict]) -> list[dict]:
    "What of a cell's outputs is the same in every kernel; warnings and progress are not"
    plain = [output for output in json.loads(json.dumps(outputs)) if output.get("name") != "stderr"]
    for output in plain:
        output["data"] = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith(WIDGET)}
        if output["output_type"] == "stream":
            del output["data"]
    return plain


class LessonFailed(Exception):
    "A traceback, with the cell"


def executed(path: Path) -> dict[str, list[dict]]:
    "Run a page as nbdev-test does; the outputs of its cells, by the cells' ids, of all that a reader sees"
    page = NBProcessor(path, rm_directives=False, process=True).nb
    to_run = {cell.id for cell in nb_test_cells(path, get_config().tst_flags.split())}
    shell = CaptureShell(path, profile=False)
    with working_directory(path.parent):
        try:
            shell.run_all(page, exc_stop=True, preproc=lambda cell: cell.id not in to_run, cell_timeout=600)
        except Exception:
            raise LessonFailed(shell.prettytb(fname=name_of(path))) from None
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    return {cell.id: [] if HIDDEN & set(cell.directives_) else shown(cell.outputs) for cell in code}


def local_names(outputs: list[dict]) -> list[str]:
    "What outputs name that is another on every machine, or at every run: the checkout, temporary folders, the host, today"
    names = [str(ROOT), str(Path.home()), tempfile.gettempdir() + "/", socket.gethostname(), time.strftime("%Y-%m-%d")]
    text = json.dumps(outputs)
    whole = {name: rf"(?<!\w){re.escape(name)}" + r"(?!\w)" * (name[-1:] != "/") for name in names if len(name) > 1}
    return [name for name, pattern in whole.items() if re.search(pattern, text)]


def difference(before: list[dict], after: list[dict]) -> str:
    "Two cells' outputs, for a person to compare"
    texts = [
        json.dumps(outputs, indent=1, ensure_ascii=False, sort_keys=True).splitlines() for outputs in (before, after)
    ]
    lines = list(difflib.unified_diff(*texts, "stored", "now", n=1, lineterm=""))
    return "\n".join(line[:200] for line in lines[:30])


class Outcome(NamedTuple):
    "How a page's run ended"

    seconds: float
    problem: str = ""


def store(page: dict[str, Any], outputs: dict[str, list[dict]]) -> None:
    "Put outputs, by the cells' ids, into a notebook, which keeps nothing of the kernel"
    for cell in page["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs[cell["id"]]
    page["metadata"].pop("widgets", None)
    clean_nb(page, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys)


def tidy(path: Path) -> None:
    "Take from a notebook's stored outputs what another kernel would not show"
    page = json.loads(path.read_text())
    store(page, {cell["id"]: shown(cell["outputs"]) for cell in page["cells"] if cell["cell_type"] == "code"})
    write_nb(page, path)


def stored_outputs(path: Path) -> dict[str, list[dict]]:
    "The outputs that a notebook keeps, by the cells' ids"
    return {cell["id"]: cell.get("outputs", []) for cell in json.loads(path.read_text())["cells"]}


def stale(path: Path) -> str:
    "Run a page; the cells that show something else than is stored"
    page = json.loads(path.read_text())
    before = stored_outputs(path)
    store(page, executed(path))
    changed = [cell for cell in page["cells"] if cell.get("outputs", []) != before[cell["id"]]]
    return "\n".join(f"cell {cell['id']}\n{difference(before[cell['id']], cell['outputs'])}" for cell in changed)


def renew(path: Path) -> str:
    "Run a page and store what it shows; the cells that show what is only here and now"
    page = json.loads(path.read_text())
    store(page, executed(path))
    write_nb(page, path)
    local = {cell["id"]: local_names(cell.get("outputs", [])) for cell in page["cells"]}
    return "\n".join(
        f"cell {cell} shows what is only here and now: {', '.join(names)}" for cell, names in local.items() if names
    )


def passes(path: Path) -> str:
    "Run a page; nothing is compared"
    executed(path)
    return ""


def report(work: Callable[[Path], str], path: Path, pipe: connection.Connection) -> None:
    "Do a page's work in its process, and send seconds and problem"
    started = time.monotonic()
    try:
        problem = work(path)
    except BaseException as error:  # the process is this page's alone
        problem = str(error) if isinstance(error, LessonFailed) else repr(error)
    pipe.send((time.monotonic() - started, problem))  # plain: a page's shell has a `__main__` of its own


def outcomes(work: Callable[[Path], str], paths: list[Path], workers: int) -> Iterator[tuple[Path, Outcome]]:
    "Each page, and how its run ended, as they end; of one whose process died, by which signal or code"
    fork = multiprocessing.get_context("fork")  # what the parent has imported is there
    waiting = sorted(paths, key=lambda path: path.parent.name != "training")  # pages with models take longest
    running = {}
    while waiting or running:
        while waiting and len(running) < workers:
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=report, args=(work, waiting[0], sender))
            process.start()
            sender.close()
            running[process.sentinel] = (waiting.pop(0), process, receiver, time.monotonic())
        ready = connection.wait([part for sentinel, (*_, pipe, _) in running.items() for part in (sentinel, pipe)])
        for path, process, receiver, started in [r for s, r in running.items() if s in ready or r[2] in ready]:
            try:
                outcome = Outcome(*receiver.recv())
            except EOFError:
                process.join()
                outcome = Outcome(time.monotonic() - started, f"its process died ({process.exitcode})")
            process.join()
            del running[process.sentinel]
            yield path, outcome


def prepare(paths: list[Path]) -> None:
    "What every page's process finds: the checkout, and what many pages import"
    os.environ.update(IN_TEST="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["OMP_NUM_THREADS"] = "1"  # micro-batches on a CPU, and so what is drawn for them, are cut by its threads
    sys.path[0] = str(ROOT)
    if len(paths) > 3:
        import mlflow  # noqa: F401
        import torch  # noqa: F401
        import transformers.models.bert.modeling_bert  # noqa: F401


def main() -> int:
    "Run the pages; the exit code"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--store", action="store_true", help="store what the lessons show")
    parser.add_argument("--tidy", action="store_true", help="run nothing, take out what belongs to one kernel")
    parser.add_argument("--workers", type=int, default=2, help="pages that run at a time")
    options = parser.parse_args()
    chosen = [path.resolve() for path in options.pages] or pages()
    os.chdir(ROOT)
    if options.tidy:
        for path in chosen:
            tidy(path)
        return 0
    prepare(chosen)
    # as long as no page keeps an output, there is nothing to compare with
    kept = any(outputs for path in chosen for outputs in stored_outputs(path).values())
    work = renew if options.store else stale if kept else passes
    ends = {}
    for path, outcome in outcomes(work, chosen, options.workers):
        ends[path] = outcome
        if outcome.problem:
            print(f"{name_of(path)}: {outcome.problem}\n", flush=True)
    for path, outcome in sorted(ends.items(), key=lambda end: -end[1].seconds):
        if outcome.seconds > SLOW:
            print(f"{outcome.seconds:6.1f} s  {name_of(path)}")
    failed = sum(bool(outcome.problem) for outcome in ends.values())
    print(f"{len(ends)} pages; with a lesson that fails, or shows something else than is stored: {failed}")
    if failed and not options.store:
        print("`make lessons` stores what the lessons show now")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
