"""S3 keys that expire while a run goes on (fsspec/s3fs#500): read again where they come from, waited for, and the work kept

A real S3 server, and a proxy in front of it that refuses requests signed with keys that have expired.
"""

import os

import pytest

from gpuml.base.errors import DataError, Exit, OutputError
from gpuml.base.storage import Storage
from tests.faults import Proxy, s3_error
from tests.s3 import KEY, READER, READER_SECRET, SECRET

EXPIRED = s3_error(400, "ExpiredToken", "The provided token has expired.")
REVOKED = s3_error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")


@pytest.fixture
def proxy(s3):
    with Proxy(s3.endpoint) as proxy:
        yield proxy


def keys_file(path, key, secret):
    new = path.with_name("new")
    new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    new.rename(path)


def secret_folder(path, key, secret):
    "As the kubelet does: a link to a folder, which another one replaces as a whole"
    folder, link = path.with_name(f"of {key}"), path.with_name("link")
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret)
    link.symlink_to(folder)
    link.rename(path)


@pytest.mark.parametrize("source, fault", [("file", EXPIRED), ("Secret", REVOKED)])
def test_renewed_keys_are_read_again(source, fault, s3, proxy, tmp_path, monkeypatch):
    write = keys_file if source == "file" else secret_folder
    write(tmp_path / "keys", KEY, SECRET)
    if source == "file":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    else:
        monkeypatch.setenv("GPUML_S3_KEYS", str(tmp_path / "keys"))
    said = []

    def say(text):
        if not said:
            write(tmp_path / "keys", READER, READER_SECRET)
        said.append(text)

    storage = Storage(proxy.endpoint, say=say, patience=60)
    storage.put_bytes(b"whole", s3.url("a"))
    proxy.plan = lambda request: fault if request.key == KEY else None
    assert storage.read_now(s3.url("a")) == b"whole"
    assert any("refuses the keys that it accepted until now" in text and "keys" in text for text in said), said
    assert not any(secret in text for secret in (SECRET, READER_SECRET) for text in said)


REFUSED = {  # what answers the second write, where new keys may come from; exit code, words, and the most requests
    "nobody renews them": (EXPIRED, True, 75, "refuses the keys that it accepted until now (400 ExpiredToken) for ", 100),
    "nothing can": (EXPIRED, False, 75, "refuses the keys that it accepted until now (400 ExpiredToken); renew them", 2),
    "no right": (s3_error(403, "AccessDenied"), True, 77, "is not permitted to write it", 1),
    "one object only": (s3_error(403, "SignatureDoesNotMatch"), True, 77, "AWS_SECRET_ACCESS_KEY is not the secret", 4),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_are_not_renewed_keep_the_work(name, s3, proxy, tmp_path, monkeypatch):
    "75, and not 77, where the run has worked with them; what is no matter of keys is refused at once"
    fault, may_come, code, words, most = REFUSED[name]
    if may_come:
        secret_folder(tmp_path / "keys", KEY, SECRET)
        monkeypatch.setenv("GPUML_S3_KEYS", str(tmp_path / "keys"))
    Storage(proxy.endpoint).put_bytes(b"x", s3.url("a"))
    one = name == "one object only"
    proxy.plan = lambda request: fault if not one or "odd" in request.path else None
    before = len(proxy.requests)
    with pytest.raises(OutputError) as refused:  # another connection of the same process
        Storage(proxy.endpoint, patience=2 if name == "nobody renews them" else 600).put_bytes(b"y", s3.url("odd"))
    assert (refused.value.exit_code, words in str(refused.value)) == (code, True), refused.value
    assert code == Exit.NOT_PERMITTED or str(refused.value).endswith("; renew them and run it again, and it goes on")
    assert len(proxy.requests) - before <= most


def test_keys_that_never_were_accepted_are_refused_at_once(s3, proxy, tmp_path, monkeypatch):
    secret_folder(tmp_path / "keys", KEY, SECRET)
    monkeypatch.setenv("GPUML_S3_KEYS", str(tmp_path / "keys"))
    proxy.plan = lambda request: EXPIRED
    with pytest.raises(DataError, match="AWS_SESSION_TOKEN has expired") as refused:
        Storage(proxy.endpoint).find(s3.url("a"))
    assert refused.value.exit_code == Exit.NOT_PERMITTED and len(proxy.requests) == 1
    assert os.environ["AWS_ACCESS_KEY_ID"] == KEY
