"""What gpuml promises about interruptions, tried many times.

    python benchmarks/promises.py [data signals moments writes damage tracking away] [--times 30] [--seed 0] [--s3]

  data      malformed files, and a thousand files with a flipped byte or a cut, against Python's `csv` (P10)

The others train in processes of their own and interfere:
  signals   one to three interruptions at random moments, SIGTERM and SIGKILL, on the offline encoder (P1, P2, P4), and
            the time from SIGTERM to the exit; first, the time from SIGTERM at `gpuml run` until a cell of its kernel,
            which does nothing, has the signal, also where `gpuml run` is PID 1 (P1)
  moments   SIGTERM at ten named moments, from the first import to the registration of the model (P1, P2, P4)
  writes    SIGKILL before every file that a run opens, makes, renames or removes, on a tiny model (P3, P4)
  damage    a flipped byte or a cut at many places of every file of the newest checkpoint, on a tiny model (P3)
  tracking  an MLflow server that is up, and one that is away: the time of training (P8)
  away      (with --s3 only) an S3 server that is away for 120 seconds while data is read, and while training: it refuses
            connections, or hangs, or is killed and started again (P9)
After each interference the run is resumed to its end: weights, evaluation, mean training loss, curve and predictions
have to be those of a run that nobody disturbed (P2), steps in MLflow exactly once, and nothing that is not certified may
be shown as finished (P4). Prints a table: what was tried, what held.

With `--s3`, data and output are on a real S3 server. After half of the interruptions the machine is lost: the run goes
on on another one, which has nothing but what is on S3. `writes` then kills at so many random ones of the writes to files
and of the requests that change something on S3, before the server sees them or after; `damage` is done on S3.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402

from gpuml.base.errors import DataError  # noqa: E402
from tests import s3  # noqa: E402
from tests.conftest import CONFIG, OFFLINE, rows  # noqa: E402
from tests.faults import Fault, Proxy  # noqa: E402
from tests.test_dataset import MALFORMED, oracle, random_table  # noqa: E402
from tests.test_interrupt import CONTEXT, OVERRIDES, check_steps, recorded, result, stop_at  # noqa: E402
from tests.test_run import CAN_UNSHARE, PID_1, WAITING, Attempt, write_bundle  # noqa: E402
from tests.tiny import make_tiny  # noqa: E402

DATA = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows())
ENDS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Tally:
    "How often something was tried, and held"

    def __init__(self):
        self.rows, self.exits, self.delays = {}, [], {}

    def add(self, promise: str, held: bool, what: str = "") -> None:
        tried, good = self.rows.get(promise, (0, 0))
        self.rows[promise] = (tried + 1, good + bool(held))
        if not held:
            print(f"DID NOT HOLD: {promise} ({what})", file=sys.stderr, flush=True)

    def print(self) -> None:
        print(f"{'promise':<62} {'tried':>6} {'held':>6}")
        for promise, (tried, held) in sorted(self.rows.items()):
            print(f"{promise:<62} {tried:>6} {held:>6}")
        for kind, delays in self.delays.items():
            times = [1000 * delay for delay in delays]
            middle, longest = statistics.median(times), max(times)
            print(
                f"SIGTERM from {kind} to its kernel, {len(times)} times: median {middle:.1f} ms, longest {longest:.1f} ms"
            )
        if self.exits:
            ends = sorted(self.exits)
            print(
                f"SIGTERM to exit, {len(ends)} times: median {statistics.median(ends):.1f} s, "
                f"99th percentile {ends[min(len(ends) - 1, int(0.99 * len(ends)))]:.1f} s, longest {ends[-1]:.1f} s"
            )


class Bench:
    "Projects with one model, and what an undisturbed run gives in them"

    def __init__(self, home: Path, model: str):
        self.home, self.model, self.child = home, model, None
        folder = self.project()
        code, self.seconds = self.attempt(folder)
        assert code == 0, "the undisturbed run failed"
        self.expected = self.outcome(folder)

    def project(self) -> Path:
        "A small project with an empty MLflow store"
        folder = Path(tempfile.mkdtemp(dir=self.home))
        for part in ("config", "data"):
            (folder / part).mkdir(parents=True)
        text = CONFIG.format(cache=folder / "cache", model=self.model, port=9)
        (folder / "config" / "dev.yaml").write_text(text)
        (folder / "data" / "a.csv").write_text(DATA)
        shutil.copy(self.home / "empty.db", folder / "mlflow.db")
        return folder

    def begun(self, folder: Path) -> list[Path]:
        "Folders of the run on this machine, if it has one"
        return [f.parent for f in (folder / "outputs").glob("*/tracking.json")]

    def resume(self, folder: Path) -> str | None:
        "What the next attempt is told to go on with"
        return "latest" if self.begun(folder) else None

    def attempt(self, folder: Path, after: float | None = None, number: int = 0, **more) -> tuple[int, float]:
        "One attempt, and a signal after so many seconds: its exit code, and the seconds from the signal to the exit"
        self.child = CONTEXT.Process(target=train_here, args=(str(folder), self.resume(folder)), kwargs=more)
        self.child.start()
        started = time.monotonic()
        self.child.join(after or 600)
        if after and self.child.is_alive():
            started = time.monotonic()
            os.kill(self.child.pid, number)
            self.child.join(600)
        return self.child.exitcode, time.monotonic() - started

    def certified(self, folder: Path) -> bool:
        return any((place / "certificate.json").exists() for place in self.begun(folder))

    def done(self, folder: Path) -> bool:
        "Whether nothing is left to do"
        from gpuml.training.unfinished import is_done

        return any(map(is_done, self.begun(folder)))

    def outcome(self, folder: Path) -> str:
        from gpuml.training.results import load_run

        return result(load_run(self.begun(folder)[0]))

    def lose(self, folder: Path) -> str:
        "What becomes of the machine: here, nothing"
        return ""

    def finish(self, folder: Path, tally: Tally, promise: str, what: str) -> None:
        "Resume to the end, unless it is there already, and compare"
        what += self.lose(folder)
        code = 0 if self.done(folder) else -1
        for _ in range(3 if code else 0):
            code, _ = self.attempt(folder)
            if code == 0:
                break
        tally.add(f"{promise} goes on to its end", code == 0, what)
        if code == 0:
            tally.add("P2 bit-equal to an undisturbed run", self.outcome(folder) == self.expected, what)
            wrong = self.wrong_steps(folder)
            tally.add("P2 steps in MLflow exactly once", not wrong, f"{what}: {wrong}")
        self.clear(folder)

    def wrong_steps(self, folder: Path) -> str:
        "What is wrong where not each step is in MLflow exactly once; `gpuml sync` may have to tell it first"

        from gpuml.training.sync import behind, sync

        for place in self.begun(folder):
            for late in behind(place.parent):
                sync(late)
        runs = recorded(folder / "mlflow.db")
        finished = [run for run in runs if run.info.status == "FINISHED"]
        if len(finished) != 1:
            return f"runs are {[run.info.status for run in runs]}"
        try:
            check_steps(folder / "mlflow.db", finished[0])
        except AssertionError as e:
            return str(e)
        return ""

    def clear(self, folder: Path) -> None:
        shutil.rmtree(folder)

    def change(self, made: Path, rng: random.Random) -> tuple[Path, str]:
        "A copy of a project with a byte flipped, or the rest cut off, in a file of its newest checkpoint; and which"
        folder = self.project()
        shutil.rmtree(folder)
        shutil.copytree(made, folder)
        record = self.begun(folder)[0]
        for file in (record / "config.yaml", record / "tracking.json", folder / "config" / "dev.yaml"):
            file.write_text(file.read_text().replace(str(made), str(folder)))
        newest = max((record / "checkpoints").glob("step-*"))
        file = rng.choice(sorted(newest.iterdir()))
        raw, what = damaged(file.read_bytes(), rng)
        file.write_bytes(raw)
        return folder, f"{file.name} {what}"


class Server:
    "A real S3 server, behind a proxy"

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        folder.mkdir()
        self.process, self.endpoint = s3.start(folder)
        stack.callback(lambda: (self.process.kill(), self.process.wait(10)))
        s3.keys_in_environment(stack.enter_context(pytest.MonkeyPatch.context()))
        self.wait()
        self.proxy = stack.enter_context(Proxy(self.endpoint))

    def wait(self) -> None:
        s3._ready(self.endpoint, self.process, self.folder / "weed.log")

    def away(self, how: str, seconds: float) -> float:
        "Be away for about so many seconds; for how many it was"
        begun = time.monotonic()
        if how == "refuses connections":
            self.proxy.outage(seconds)
            time.sleep(seconds)
        elif how == "hangs":
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.process.send_signal(signal.SIGCONT)
        else:
            self.process.kill()
            self.process.wait(10)
            time.sleep(seconds - 5)  # what it takes to start
            self.process, _ = s3.start(self.folder)
            self.wait()
        return time.monotonic() - begun


class OnS3(Bench):
    "Projects whose data and output are on S3, behind a proxy"

    def __init__(self, home: Path, model: str, server: Server, rng: random.Random):
        from gpuml.base.storage import Storage

        self.storage, self.server, self.proxy, self.rng, self.machines = Storage(), server, server.proxy, rng, {}
        self.storage.put_bytes(DATA.encode(), "s3://datasets/a.csv")
        super().__init__(home, model)

    def project(self) -> Path:
        folder = super().project()
        shutil.rmtree(folder / "data")
        config = folder / "config" / "dev.yaml"
        text = config.read_text().replace("train: data", "train: s3://datasets/a.csv")
        config.write_text(text.replace("output: outputs", f"output: {self.place(folder)}"))
        return folder

    def place(self, folder: Path) -> str:
        return f"s3://models/{folder.name}"

    def begun(self, folder: Path) -> list[Path]:
        return [f.parent for f in (folder / "cache").glob("runs/*/*/tracking.json")]

    def stored(self, folder: Path, name: str) -> list[str]:
        "Where on S3 the run has this file"
        return [f.url for f in self.storage.find(f"{self.place(folder)}/*/{name}")]

    def resume(self, folder: Path) -> str | None:
        "Of a lost machine's run that says it is running, the run id has to be named"
        for place in self.begun(folder):
            record = json.loads(
                (place / "tracking.json").read_text()
            )  # may be of the lost machine, fetched and not gone on with
            lost = record["status"] == "RUNNING" and record["process"][0] != self.machines.get(
                folder, socket.gethostname()
            )
            return place.name if lost else "latest"
        for url in self.stored(folder, "tracking.json"):
            record = json.loads(self.storage.read(self.storage.info(url)))
            return url.split("/")[-2] if record["status"] == "RUNNING" else "latest"
        return None

    def attempt(self, folder: Path, after: float | None = None, number: int = 0, **more) -> tuple[int, float]:
        return super().attempt(folder, after, number, machine=self.machines.get(folder), **more)

    def certified(self, folder: Path) -> bool:
        return bool(self.stored(folder, "certificate.json"))

    def done(self, folder: Path) -> bool:
        told = any(run.info.status == "FINISHED" for run in recorded(folder / "mlflow.db"))
        return super().done(folder) if self.begun(folder) else self.certified(folder) and told

    def outcome(self, folder: Path) -> str:
        "What is on S3, as a machine loads it that has nothing of the run"
        from gpuml.training.results import load_run

        shutil.rmtree(self.home / ".cache", ignore_errors=True)
        (url,) = self.stored(folder, "certificate.json")
        return result(load_run(url.rpartition("/")[0]))

    def lose(self, folder: Path) -> str:
        if self.rng.random() < 0.5:
            return ""
        shutil.rmtree(folder / "cache", ignore_errors=True)
        self.machines[folder] = f"machine-{self.rng.randrange(10**9)}"
        return ", and the machine is lost"

    def clear(self, folder: Path) -> None:
        self.storage.remove(self.place(folder))
        super().clear(folder)

    def change(self, made: Path, rng: random.Random) -> tuple[Path, str]:
        folder = self.project()
        for file in self.storage.find(f"{self.place(made)}/**"):
            raw = self.storage.read(file).replace(made.name.encode(), folder.name.encode())
            self.storage.put_bytes(raw, file.url.replace(self.place(made), self.place(folder)))
        shutil.copy(made / "mlflow.db", folder / "mlflow.db")
        newest = max(url.rpartition("/")[0] for url in self.stored(folder, "checkpoints/*/manifest.json"))
        file = rng.choice(self.storage.find(newest))
        raw, what = damaged(self.storage.read(file), rng)
        self.storage.put_bytes(raw, file.url)
        return folder, f"{file.url.rpartition('/')[2]} {what}"


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    "The bytes with one of them flipped, or the rest cut off; and which"
    at = rng.randrange(len(data))
    if rng.random() < 0.7:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], f"flipped at byte {at}"
    return data[:at], f"cut at byte {at}"


def train_here(
    folder: str, resume: str | None, moment: str | int | None = None, at=None, count=None, more=(), machine=None
) -> None:
    "In a process of its own: train, with SIGTERM at a moment or SIGKILL before a write, or count the writes"
    os.chdir(folder)
    if machine:
        socket.gethostname = lambda: machine
    if at is not None or count is not None:
        watch_writes(folder, at, count)
    from gpuml.base.errors import Preempted
    from gpuml.base.loading import load
    from gpuml.training.fit import fit

    try:
        config = load("dev", [*OVERRIDES, *more])
        fit(config, watch=stop_at(moment) if moment is not None else None, resume=resume)
    except Preempted:
        os._exit(75)
    os._exit(0)


def watch_writes(folder: str, at: int | None, count) -> None:
    "Count what this process does to files under a folder; die before the one numbered `at`"
    seen = [0]

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ENDS:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | Path) and str(path).startswith(folder):
            seen[0] += 1
            if count is not None:
                count.value = seen[0]
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def honest(bench: Bench, folder: Path, tally: Tally, what: str) -> None:
    "P4: a run that is not certified is nowhere finished"
    finished = any(r.info.status == "FINISHED" for r in recorded(folder / "mlflow.db"))
    tally.add("P4 unfinished is nowhere shown as finished", not finished or bench.certified(folder), what)


def delays(home: Path, tally: Tally, rng: random.Random, times: int) -> None:
    "Seconds from SIGTERM at `gpuml run` until a cell that waits for nothing has it"
    project = Path(tempfile.mkdtemp(dir=home))
    write_bundle(project, WAITING)
    for kind, prefix in (("gpuml run", ()), ("gpuml run as PID 1", PID_1)):
        if prefix and not CAN_UNSHARE:
            print(f"P1 {kind}: not tried, as only root may make a PID namespace", file=sys.stderr)
            continue
        for i in range(times):
            attempt = Attempt(project, python=[*prefix, sys.executable]).until("^waiting")
            runner = attempt.runner.pid
            time.sleep(rng.uniform(0, 1))
            sent = time.monotonic()
            os.kill(runner, signal.SIGTERM)
            code = attempt.end()
            arrived = re.search(r"arrived (\S+)", attempt.said)
            delay = float(arrived[1]) - sent if arrived else float("inf")
            tally.add(f"P1 SIGTERM at {kind}: at its kernel in 50 ms", delay <= 0.05, f"{1000 * delay:.1f} ms")
            tally.add("P1 SIGTERM at an idle moment: exit 75", code == 75, f"exit {code}")
            tally.delays.setdefault(kind, []).append(delay)
            print(f"{kind} {i + 1} of {times}: {1000 * delay:.1f} ms", file=sys.stderr, flush=True)
            shutil.rmtree(project / "outputs")


def signals(bench: Bench, tally: Tally, rng: random.Random, times: int) -> None:
    for i in range(times):
        folder, code, story = bench.project(), -1, []
        for _ in range(rng.randint(1, 3)):
            number, after = rng.choice([signal.SIGTERM, signal.SIGKILL]), rng.uniform(0.1, bench.seconds)
            code, seconds = bench.attempt(folder, after, number)
            story.append(f"{signal.Signals(number).name} after {after:.2f} s")
            if code == 0:
                break
            if number == signal.SIGTERM:
                tally.add("P1 SIGTERM at a random moment: exit 75", code == 75, f"{story}, exit {code}")
                tally.exits.append(seconds)
            honest(bench, folder, tally, str(story))
            story[-1] += bench.lose(folder)
        bench.finish(folder, tally, "P1 P3 after signals it", str(story))
        print(f"signals {i + 1} of {times}: {', '.join(story)}", file=sys.stderr, flush=True)


def moments(bench: Bench, tally: Tally) -> None:
    for moment in ("data", "model", "training", 1, 3, 5, 8, "evaluating", "saving", "done"):
        folder = bench.project()
        code, _ = bench.attempt(folder, moment=moment, more=["tracking.register=tickets"])
        wanted = 0 if moment == "done" else 75  # everything is done and told by then
        tally.add("P1 SIGTERM at a named moment: exit 75", code == wanted, f"{moment}: exit {code}")
        honest(bench, folder, tally, str(moment))
        bench.finish(folder, tally, "P1 stopped at a named moment it", str(moment))


def writes(bench: Bench, tally: Tally, rng: random.Random, times: int) -> None:
    total = CONTEXT.Value("i", 0)
    bench.attempt(bench.project(), count=total)
    moments = [(at, None) for at in range(1, total.value + 1)]
    if isinstance(bench, OnS3):
        requests = count_changes(bench)
        print(f"{total.value} writes to files, {requests} requests that change S3", file=sys.stderr)
        moments += [(at, kind) for at in range(1, requests + 1) for kind in ("reset", "cut", "lost")]
        moments = sorted(rng.sample(moments, min(times, len(moments))), key=str)
    for i, (at, kind) in enumerate(moments):
        folder = bench.project()
        if kind:
            die_at(bench, at, kind)
        code, _ = bench.attempt(folder, at=None if kind else at)
        honest(bench, folder, tally, f"write {at}")
        name = {None: "write", "reset": "request", "cut": "middle of request", "lost": "answer to request"}[kind]
        bench.finish(folder, tally, "P3 killed before a write it", f"{name} {at}, exit {code}")
        print(f"writes {i + 1} of {len(moments)}: {name} {at}, exit {code}", file=sys.stderr, flush=True)


def count_changes(bench: OnS3) -> int:
    "How many requests of a run change something on S3"
    before, folder = len(bench.proxy.requests), bench.project()
    bench.attempt(folder)
    count = sum(request.method != "GET" for request in bench.proxy.requests[before:])
    bench.clear(folder)
    return count


def die_at(bench: OnS3, at: int, kind: str) -> None:
    "SIGKILL when the request numbered `at` that changes something arrives, in its middle, or when the server has done it"
    seen = [0]

    def plan(request):
        seen[0] += request.method != "GET"
        if seen[0] == at and request.method != "GET":
            return Fault(kind, act=lambda: os.kill(bench.child.pid, signal.SIGKILL))

    bench.proxy.plan = plan


def damage(bench: Bench, tally: Tally, rng: random.Random, times: int) -> None:
    made = bench.project()
    bench.attempt(made, moment=7, more=["train.checkpoint_updates=1"])
    for i in range(times):
        folder, what = bench.change(made, rng)
        bench.finish(folder, tally, "P3 with a damaged checkpoint it", what)
        print(f"damage {i + 1} of {times}: {what}", file=sys.stderr, flush=True)


def outage(bench: Bench) -> None:
    "Seconds of training with an MLflow server and without, one after the other"
    from gpuml.training.results import load_run
    from tests.tracking import Gate, tracking_server

    (bench.home / "server").mkdir()
    seconds = {"up": [], "away": []}
    with tracking_server(bench.home / "server", bench.home / "empty.db") as port:
        gate = Gate(port)
        gate.open()
        for _ in range(4):
            for state, uri in (("up", gate.uri), ("away", "http://127.0.0.2:9")):
                folder = bench.project()
                bench.attempt(folder, more=[f"tracking.uri={uri}", "train.epochs=30"])
                seconds[state].append(load_run(bench.begun(folder)[0]).metrics["seconds"])
    ratios = [b / a for a, b in zip(seconds["up"], seconds["away"], strict=True)]
    up, away = (statistics.median(seconds[state]) for state in ("up", "away"))
    print(
        f"P8 training with an MLflow server {up:.1f} s, with none {away:.1f} s: "
        f"median ratio {statistics.median(ratios):.3f}, {min(ratios):.3f}–{max(ratios):.3f}"
    )


def data(tally: Tally, rng: random.Random, home: Path, times: int = 1000) -> None:
    "What `read` says of malformed files, and of so many that were damaged at random"
    for name, (raw, line, _) in MALFORMED.items():
        said, where = read_here(home, raw), f"data/a.csv:{line}: " if line else "data/a.csv: "
        refused = isinstance(said, DataError) and said.exit_code == 65 and str(said).startswith(where)
        tally.add("P10 malformed file refused with file and line", refused, f"{name}: {said!r}")
        print(f"{name:<27} {str(said).splitlines()[0][:140]}")
    counts = Counter()
    for i in range(times):
        raw, delimiter, content = random_table(rng)
        at, what = rng.randrange(len(raw)), ("flipped byte", "cut")[i % 2]
        raw = raw[:at] + (bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :] if what == "flipped byte" else b"")
        said = read_here(home, raw)
        if isinstance(said, int):
            found = oracle(raw, delimiter) or [([], 0)]
            tally.add("P10 damaged file that is read: the rows of Python's csv", said == len(found) - 1, repr(raw))
            if what == "cut":  # what no reader can know
                legal = {len(row) for row, _ in found} == {len(found[0][0])}
                tally.add("P10 cut file that is read: what is left are whole rows", legal, repr(raw))
            else:
                tally.add("P10 file with a flipped byte that is read: all its rows", said == len(content), repr(raw))
            counts[what, "all rows read" if said == len(content) else "what is left are whole rows, and read"] += 1
        else:
            refused = isinstance(said, DataError) and str(said).startswith("data/a.csv:")
            tally.add("P10 damaged file that is refused: with its name, and no traceback", refused, repr(said))
            counts[what, "refused"] += 1
    for (what, end), count in sorted(counts.items()):
        print(f"{what}: {end:<50} {count:>5}")


def read_here(home: Path, raw: bytes) -> Exception | int:
    "How many rows a file of these bytes has, or what is said of it"
    from gpuml.base.config import Config
    from gpuml.data.reading import read

    (home / "data").mkdir(exist_ok=True)
    (home / "data" / "a.csv").write_bytes(raw)
    config = Config(data={"train": "data", "cache": str(home / "cache")})
    config = config.at(home)
    try:
        found = read(config)
        return len(found.train) + len(found.validation)
    except Exception as e:
        return e


def away(bench: OnS3, tally: Tally, seconds: float = 120) -> None:
    "S3 goes away when a third of the data is read, or when the first checkpoint is being stored"
    filler = "x" * 1_700_000  # of a column that is not needed: 40 MB, which take 10 s
    table = "text,label,filler\n" + "".join(f"{text},{label},{filler}\n" for text, label in rows())
    bench.storage.put_bytes(table.encode(), "s3://datasets/away/a.csv")
    bench.proxy.bandwidth = 4e6
    more, calm = ["data.train=s3://datasets/away"], bench.project()
    _, usual = bench.attempt(calm, more=more)
    expected = bench.outcome(calm)
    for how in ("refuses connections", "hangs", "is killed and started again"):
        for when in ("reading", "training"):
            folder, now, sent, times = bench.project(), threading.Event(), bench.proxy.sent, []

            def plan(request, now=now, sent=sent, when=when):
                read, saving = bench.proxy.sent - sent > len(table) / 3, "/checkpoints/step-" in request.path
                if read if when == "reading" else saving:
                    now.set()

            def strike(how=how, now=now, times=times):
                if now.wait(300):
                    times.append(bench.server.away(how, seconds))

            bench.proxy.plan = plan
            striker = threading.Thread(target=strike)
            striker.start()
            code, took = bench.attempt(folder, more=more)
            striker.join()
            what = f"S3 {how} for {times[0]:.0f} s while {when}"
            print(f"{what:<62} the run took {took:.0f} s, {took - usual:.0f} more than undisturbed", flush=True)
            tally.add("P9 S3 away for 120 s: the run goes on to its end", code == 0, f"{what}: exit {code}")
            if code == 0:
                tally.add("P9 bit-equal to an undisturbed run", bench.outcome(folder) == expected, what)
            bench.clear(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parts = ["data", "signals", "moments", "writes", "damage", "tracking"]
    parser.add_argument("parts", nargs="*", choices=[*parts, "away", []], default=parts)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="data and output on a real S3 server")
    given = parser.parse_args()
    if "away" in given.parts and not given.s3:
        parser.error("away needs --s3")
    rng, tally = random.Random(given.seed), Tally()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if "data" in given.parts:
            data(tally, rng, home)
        make = Bench
        if given.s3:
            server = Server(home / "s3", stack)
            os.environ |= {"AWS_ENDPOINT_URL": server.proxy.endpoint, "HOME": str(home)}
            make = lambda home, model: OnS3(home, model, server, rng)  # noqa: E731
        import mlflow

        mlflow.MlflowClient(f"sqlite:///{home}/empty.db").search_experiments()
        if {"signals", "moments", "tracking"} & set(given.parts):
            encoder = make(home, OFFLINE)
            if "signals" in given.parts:
                delays(home, tally, rng, given.times)
                signals(encoder, tally, rng, given.times)
            if "moments" in given.parts:
                moments(encoder, tally)
            if "tracking" in given.parts:
                outage(encoder)
        if {"writes", "damage", "away"} & set(given.parts):
            small = make(home, str(make_tiny(home / "model")))
            if "writes" in given.parts:
                writes(small, tally, rng, given.times)
            if "damage" in given.parts:
                damage(small, tally, rng, given.times)
            if "away" in given.parts:
                away(small, tally)
        tally.print()


if __name__ == "__main__":
    main()
