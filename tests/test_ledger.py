"The ledger: the parts of any history add up to the time that was held, each pod's once, and are read with few requests"

import dataclasses
import json
import random
from datetime import UTC, datetime

import pytest

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.training import attempts
from gpuml.training.account import account_of, account_text
from gpuml.training.attempts import Attempt, moment
from gpuml.training.headway import Headway
from gpuml.training.ledger import KEYS, WEEK, ledger_csv, ledger_of, ledger_rows, spent_between, within
from gpuml.training.ledger_files import read_histories
from gpuml.training.spent import PARTS
from gpuml.training.timesheet import Timesheet, with_times
from tests.conftest import gpuml
from tests.faults import Proxy

BEGIN = datetime(2026, 11, 23, 5, tzinfo=UTC).timestamp()


def text(seconds: float) -> str:
    return datetime.fromtimestamp(BEGIN + seconds, UTC).isoformat(timespec="seconds")


def random_attempt(dice: random.Random, run: str, number: int, start: float, resumed: int) -> Attempt:
    "An attempt as a timesheet writes it down: killed, stopped, done, at work, or of an earlier version"
    clock = [start]
    sheet = Timesheet(lambda: clock[0])
    waited, update, checkpoint = 0.0, resumed, (resumed, "")
    epochs = dice.choice([1, 1, 1, 0])  # none: it only predicts
    for phase in dice.choice([["data", "model"], ["data", "training"], ["cells"], ["model", "training", "training"]]):
        clock[0] += dice.random() * 300
        sheet.take(Headway(run, phase, update=update, epochs=epochs))
    for _ in range(dice.randrange(12)):
        phase = dice.choice(["training"] * 6 + ["evaluating", "saving", "predicting"])
        seconds = dice.random() * dice.choice([1, 60, 4000])
        clock[0] += seconds
        waited += seconds * dice.choice([0, 0, 0.1, 2])
        update += dice.randrange(40) if phase == "training" else 0
        if dice.random() < 0.4:
            checkpoint = (dice.randint(resumed, update), str(clock[0]))
        values = dict(update=update, checkpoint=checkpoint[0], checkpoint_time=checkpoint[1], epochs=epochs)
        sheet.take(Headway(run, phase, saving_seconds=waited, **values))
    clock[0] += dice.random() * 500
    if dice.random() < 0.3:
        sheet.take(Headway(run, "done", update=update, epochs=epochs))
        clock[0] += dice.random() * 500
    end = text(clock[0])
    code = dice.choice([0, 75, 75, 1, None])
    finished = "" if code is None and dice.random() < 0.5 else end
    held = dict(gpus=dice.choice([None, 0, 1, 1, 2, 8]), nodes=dice.choice([None, 1, 2]), host=dice.choice("abc"))
    held |= dict(owner=dice.choice(["ada", "bob"]), priority_class=dice.choice(["", "gpuml-dev", "gpuml-prod"]))
    attempt = Attempt(run, number, code, "", None, text(start), finished, alive=end, updates=update, **held)
    attempt = dataclasses.replace(attempt, checkpoint=dice.choice([None, checkpoint[0]]))
    attempt = dataclasses.replace(attempt, submitted=dice.choice(["", text(start - 500 * dice.random())]))
    attempt = dataclasses.replace(attempt, after_until=dice.choice(["", text(start - 300 * dice.random())]))
    return attempt if dice.random() < 0.15 else with_times(attempt, sheet.times())


def random_history(dice: random.Random, run: str) -> list[Attempt]:
    "Attempts that follow each other, and overlap now and then, as where a clock is wrong"
    start, resumed, history = dice.random() * 8 * 86_400, 0, []
    for number in range(1, dice.randint(1, 7) + 1):
        history.append(random_attempt(dice, run, number, start, resumed))
        end = moment(history[-1].finished or history[-1].alive) / 1000 - BEGIN
        start = max(0.0, end + dice.choice([-400, -1, 0, 1, 30, 5000]))
        resumed = dice.randint(0, history[-1].updates)
    return history


