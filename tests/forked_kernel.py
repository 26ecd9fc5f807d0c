"The kernel of a runner that was forked: the process that it has in reserve, see `tests.forked`"

import os
import signal
import subprocess
import time
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

from tests import forked


class Reserve:
    "A child of this process as `subprocess.Popen` shows one"

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict[str, str], cwd: str, stdin=None, stdout=1, stderr=2, **_: Any):
        (self.pid, connection), forked.reserve = forked.reserve, None
        self.returncode: int | None = None
        with connection, open(os.devnull, "rb") as nothing:
            forked.send(connection, [command, cwd, env, [0, 1, 2], None], [nothing.fileno(), stdout, stderr])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("kernel", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedKernel(LocalProvisioner):
    "Takes the reserve for the first kernel, and starts others as ever"

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        if forked.reserve is None:
            return await super().launch_kernel(cmd, **kwargs)
        parent = (
            f"--IPKernelApp.parent_handle={os.getpid()}"  # with which it ends; read from the environment at its import
        )
        self.process = Reserve([*cmd, parent], **self._scrub_kwargs(kwargs))
        self.pid = self.pgid = self.process.pid
        return self.connection_info
