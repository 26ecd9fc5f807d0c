"What a training shows in terminals of any width, and where there is none"

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios

import pytest

from gpuml.training.progress import Progress
from gpuml.training.words import line_facts
from gpuml.ui.terminal import TerminalView

HALF = "50 %"
LEFT = "12:34 min left"
END = "<end>"  # what a test writes behind a view
WAITING = "waiting for s3://models/production [0:12]"


def halfway(**changes) -> Progress:
    scores = {"step": 70, "epoch": 14, "loss": 0.5, "accuracy": 0.913, "macro_f1": 0.9}
    run = Progress("dev-1", "training", step=1050, steps=2100, epoch=15.0, epochs=30)
    run.losses, run.evaluations, run.examples_per_second, run.seconds_left = [0.7], [scores], 1321.4, 754
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def read_some(master: int) -> str:
    "What a terminal has got"
    assert select.select([master], [], [], 600)[0]
    return os.read(master, 65536).decode()


def drawn(monkeypatch, columns: int, progress: Progress, term: str = "xterm") -> list[str]:
    "The lines that a terminal of that width has got; 0 columns: one that does not know its width"
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("COLUMNS", raising=False)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with os.fdopen(slave, "w") as stream:
        view = TerminalView(stream)
        view(progress)
        text = ""
        while not re.search(r"(left|12\]|/s)[^\n]*$", text):
            stream.flush()
            text += read_some(master)
        os.write(slave, END.encode())  # behind what is being written: then the last line is whole
        while END not in text:
            text += read_some(master)
        text = text.replace(END, "")
        progress.phase = "stopped"
        view(progress)
    os.close(master)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [200, 120, 100, 80, 60, 50, 40, 0])
def test_bar_percent_and_time_left_stand_on_every_width(monkeypatch, columns):
    line = drawn(monkeypatch, columns, halfway())[-1]
    assert re.match(rf"[━╸╺]+ {HALF} · {LEFT}( · |$)", line.rstrip()), line
    assert len(line) <= (columns or 80) and "…" not in line
    assert (columns or 80) < 50 or "training" in line


def test_more_room_shows_more():
    shown = [len(line_facts(halfway().headway(), columns)) for columns in (16, 40, 60, 80, 120, 1000)]
    assert shown == sorted(shown) and shown[0] == 2 and shown[-1] == 8
    assert line_facts(Progress("dev-1", "data").headway(), 20) == ["reading data"]


def test_what_is_waited_for_is_cut_and_no_markup(monkeypatch):
    waiting = {"phase": "data", "doing": WAITING, "steps": 0, "step": 0, "losses": [], "evaluations": []}
    assert line_facts(halfway(**waiting).headway(), 40)[1] == WAITING[:24] + "…"
    assert WAITING in drawn(monkeypatch, 80, halfway(**waiting))[-1]


def test_where_nothing_can_be_redrawn_there_are_lines(monkeypatch):
    "A pipe, and a terminal in an editor, which had no word before"
    log = io.StringIO()
    TerminalView(log)(halfway())
    assert log.getvalue().startswith(f"dev-1: {HALF}, {LEFT}, training, ")
    assert drawn(monkeypatch, 80, halfway(), "dumb")[0].startswith(f"dev-1: {HALF}, {LEFT}, training, ")