def held_by(history: list[Attempt]) -> int:
    "GPU-milliseconds that a history held, counted without its parts: the union of each host's intervals"
    total = 0
    for host in {attempt.host for attempt in history}:
        edges = []
        for attempt in (a for a in history if a.host == host):
            start = moment(attempt.started)
            length = sum(attempt.spent.values()) if attempt.spent else moment(attempt.finished or attempt.alive) - start
            edges.append((start, start + length))
        covered = None
        for start, end in sorted(edges):
            begin = start if covered is None else max(start, covered)
            total += max(0, end - begin)
            covered = end if covered is None else max(covered, end)
    return total


@pytest.mark.parametrize("seed", range(8))
def test_the_parts_of_any_history_add_up_to_the_held_time(seed):
    dice = random.Random(seed)
    for _ in range(150):
        history = random_history(dice, "dev-1")
        same = [dataclasses.replace(attempt, gpus=3, nodes=None) for attempt in history]  # one factor for all
        account = account_of(dice.sample(same, len(same)))
        assert account.spent.total == 3 * held_by(same) == sum(getattr(account.spent, part) for part in PARTS)
        assert min(getattr(account.spent, part) for part in PARTS) >= 0
        assert all(start < end for _, start, end in account.waits) and account.chosen >= 0
        shared = [min(end, s.end) - max(start, s.start) for _, start, end in account.waits for s in account.stretches]
        assert max(shared, default=0) <= 0  # nobody waits while a pod of the run is at work


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_every_kind_add_up_to_the_same(seed):
    dice = random.Random(1000 + seed)
    accounts = [account_of(random_history(dice, f"dev-{i}")) for i in range(40)]
    whole = sum(account.spent.total for account in accounts if account.gpus)
    waited = sum(account.waited for account in accounts if account.gpus)
    chosen = sum(account.chosen for account in accounts if account.gpus)
    for by in ("owner", "run", "class", "week"):
        rows = ledger_rows(accounts, by)
        assert sum(row.spent.total for row in rows) == whole
        assert (sum(row.waited for row in rows), sum(row.chosen for row in rows)) == (waited, chosen)
        ledger = ledger_of(accounts, by)
        lines = [line.split(",") for line in ledger_csv(ledger).decode().splitlines()[1:]]
        for _, _, held, *rest in lines:
            assert round(1000 * float(held)) == sum(round(1000 * float(part)) for part in rest[:5])
        assert sum(round(1000 * float(line[-1])) for line in lines) == chosen
        for row in ledger.table().rows:
            held, *parts = (float(cell.replace(",", "")) for cell in row[2:8])
            assert held == pytest.approx(sum(parts), abs=1e-6)
    stretch = next(s for account in accounts for s in account.stretches if s.spent.total > 1000)
    middle = (stretch.start + stretch.end) // 2
    halves = within(stretch, 0, middle).spent + within(stretch, middle, stretch.end).spent
    assert halves == stretch.spent
    assert spent_between(accounts, 0, 10 * WEEK * 1000).total == whole


def test_a_job_of_several_nodes_holds_all_their_gpus():
    attempt = Attempt("dev-1", 1, 0, "", None, text(0), text(3600), "pod-0", gpus=8, nodes=2, updates=9)
    assert account_text(account_of([attempt])) == "16.0 GPU-hours, 100 % useful"


def test_a_killed_attempt_counts_up_to_its_last_sign_of_life(tmp_path):
    "Its file is there, and its successor has begun at the checkpoint before"
    clock = [0.0]
    sheet = Timesheet(lambda: clock[0])
    training = Headway("dev-1", "training", epochs=1)
    for seconds, update, made in ((5, 0, ""), (6, 1, ""), (46, 41, "10:00"), (66, 61, "10:00")):
        clock[0] = seconds
        checkpoint = 40 if made else None
        sheet.take(dataclasses.replace(training, update=update, checkpoint=checkpoint, checkpoint_time=made))
    first = Attempt("dev-1", 1, None, "", 3, text(0), "", "pod-1", gpus=2, updates=61, alive=text(66), namespace="dev")
    Storage().put_bytes(attempts.content(with_times(first, sheet.times())), f"{tmp_path}/dev-1/attempts/1.json")
    config = load("dev", [f"output={tmp_path}"])
    (account,) = read_histories([config]).accounts()
    assert account.spent.total == 2 * 66_000 and account.spent.lost == 0  # nobody knows yet that it is dead
    assert attempts.close_silent(Storage(), f"{tmp_path}/dev-1", 2) == [1]
    second = Attempt("dev-1", 2, 0, "", 3, text(100), text(160), "pod-2", gpus=2, updates=100, namespace="dev")
    spent = dict(starting=10_000, useful=50_000, lost=0, saving=0, idle=0)
    second = dataclasses.replace(second, spent=spent, resumed=40, marks=[])
    Storage().put_bytes(attempts.content(second), f"{tmp_path}/dev-1/attempts/2.json")
    (account,) = read_histories([config]).accounts()
    assert account.spent.total == 2 * (66_000 + 60_000)
    assert (account.spent.lost, account.waited, account.interruptions) == (2 * 21_000, 34_000, 1)


