"The server of forked processes outlives whoever asks it"

import fcntl
import os
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


def test_descriptors_keep_their_numbers_however_high():
    "A process of tests may have opened hundreds of files before"
    pipes = [os.pipe() for _ in range(4)]
    ends = [fcntl.fcntl(writing, fcntl.F_DUPFD, 260) for _, writing in pipes]
    code = "import os, sys; [os.write(int(number), number.encode()) for number in sys.argv[1:]]"
    done = subprocess.run([forked.python(), "-c", code, *map(str, ends)], pass_fds=ends)
    assert done.returncode == 0
    assert [os.read(reading, 99) for reading, _ in pipes] == [str(end).encode() for end in ends]
    for number in (*ends, *(number for pipe in pipes for number in pipe)):
        os.close(number)
