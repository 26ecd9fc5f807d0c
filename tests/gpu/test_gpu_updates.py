"Updates on a GPU: by graphs, in rows, in parts and late they are what Python's are, and nothing in them waits"

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from gpuml.base.errors import TrainError
from gpuml.training.deterministic import deterministic
from gpuml.training.graph import Graphs
from gpuml.training.graph_trial import waiting_refused
from gpuml.training.row import Row, Shape
from tests.gpu.learners import CALM, MOST, TEXTS, distilbert, learner_on, train


@pytest.fixture(autouse=True)
def exact(device):
    "Kernels that add in the same order, as train.deterministic has it"
    with deterministic(True, device):
        yield


@pytest.fixture
def near(device) -> float:
    "How far losses may be apart that are the same in other sums"
    return 2e-2 if device.type == "cuda" else 1e-4


def plain(device, **more):
    "A learner without graphs"
    learner, _ = learner_on(device, distilbert(**more.pop("model", {})), **more)
    learner.unrecord()
    return learner


def recorded(device, **more):
    "A learner with graphs"
    learner, notes = learner_on(device, distilbert(**more.pop("model", {})), **more)
    assert notes == [] and learner.packed and learner.replay
    return learner


def test_equal_bits_each_time(device):
    assert train(plain(device)).equals(train(plain(device)))


def test_graphs_draw_and_compute_what_python_does(device):
    learner = recorded(device)
    assert train(learner).equals(train(plain(device)))
    assert len(learner.replay.rows) > 3


def test_steps_that_come_late_are_the_same(device):
    prompt = recorded(device)
    prompt.late = 0
    assert train(prompt).equals(train(recorded(device)))


def test_rows_are_padded_texts_without_the_padding(device, near):
    padded, _ = learner_on(device, distilbert(**CALM), rows="padded")
    padded, packed = train(padded), train(recorded(device, model=CALM))
    assert packed.numbers[:, 0] == pytest.approx(padded.numbers[:, 0], rel=near)


def test_parts_are_the_whole(device, near):
    whole = train(recorded(device, model=CALM))
    parts = []
    for _ in range(2):
        learner = recorded(device, model=CALM)
        learner.max_tokens = 2 * MOST
        parts.append(train(learner))
    assert parts[0].equals(parts[1])
    assert parts[0].numbers[:, 0] == pytest.approx(whole.numbers[:, 0], rel=near)


@pytest.mark.parametrize("make", [recorded, plain])
def test_what_does_not_fit_is_split(make, device, near):
    "Memory runs out while a graph is made, too"

    def refuse(module, arguments, options):
        if options["input_ids"].numel() > 2 * MOST:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    whole, learner = train(make(device, model=CALM)), make(device, model=CALM)
    learner.classifier.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    if learner.replay:
        learner.replay.clear()  # the rows that were tried
    split = train(learner)
    assert learner.max_tokens <= 2 * MOST
    assert split.numbers[:, 0] == pytest.approx(whole.numbers[:, 0], rel=near)


def test_a_recording_that_fails_leaves_the_others_as_they_were(device):
    "They draw by the seed of now, on the stream of before, and memory can be freed"

    def draw(row):
        if row.shape.tokens == 128 and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            row.targets.sum().item()  # waits for the GPU
        return torch.rand(1000, device=device)

    notes, drawn = [], []
    graphs = Graphs(draw, device, notes.append)
    stream = torch.cuda.current_stream() if device.type == "cuda" else None
    for tokens, seed in ((64, 3), (192, 3), (128, 3), (64, 3), (192, 4)):
        torch.manual_seed(seed)
        memory = torch.zeros(Shape(tokens, 2).bytes, dtype=torch.uint8, device=device)
        drawn.append(graphs.run(Row(Shape(tokens, 2), memory)).clone())
    assert [torch.equal(drawn[0], other) for other in drawn] == [True, True, True, True, False]
    assert len(notes) == (device.type == "cuda")
    torch.cuda.empty_cache()
    assert stream is None or torch.cuda.current_stream() == stream


@pytest.mark.parametrize("make", [recorded, plain])
def test_nothing_in_an_update_waits_for_the_gpu(make, device):
    learner = make(device)
    train(learner)  # all graphs are made
    with waiting_refused(device):
        train_again(learner)


def train_again(learner) -> None:
    "An epoch more, of which only steps come back"
    from gpuml.data.orders import Global
    from gpuml.training.feed import Feed
    from gpuml.training.loop import updates

    feed = Feed(Global(TEXTS), learner.config.batch_size, learner.config.seed, 1)
    assert len(list(updates(learner, feed))) == 5


def test_no_weight_changes_behind_a_loss_that_is_no_number(device):
    learner = plain(device)
    learner.late = 16
    calls, before = [], []

    def spoil(module, arguments, output):
        calls.append(1)
        if len(calls) == 3:
            return output * torch.nan
        if len(calls) == 4:  # as the third update leaves them
            before.extend(p.detach().clone() for p in learner.classifier.parameters())

    with ExitStack() as stack:
        hook = learner.classifier.classifier.register_forward_hook(spoil)
        stack.callback(hook.remove)
        with pytest.raises(TrainError, match=r"the loss is nan at update 3 \(training rows a.csv"):
            train(learner)
    assert len(calls) > 3
    assert all(torch.equal(a, b) for a, b in zip(before, learner.classifier.parameters(), strict=True))


def test_fp16_leaves_out_what_overflows(device):
    "A head some thousand times as large has gradients that the first scale is too large for"
    options = {"dtype": torch.float16} if device.type == "cuda" else {}

    def steep(make):
        classifier_learner = make(device, **options)
        with torch.no_grad():
            classifier_learner.classifier.classifier.weight.mul_(3000)
        return train(classifier_learner)

    by_graphs, by_python = steep(recorded), steep(plain)
    assert by_graphs.equals(by_python) and np.isfinite(by_graphs.weights).all()
    skipped = [step.skipped for step in by_graphs.steps]
    assert any(skipped) == (device.type == "cuda") and not all(skipped)
