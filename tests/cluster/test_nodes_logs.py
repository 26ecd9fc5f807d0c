"Logs in files that a kubelet rotates while `gpuml logs --follow` reads them"

import re
import time

import pytest

from tests.cluster.nodes.scene import on, own_nodes

LINES = 12_000
PRINTS = f"""\
import time
for i in range({LINES}):
    print(f"line {{i:06}} " + "x" * 80, flush=True)
    time.sleep(0.001)
"""
ROTATION = {"containerLogMaxSize": "100Ki", "containerLogMaxFiles": 3, "containerLogMonitorInterval": "3s"}


@pytest.fixture(scope="module")
def rotating(real):
    with own_nodes(real, 1, **ROTATION) as (node,):
        yield node


def followed(job):
    "What `gpuml logs --follow` prints, without what it says itself"
    parts = []
    job.follow(parts.append)
    return "".join(part for part in parts if not part.startswith(f"[{job.run_id} "))


def test_no_line_is_lost_or_printed_twice_while_files_are_rotated(scene, rotating, real):
    job = scene.start("rotates", ["python", "-c", PRINTS], **on(rotating))
    begun = time.monotonic()
    printed = followed(job)
    assert [int(n) for n in re.findall(r"line (\d{6})", printed)] == [*range(LINES)]
    files = [*(rotating.folder / "logs").glob(f"{scene.namespace}_rotates-*/train/0.log*")]
    left = real.kubectl("logs", "job/rotates", namespace=scene.namespace).stdout.count("\n")
    print(f"{len(files)} files in {time.monotonic() - begun:.0f} s; the newest has {left} of {LINES} lines")
    assert len(files) == 3 and left < LINES / 2
