"""What gpuml promises about interruptions, tried many times.

    python benchmarks/promises.py [--times 20] [--seed 0]

Trains a small classifier on the offline encoder in processes of their own and interferes:
  P1  SIGTERM at random moments: exit 75, no update repeated, and the time from the signal to the exit
  P2  one to three interruptions, SIGTERM and SIGKILL: weights, evaluation, mean training loss and curve bit-equal
  P3  SIGKILL at random moments and a flipped byte in a random checkpoint file: it goes on from a whole checkpoint
  P4  whatever happened, nothing that is unfinished is shown as finished: certificate, MLflow status
Prints a table: what was tried, what held.
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
from tests.test_interrupt import CONTEXT, recorded, result, train_in_child  # noqa: E402


def project(folder: Path, store: Path) -> Path:
    "A small project with an empty MLflow store"
    for part in ("config", "data"):
        (folder / part).mkdir(parents=True)
    (folder / "config" / "dev.yaml").write_text(CONFIG.format(cache=folder / "cache", model=OFFLINE, port=9))
    (folder / "data" / "a.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows()))
    shutil.copy(store, folder / "mlflow.db")
    return folder


class Tally:
    "How often something was tried, and held"

    def __init__(self):
        self.rows = {}

    def add(self, promise: str, held: bool) -> None:
        tried, good = self.rows.get(promise, (0, 0))
        self.rows[promise] = (tried + 1, good + bool(held))


def attempt(folder: Path, after: float | None, number: int, resume: bool) -> tuple[int, float]:
    "One attempt that gets a signal after so many seconds; its exit code, and the seconds from the signal to the exit"
    started = CONTEXT.Event()
    child = CONTEXT.Process(target=train_in_child, args=(str(folder), "latest" if resume else None, started))
    child.start()
    started.wait(120)
    child.join(after)
    sent = time.monotonic()
    if child.is_alive():
        os.kill(child.pid, number)
        child.join(120)
    return child.exitcode, time.monotonic() - sent


def begun(folder: Path) -> list[Path]:
    "Folders of the run, if it has one"
    return [f.parent for f in (folder / "outputs").glob("*/tracking.json")]


def honest(folder: Path, tally: Tally) -> None:
    "P4: a run that is not certified is nowhere finished"
    for place in begun(folder):
        certified = (place / "certificate.json").exists()
        status = [r.info.status for r in recorded(folder / "mlflow.db")]
        tally.add("P4 unfinished never shown as finished", certified or "FINISHED" not in status)


def flip(folder: Path, rng: random.Random) -> bool:
    "Flip one byte in a random file of the newest checkpoint, if there are two"
    for place in begun(folder):
        saved = sorted((place / "checkpoints").glob("step-*"))
        if len(saved) > 1:
            file = rng.choice(sorted(saved[-1].iterdir()))
            raw = bytearray(file.read_bytes())
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(raw)
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, tally, exits = random.Random(given.seed), Tally(), []
    home = Path(tempfile.mkdtemp())
    import mlflow

    from gpuml.train import load_run

    mlflow.MlflowClient(f"sqlite:///{home}/empty.db").search_experiments()
    calm = project(home / "calm", home / "empty.db")
    assert attempt(calm, None, 0, False)[0] == 0, "the undisturbed run failed"
    started = time.monotonic()
    expected = result(load_run(begun(calm)[0]))
    shutil.rmtree(calm / "outputs")
    attempt(calm, None, 0, False)
    duration = time.monotonic() - started
    for i in range(given.times):
        folder = project(home / f"run{i}", home / "empty.db")
        code, killed, flipped = -1, False, False
        for _ in range(rng.randint(1, 3)):
            number = rng.choice([signal.SIGTERM, signal.SIGKILL])
            code, seconds = attempt(folder, rng.uniform(0.1, duration), number, bool(begun(folder)))
            if code == 0:
                break
            if number == signal.SIGTERM:
                tally.add("P1 SIGTERM: exit 75", code == 75)
                exits.append(seconds)
            killed |= number == signal.SIGKILL
            honest(folder, tally)
            if rng.random() < 0.3:
                flipped |= flip(folder, rng)
        for _ in range(3):
            if code != 0:
                code, _ = attempt(folder, None, 0, bool(begun(folder)))
        tally.add(
            "P3 none is lost" + (" (killed)" if killed else "") + (" (byte flipped)" if flipped else ""), code == 0
        )
        if code == 0:
            tally.add("P2 bit-equal after interruptions", result(load_run(begun(folder)[0])) == expected)
        print(f"{i + 1} of {given.times}: exit {code}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'promise':<50} {'tried':>6} {'held':>6}")
    for promise, (tried, held) in sorted(tally.rows.items()):
        print(f"{promise:<50} {tried:>6} {held:>6}")
    if exits:
        print(f"SIGTERM to exit: median {statistics.median(exits):.1f} s, longest {max(exits):.1f} s, of {len(exits)}")
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
