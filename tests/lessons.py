"""The lessons of the pages: run once, their outputs kept in the notebooks or compared with what is kept there.

    python tests/lessons.py              runs all pages; exit code 1 where a lesson fails or a stored output is stale
    python tests/lessons.py --store      the same, and stores the outputs
    python tests/lessons.py PAGE ...     these pages only

What is stored is the same whoever runs a lesson, and whenever: without counters, addresses and the state of widgets.
A lesson that shows times, random names or folders is stale at its next run: it has to show something else.
"""

import difflib
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

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
WORKERS = 2


def pages() -> list[Path]:
    "All notebooks with lessons; `train.ipynb` is executed by the tests, in a real kernel"
    return [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def shown(outputs: list[dict]) -> list[dict]:
    "What of a cell's outputs is the same in every kernel; warnings and progress are not"
    plain = [output for output in json.loads(json.dumps(outputs)) if output.get("name") != "stderr"]
    for output in plain:
        output["data"] = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith(WIDGET)}
        if output["output_type"] == "stream":
            del output["data"]
    return plain


def executed(path: Path) -> dict[str, list[dict]]:
    "Run a page as nbdev-test does; the outputs of its cells, by the cells' ids, of all that a reader sees"
    page = NBProcessor(path, rm_directives=False, process=True).nb
    to_run = {cell.id for cell in nb_test_cells(path, get_config().tst_flags.split())}
    shell = CaptureShell(path, profile=False)
    with working_directory(path.parent):
        shell.run_all(page, exc_stop=True, preproc=lambda cell: cell.id not in to_run, cell_timeout=600)
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    return {cell.id: [] if HIDDEN & set(cell.directives_) else shown(cell.outputs) for cell in code}


def local_names(outputs: list[dict]) -> list[str]:
    "What outputs name that is another on every machine, or at every run: the checkout, temporary folders, the host, today"
    names = [str(ROOT), str(Path.home()), tempfile.gettempdir() + "/", socket.gethostname(), time.strftime("%Y-%m-%d")]
    text = json.dumps(outputs)
    return [name for name in names if len(name) > 1 and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def difference(before: list[dict], after: list[dict]) -> str:
    "Two cells' outputs, for a person to compare"
    texts = [
        json.dumps(outputs, indent=1, ensure_ascii=False, sort_keys=True).splitlines() for outputs in (before, after)
    ]
    lines = list(difflib.unified_diff(*texts, "stored", "now", n=1, lineterm=""))
    return "\n".join(line[:200] for line in lines[:30])


def run(path: Path, store: bool) -> tuple[float, str]:
    "Run a page, and store what its lessons show or compare it with what is stored; seconds, and what is wrong"
    started = time.monotonic()
    try:
        outputs = executed(path)
    except BaseException as error:  # the process is this page's alone
        return time.monotonic() - started, f"{type(error).__name__}: {error}"
    page = json.loads(path.read_text())
    stored = {cell["id"]: cell.get("outputs", []) for cell in page["cells"]}
    for cell in page["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs[cell["id"]]
    clean_nb(page, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys)
    changed = [cell for cell in page["cells"] if cell.get("outputs", []) != stored[cell["id"]]]
    problems = [f"cell {cell['id']}\n{difference(stored[cell['id']], cell['outputs'])}" for cell in changed]
    if store:
        write_nb(page, path)
        local = {cell["id"]: local_names(cell.get("outputs", [])) for cell in page["cells"]}
        problems = [
            f"cell {cell} shows what is only here and now: {', '.join(names)}" for cell, names in local.items() if names
        ]
    return time.monotonic() - started, "\n".join(problems)


def prepare() -> None:
    "What every page's process finds: the checkout, and what many pages import"
    os.environ.update(IN_TEST="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path[0] = str(ROOT)
    import torch  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401


def main(arguments: list[str]) -> int:
    "Run the pages, each in a process of its own; the exit code"
    store = "--store" in arguments
    chosen = [Path(name).resolve() for name in arguments if name != "--store"] or pages()
    os.chdir(ROOT)
    prepare()
    with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        done = pool.starmap(run, [(path, store) for path in chosen], chunksize=1)
    names = [path.relative_to(ROOT) for path in chosen]
    for (seconds, _), name in sorted(zip(done, names), reverse=True)[:10]:
        print(f"{seconds:6.1f} s  {name}")
    for (_, problem), name in zip(done, names):
        if problem:
            print(f"\n{name}: {problem}")
    failed = sum(bool(problem) for _, problem in done)
    print(f"{len(done)} pages; with a lesson that fails, or shows something else than is stored: {failed}")
    if failed and not store:
        print("`make lessons` stores what the lessons show now")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