GARBAGE = [
    "at noon",
    "2026-13-01T08:00",
    "",
    -1,
    2.5,
    True,
    None,
    [],
    {},
    [[1]],
    [["1", 2]],
    {"useful": "1"},
    {"lunch": 1},
]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Attempt)])
def test_a_field_that_is_garbled_is_named(field, tmp_path):
    "Or it is a value that the field may have: then everything can be made of it"
    whole = Attempt("dev-1", 1, 0, "", None, text(100), text(160), "pod-0", gpus=1, updates=9, submitted=text(0))
    for number, value in enumerate(GARBAGE):
        values = dataclasses.asdict(whole) | {field: value}
        Storage().put_bytes(json.dumps(values).encode(), f"{tmp_path}/dev-{number}/attempts/1.json")
    for number, content in enumerate([b"[]", b"null", b"{}", b"\xff", b'{"run": "dev-1"}'], len(GARBAGE)):
        Storage().put_bytes(content, f"{tmp_path}/dev-{number}/attempts/1.json")
    histories = read_histories([load("dev", [f"output={tmp_path}"])])
    for by in KEYS:
        ledger = ledger_of(histories.accounts(), by, histories.notes)
        assert ledger_csv(ledger) and repr(ledger)
    damaged = [note for note in histories.notes if f"/attempts/1.json is left out: it is damaged: {field} is " in note]
    assert len(histories.notes) == len(damaged) + 5 and len(damaged) + len(histories.attempts) == len(GARBAGE)
    assert len(damaged) >= 6


def test_the_command_tells_of_a_damaged_file(project):
    whole = attempts.content(Attempt("dev-1", 1, 0, "", None, text(0), text(60), "pod-0", gpus=1, updates=9))
    for number, content in ((1, whole), (2, whole.replace(b'"after_until": ""', b'"after_until": "at noon"'))):
        Storage().put_bytes(content, f"{project}/outputs/dev-{number}/attempts/1.json")
    done = gpuml("ledger", cwd=project)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "dev-2" not in done.stdout.split("\n\n")[0]
    sentence = "dev-2/attempts/1.json is left out: it is damaged: after_until is 'at noon', and not a time"
    assert sentence in done.stdout
    done = gpuml("runs", cwd=project)
    assert done.returncode == 0 and sentence in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_many_runs_on_s3_are_read_with_few_requests(s3):
    requests = []

    def count(request):
        requests.append(request.method)

    attempt = Attempt("dev-1", 1, 0, "", None, text(0), text(60), "pod-0", gpus=1, updates=9)
    for i in range(60):
        place = s3.url(f"many/dev-{i}")
        for number in (1, 2):
            named = dataclasses.replace(attempt, run=f"dev-{i}", attempt=number, host=f"pod-{number}")
            Storage().put_bytes(attempts.content(named), f"{place}/attempts/{number}.json")
        Storage().put_bytes(b"{}", f"{place}/checkpoints/step-00000009/manifest.json")
    Storage().put_bytes(b"{", s3.url("many/dev-0/attempts/3.json"))
    with Proxy(s3.endpoint, count) as proxy:
        config = load("dev", [f"output={s3.url('many')}", f"data.endpoint={proxy.endpoint}"])
        histories = read_histories([config, config])
    assert sum(account.spent.total for account in histories.accounts()) == 60 * 2 * 60_000
    assert len(histories.notes) == 1 and "dev-0/attempts/3.json is left out: it is damaged" in histories.notes[0]
    assert len(requests) == 1 + 121  # a page of the list, and each file once
