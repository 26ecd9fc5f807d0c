"The learning rate of every update, and that a run of a single one trains"

import numpy as np
import pytest

from gpuml.base.config import TrainConfig
from gpuml.base.loading import load
from gpuml.training.fit import fit
from gpuml.training.model import load_classifier
from gpuml.training.schedule import learning_rate
from tests.conftest import runs_in


def rates(updates, schedule, warmup):
    "The rate of each update, as a share of the peak"
    train = TrainConfig(learning_rate=1.0, schedule=schedule, warmup=warmup)
    return np.array([learning_rate(train, i / updates, (i + 1) / updates) for i in range(updates)])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("updates", [1, 2, 3, 7, 20, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.1, 0.5, 0.99])
def test_every_update_has_a_rate(schedule, updates, warmup):
    found = rates(updates, schedule, warmup)
    assert (found > 0).all() and found.max() == 1.0
    rising = round(warmup * updates, 9)  # updates of the warm-up, not always whole
    assert found[0] == pytest.approx(min(1.0, 1 / rising if rising else 1.0))
    top = int(found.argmax())
    assert (np.diff(found[: top + 1]) > 0).all() and (np.diff(found[top:]) <= 0).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_after_the_warm_up_the_rate_is_what_it_was(schedule):
    "The rates of HuggingFace's schedules, whose warm-up begins at 0 and is one update late"
    import torch
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, theirs = get_scheduler(name, optimizer, 4, 20), []
    for _ in range(20):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates(20, schedule, 0.2)
    assert theirs[:4] == [0, 0.25, 0.5, 0.75] and ours[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert ours[4:] == pytest.approx(theirs[4:])


@pytest.mark.parametrize(
    "order", [[], ["data.order=early", 'data.labels=["billing","delivery"]']], ids=["global", "early"]
)
def test_a_run_of_one_update_trains(order, store, tiny):
    "verl#3674, gpt-neox#1373, bert#1293: the only update had the first rate of the warm-up, which was 0"
    import torch
    from transformers import set_seed

    run = fit(load("dev", ["train.epochs=1", "train.batch_size=100", "train.learning_rate=1e-3", *order]))
    set_seed(42)
    before, after = (
        load_classifier(folder, labels) for folder, labels in ((tiny, run.labels), (run.model_folder, None))
    )
    moved = max((a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert run.metrics["updates"] == 1 and torch.tensor(0.9e-3) < moved < 1.1e-3
    (recorded,) = runs_in(store)
    assert recorded.data.metrics["learning_rate"] == 1e-3
