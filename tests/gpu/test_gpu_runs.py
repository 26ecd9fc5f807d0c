"Whole trainings on a GPU: equal bits each time, whatever interrupts them, and whatever does not fit"

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpuml.base.errors import Preempted
from gpuml.base.loading import load
from gpuml.training.fit import fit
from tests.test_interrupt import finish, kill_after, result, stop_at
from tests.tiny import WORDS

pytestmark = pytest.mark.gpu
# of texts over 128 tokens, the backward pass of FlashAttention adds in any order
LONG = ["data.max_length=300", "train.batch_size=4"]
UPDATES = ["train.epochs=3", "train.checkpoint_updates=2"]  # 9 of 8 rows, as in test_interrupt.py
MEMORY = 80 * 2**20  # bytes beside what is taken before a training


def long_texts(count: int, most: int) -> str:
    "A CSV of texts with 20 to `most` words in two classes"
    rng = np.random.default_rng(0)
    lines = ["text,label"]
    for i, length in enumerate(rng.integers(20, most, count)):
        label = list(WORDS)[i % 2]
        lines.append(f"{' '.join(rng.choice(WORDS[label].split(), length))} {i},{label}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def long_project(store) -> Path:
    "The project, with texts of up to 300 tokens"
    (store.parent / "data" / "a.csv").write_text(long_texts(24, 290))
    return store


def train(*overrides: str, watch=None, resume=None):
    "The run of a training; `output` sets it apart from others"
    return fit(load("dev", list(overrides)), watch=watch, resume=resume)


def test_two_equal_runs(long_project):
    first, second = (train(*LONG, f"output={name}") for name in ("first", "second"))
    assert result(first) == result(second)
    texts = list(WORDS.values())
    assert first.predict(texts).labels == second.predict(texts).labels


def test_sigterm_then_resume(long_project):
    expected = result(train(*LONG, *UPDATES, "output=undisturbed"))
    for moment in (3, 8):
        with pytest.raises(Preempted):
            train(*LONG, *UPDATES, watch=stop_at(moment), resume=None if moment == 3 else "latest")
    assert result(train(*LONG, *UPDATES, resume="latest")) == expected


def test_sigkill_then_resume(store):
    "The first process gets as far as it gets; another one goes on with its checkpoint, or from the start"
    expected = result(train(*UPDATES, "output=undisturbed"))
    project = store.parent
    code = kill_after(project, 12.0 if torch.cuda.is_available() else 1.0, signal.SIGKILL, None)
    assert code in (-9, 0)
    if code == 0:
        (folder,) = (project / "outputs").iterdir()
        assert (folder / "certificate.json").exists()
        return
    unfinished = list((project / "outputs").glob("*/tracking.json"))
    assert result(finish(store) if unfinished else train(*UPDATES)) == expected


def limit_memory() -> None:
    "Leave `MEMORY` of the GPU to this process; a CPU has no such limit"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + MEMORY) / total)


def test_what_does_not_fit_is_split(long_project):
    "The update stays what it is; and an interruption changes nothing of how it was split"
    texts = 2048 if torch.cuda.is_available() else 64
    (long_project.parent / "data" / "a.csv").write_text(long_texts(texts, 290))
    large = ["data.max_length=300", f"train.batch_size={texts // 2}", "train.epochs=3", "train.best_metric=null"]
    whole = train(*large, "output=whole")
    limit_memory()
    split = train(*large, "output=split")
    assert split.metrics["updates"] == whole.metrics["updates"]
    assert split.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-2)
    assert (result(split) == result(whole)) != torch.cuda.is_available()  # another cut rounds otherwise
    with pytest.raises(Preempted):
        train(*large, watch=stop_at(3))
    interrupted = train(*large, resume="latest")
    if choices(interrupted) == choices(split):  # its own trial found the same memory
        assert result(interrupted) == result(split)


def choices(run) -> str | None:
    "How a run's updates were cut, and computed"
    file = run.folder / "machine.json"
    return file.read_text() if file.exists() else None


@pytest.fixture
def steep_model(tiny, tmp_path) -> str:
    "The tiny model with a head some thousand times as large: fp16 can't hold its scaled gradients"
    folder = tmp_path / "steep"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["classifier.weight"] *= 3000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_fp16_with_overflow(store, steep_model):
    "Updates whose gradients overflow are left out, and the others count; equal each time, and after an interruption"
    precision = "fp16" if torch.cuda.is_available() else "fp32"
    steep = [f"model.name={steep_model}", f"train.precision={precision}", "train.epochs=8"]
    first = train(*steep, "output=first")
    skips = [note for note in first.metrics["notes"] if "changed nothing" in note]
    assert len(skips) == torch.cuda.is_available()
    assert np.isfinite(first.metrics["train_loss"])
    with pytest.raises(Preempted):
        train(*steep, watch=stop_at(6))
    assert result(train(*steep, resume="latest")) == result(first)
