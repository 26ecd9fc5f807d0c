"Waiting for what comes in its own time"

import time

from gpuml.base.retry import Clock


def until(check, seconds: float = 600.0, pause: float = 0.05):
    "What `check` answers when that is true; the time is for a machine that hangs, not for a slow one"
    end = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(pause)
    return answer


class Passing:
    "A clock on which waiting costs nothing: its seconds pass where somebody sleeps"

    def __init__(self):
        self.seconds = 0.0
        self.clock = Clock(lambda: self.seconds, self.sleep)

    def sleep(self, seconds):
        self.seconds += seconds
