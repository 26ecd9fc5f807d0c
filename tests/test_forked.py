"The server of forked processes outlives whoever asks it"

import signal
import subprocess
import time

from tests import forked


def test_who_asks_may_be_killed_at_any_moment():
    "Before, while and after it asks: the next one is answered all the same"
    for pause in range(30):
        asking = subprocess.Popen([forked.python(), "-c", "import time; time.sleep(60)"])
        time.sleep(pause * 0.002)
        asking.send_signal(signal.SIGKILL)
        asking.wait()
    done = subprocess.run([forked.python(), "-c", "print('here')"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
