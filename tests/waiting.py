"Waiting for what comes in its own time"

import time


def until(check, seconds: float = 600.0, pause: float = 0.05):
    "What `check` answers when that is true; the time is for a machine that hangs, not for a slow one"
    end = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(pause)
    return answer
