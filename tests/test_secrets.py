"What must never be written is recognised by what it looks like, and ordinary texts are left alone"

import pytest

from gpuml.base.errors import ConfigError, NotebookError
from gpuml.base.loading import load
from gpuml.base.secrets import find_secret, redact, secrets
from gpuml.jobs import bundle
from gpuml.jobs.log import Log

A36 = "a1B2" * 9
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nx3Tz\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
SECRETS = [
    "pw", "p%40ss", "s3cret-and-long",  # in an address, see below
    "https://hooks.slack.com/services/T000/B000/" + "x" * 24,
    "https://discord.com/api/webhooks/1234/abcd-efgh_ijkl",
    "https://acme.webhook.office.com/webhookb2/1234@5678/IncomingWebhook/90",
    PEM, JWT, "AKIA" + "IOSFODNN7EXAMPLE", f"ghp_{A36}", f"github_pat_{A36}", f"hf_{A36}", "glpat-" + "x" * 20,
    "xoxb-1234567890-abcdef", f"sk-{A36}", f"sk-proj-{A36}", f"sk-ant-{A36}", "AIza" + "x" * 35, f"npm_{A36}", "dapi" + "0" * 32,
]  # fmt: skip
ORDINARY = [
    "s3://models/production/run-1", "http://mlflow:5000/#/experiments/1", "file:///home/ada/a:b", "sqlite:////work/mlflow.db",
    "postgres://ada@db:5432/tickets", "https://host:8443/a@b", "postgres://ada:{password}@db", "postgres://ada:$PASSWORD@db",
    "f(host='http://127.0.0.1:5000', mail='ada@example.com')", "2f6a6990ac0285b3557625fb2bcf2b84", "897ca38", "task-force of one",
    "sk-learn and scikit-learn-contrib-something-long", "risk-assessment-documentation-of-2026", "a ghp_ prefix", "AKIA", "eyJ",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "-----BEGIN CERTIFICATE-----", "hf_hub_download(repo)",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_it_is_hidden_wherever_it_stands(secret):
    text = f"postgres://ada:{secret}@db/tickets" if secret in SECRETS[:3] else secret
    for place in (text, f"key='{text}'", f'{{"url": "{text}"}}', f"connected to {text}, and more"):
        shown = redact({"text": [place]}, {})["text"][0]
        assert find_secret(place) and secret not in shown and "[hidden]" in shown
        assert shown.replace("[hidden]", secret) == place, "nothing else is taken away"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_are_left_alone(text):
    assert find_secret(text) == "" and redact(text, {}) == text


def test_values_are_hidden_by_themselves_too():
    "A variable with any name: its value, and the password in it"
    hidden = secrets(
        {"DATABASE_URL": "postgres://ada:correct-horse@db", "SLACK_WEBHOOK": "https://chat.example.com/T0/B0"}
    )
    assert redact("login with correct-horse failed", hidden) == "login with [DATABASE_URL] failed"
    assert redact("posting to https://chat.example.com/T0/B0", hidden) == "posting to [SLACK_WEBHOOK]"
    assert secrets({"TOKENIZERS_PARALLELISM": "false-or-true", "HOME": "/home/ada-lovelace"}) == {}


def test_a_secret_that_comes_in_pieces(capsys):
    "Over the borders of what a cell prints at a time"
    log = Log(None, {})
    for piece in ("connecting to postgres://ada:cor", "rect-hor", "se@db\n" + PEM[:40], PEM[40:] + "\nready\n"):
        log.write(piece, "stdout")
    log.end()
    printed = capsys.readouterr().out
    assert "correct-horse" not in printed and "postgres://ada:[hidden]@db" in printed and "ready" in printed


@pytest.mark.parametrize(
    "override",
    ["compute.env={DB: 'postgres://ada:pw@db'}", "compute.env={SLACK_WEBHOOK: x}", f"compute.env={{A: 'hf_{A36}'}}"],
)
def test_a_config_holds_none(project, override):
    with pytest.raises(ConfigError, match="compute.env: credentials belong in the environment") as error:
        load("dev", [override])
    assert ":pw@" not in str(error.value) and A36 not in str(error.value)


def test_a_bundle_holds_none():
    with pytest.raises(
        NotebookError, match=r"lib/db.py:2: what looks like a password or a key stands in it: cor…"
    ) as error:
        bundle._check_contents({"lib/db.py": b"import os\nurl = 'postgres://ada:correct-horse@db'\n"}, bundle.LIMIT)
    assert "correct" not in str(error.value)
    bundle._check_contents({"data/a.csv": b"text,label\nsee ftp://a:b@c,x\n"}, bundle.LIMIT)


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "a.",
        "a://",
        "://a:",
        "eyJ-",
        "eyJ.",
        "sk-",
        "sk-a-",
        "https://a.",
        "xox",
        "-----BEGIN ",
    ],
)
def test_a_long_line_is_looked_at_in_linear_time(piece):
    "In quadratic time this would take most of an hour"
    text = piece * (500_000 // len(piece))
    assert redact(text, {}) == text
