"""What gpuml promises about interruptions, tried many times.

    python benchmarks/promises.py [signals moments writes damage tracking] [--times 30] [--seed 0]

Trains in processes of their own and interferes:
  signals   one to three interruptions at random moments, SIGTERM and SIGKILL, on the offline encoder (P1, P2, P4), and
            the time from SIGTERM to the exit
  moments   SIGTERM at ten named moments, from the first import to the registration of the model (P1, P2, P4)
  writes    SIGKILL before every file that a run opens, makes, renames or removes, on a tiny model (P3, P4)
  damage    a flipped byte or a cut at many places of every file of the newest checkpoint, on a tiny model (P3)
  tracking  an MLflow server that is up, and one that is away: the time of training (P8)
After each interference the run is resumed to its end: weights, evaluation, mean training loss, curve and predictions
have to be those of a run that nobody disturbed (P2), steps in MLflow exactly once, and nothing that is not certified may
be shown as finished (P4). Prints a table: what was tried, what held.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.conftest import CONFIG, OFFLINE, rows  # noqa: E402
from tests.test_interrupt import CONTEXT, OVERRIDES, check_steps, make_tiny, recorded, result, stop_at  # noqa: E402

ENDS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Tally:
    "How often something was tried, and held"

    def __init__(self):
        self.rows, self.exits = {}, []

    def add(self, promise: str, held: bool, what: str = "") -> None:
        tried, good = self.rows.get(promise, (0, 0))
        self.rows[promise] = (tried + 1, good + bool(held))
        if not held:
            print(f"DID NOT HOLD: {promise} ({what})", file=sys.stderr, flush=True)

    def print(self) -> None:
        print(f"{'promise':<62} {'tried':>6} {'held':>6}")
        for promise, (tried, held) in sorted(self.rows.items()):
            print(f"{promise:<62} {tried:>6} {held:>6}")
        if self.exits:
            ends = sorted(self.exits)
            print(
                f"SIGTERM to exit, {len(ends)} times: median {statistics.median(ends):.1f} s, "
                f"99th percentile {ends[min(len(ends) - 1, int(0.99 * len(ends)))]:.1f} s, longest {ends[-1]:.1f} s"
            )


class Bench:
    "Projects with one model, and what an undisturbed run gives in them"

    def __init__(self, home: Path, model: str):
        self.home, self.model = home, model
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
        (folder / "data" / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows()))
        shutil.copy(self.home / "empty.db", folder / "mlflow.db")
        return folder

    def attempt(self, folder: Path, after: float | None = None, number: int = 0, **more) -> tuple[int, float]:
        "One attempt, and a signal after so many seconds: its exit code, and the seconds from the signal to the exit"
        child = CONTEXT.Process(target=train_here, args=(str(folder), bool(begun(folder))), kwargs=more)
        child.start()
        started = time.monotonic()
        child.join(after or 300)
        if after and child.is_alive():
            started = time.monotonic()
            os.kill(child.pid, number)
            child.join(300)
        return child.exitcode, time.monotonic() - started

    def outcome(self, folder: Path) -> str:
        from gpuml.train import load_run

        return result(load_run(begun(folder)[0]))

    def finish(self, folder: Path, tally: Tally, promise: str, what: str) -> None:
        "Resume to the end, unless it is there already, and compare"
        from gpuml.train import _is_done

        code = 0 if _is_done(begun(folder)[0]) else -1
        for _ in range(3 if code else 0):
            code, _ = self.attempt(folder)
            if code == 0:
                break
        tally.add(f"{promise} goes on to its end", code == 0, what)
        if code == 0:
            tally.add("P2 bit-equal to an undisturbed run", self.outcome(folder) == self.expected, what)
            tally.add("P2 steps in MLflow exactly once", steps_once(folder), what)
        shutil.rmtree(folder)


def train_here(folder: str, resume: bool, moment: str | int | None = None, at=None, count=None, more=()) -> None:
    "In a process of its own: train, with SIGTERM at a moment or SIGKILL before a write, or count the writes"
    os.chdir(folder)
    if at is not None or count is not None:
        watch_writes(folder, at, count)
    from gpuml.config import Preempted, load
    from gpuml.train import fit

    try:
        config = load("dev", [*OVERRIDES, *more])
        fit(config, watch=stop_at(moment) if moment is not None else None, resume="latest" if resume else None)
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


def begun(folder: Path) -> list[Path]:
    "Folders of the run, if it has one"
    return [f.parent for f in (folder / "outputs").glob("*/tracking.json")]


def honest(folder: Path, tally: Tally, what: str) -> None:
    "P4: a run that is not certified is nowhere finished"
    certified = any((place / "certificate.json").exists() for place in begun(folder))
    finished = any(r.info.status == "FINISHED" for r in recorded(folder / "mlflow.db"))
    tally.add("P4 unfinished is nowhere shown as finished", certified or not finished, what)


def steps_once(folder: Path) -> bool:
    "Each step is in MLflow exactly once; `gpuml sync` may have to tell it first"
    from gpuml import tracking

    for place in tracking.behind(folder / "outputs"):
        tracking.sync(place)
    (run,) = recorded(folder / "mlflow.db")
    try:
        check_steps(folder / "mlflow.db", run)
    except AssertionError:
        return False
    return run.info.status == "FINISHED"


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
            honest(folder, tally, str(story))
        if begun(folder):
            bench.finish(folder, tally, "P1 P3 after signals it", str(story))
        print(f"signals {i + 1} of {times}: {', '.join(story)}", file=sys.stderr, flush=True)


def moments(bench: Bench, tally: Tally) -> None:
    for moment in ("data", "model", "training", 1, 3, 5, 8, "evaluating", "saving", "done"):
        folder = bench.project()
        code, _ = bench.attempt(folder, moment=moment, more=["tracking.register=tickets"])
        wanted = 0 if moment == "done" else 75  # everything is done and told by then
        tally.add("P1 SIGTERM at a named moment: exit 75", code == wanted, f"{moment}: exit {code}")
        honest(folder, tally, str(moment))
        if begun(folder):
            bench.finish(folder, tally, "P1 stopped at a named moment it", str(moment))


def writes(bench: Bench, tally: Tally) -> None:
    total = CONTEXT.Value("i", 0)
    bench.attempt(bench.project(), count=total)
    for at in range(1, total.value + 1):
        folder = bench.project()
        code, _ = bench.attempt(folder, at=at)
        honest(folder, tally, f"write {at}")
        bench.finish(folder, tally, "P3 killed before a write it", f"write {at} of {total.value}, exit {code}")
        print(f"writes {at} of {total.value}", file=sys.stderr, flush=True)


def damage(bench: Bench, tally: Tally, rng: random.Random, times: int) -> None:
    made = bench.project()
    bench.attempt(made, moment=7, more=["train.checkpoint_updates=1"])
    for i in range(times):
        folder = bench.project()
        shutil.rmtree(folder)
        shutil.copytree(made, folder)
        record = begun(folder)[0]
        for file in (record / "config.yaml", record / "tracking.json", folder / "config" / "dev.yaml"):
            file.write_text(file.read_text().replace(str(made), str(folder)))
        newest = max((record / "checkpoints").glob("step-*"))
        file = rng.choice(sorted(newest.iterdir()))
        raw = bytearray(file.read_bytes())
        at = rng.randrange(len(raw))
        if rng.random() < 0.7:
            raw[at] ^= 1 << rng.randrange(8)
        else:
            del raw[at:]
        file.write_bytes(raw)
        bench.finish(folder, tally, "P3 with a damaged checkpoint it", f"{file.name} at byte {at}")
        print(f"damage {i + 1} of {times}", file=sys.stderr, flush=True)


def outage(bench: Bench) -> None:
    "Seconds of training with an MLflow server and without, one after the other"
    from gpuml.train import load_run
    from tests.test_outage import Server

    (bench.home / "server").mkdir()
    shutil.copy(bench.home / "empty.db", bench.home / "server" / "server.db")
    server, seconds = Server(bench.home / "server"), {"up": [], "away": []}
    server.start()
    for _ in range(4):
        for state, uri in (("up", server.uri), ("away", "http://127.0.0.2:9")):
            folder = bench.project()
            bench.attempt(folder, more=[f"tracking.uri={uri}", "train.epochs=30"])
            seconds[state].append(load_run(begun(folder)[0]).metrics["seconds"])
    server.stop()
    ratios = [b / a for a, b in zip(seconds["up"], seconds["away"], strict=True)]
    up, away = (statistics.median(seconds[state]) for state in ("up", "away"))
    print(
        f"P8 training with an MLflow server {up:.1f} s, with none {away:.1f} s: "
        f"median ratio {statistics.median(ratios):.3f}, {min(ratios):.3f}–{max(ratios):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parts = ["signals", "moments", "writes", "damage", "tracking"]
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=parts)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, tally, home = random.Random(given.seed), Tally(), Path(tempfile.mkdtemp())
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{home}/empty.db").search_experiments()
    if {"signals", "moments", "tracking"} & set(given.parts):
        encoder = Bench(home, OFFLINE)
        if "signals" in given.parts:
            signals(encoder, tally, rng, given.times)
        if "moments" in given.parts:
            moments(encoder, tally)
        if "tracking" in given.parts:
            outage(encoder)
    if {"writes", "damage"} & set(given.parts):
        small = Bench(home, str(make_tiny(home / "model")))
        if "writes" in given.parts:
            writes(small, tally)
        if "damage" in given.parts:
            damage(small, tally, rng, given.times)
    tally.print()
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
