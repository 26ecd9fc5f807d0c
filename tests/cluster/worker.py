"One pod on a node of the agent's: its process, and what is reported of it"

import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from gpuml.cluster.quantity import amount_of
from tests.cluster.api import ApiError
from tests.cluster.environment import ConfigError, expand, variables, write_volumes

ROOT = Path(__file__).parent.parent.parent
ISOLATED = ["unshare", "--mount", "--pid", "--uts", "sh", "-c", 'setpriv --pdeathsig KILL "$@"; exit $?', "sh"]
PULL_BACK_OFF, CONFIG_RETRY = 5.0, 1.0  # seconds; a kubelet takes 10 and more


class Stopped(Exception):
    "The pod is deleted, or its node lost, before its process started"


class Worker(threading.Thread):
    "One pod, from being bound to its end. Its process ends with this thread"

    def __init__(self, agent, pod: dict):
        super().__init__(daemon=True)
        self.agent, self.api, self.pod, self.spec = agent, agent.api, pod, pod["spec"]
        self.namespace, self.name, self.uid = (pod["metadata"][key] for key in ("namespace", "name", "uid"))
        self.node, self.container = self.spec["nodeName"], self.spec["containers"][0]
        self.folder = agent.folder / f"{self.name}-{self.uid[:8]}"
        self.isolated = agent.isolated
        self.inside = Path("/pod") if self.isolated else self.folder  # the folder as the pod sees it
        self.security = self.spec.get("securityContext", {}) | self.container.get("securityContext", {})
        self.process, self.main, self.started_at = None, None, None
        self.kill_at, self.told, self.abandoned, self.changed = None, False, False, threading.Event()
        self.bound_at, self.waiting = now(), "ContainerCreating"
        self.end_as, self.evicted = {}, {}  # how the end is reported, if not by the exit code alone
        self.lines, self.ended, self.more = [], False, threading.Condition()  # the log: (time, line)

    def run(self) -> None:
        for part in ("home", "tmp", "work", "root"):
            (self.folder / part).mkdir(parents=True)
            (self.folder / part).chmod(0o777)  # the pod's user writes there
        try:
            self._wait("ContainerCreating")
            self._pull_image()
            self._start(*self._configure())
            self._report_end(self._await_end())
        except Stopped:
            pass
        with self.more:
            self.ended = True
            self.more.notify_all()
        if self.kill_at is not None and not self.abandoned:
            self.delete()

    # What the agent says to it

    def terminate(self, grace: float) -> None:
        "SIGTERM now, SIGKILL after the grace period"
        kill_at = time.monotonic() + grace
        self.kill_at = kill_at if self.kill_at is None else min(self.kill_at, kill_at)
        self.changed.set()
        self._say_stop()
        if self.ended:
            self.delete()

    def _say_stop(self) -> None:
        "SIGTERM, once"
        with self.more:
            first = self.main and not self.told
            self.told = self.told or first
        if first:
            self._signal(signal.SIGTERM)
            self._event("Killing", f"Stopping container {self.container['name']}")

    def abandon(self) -> None:
        "The process ends at once, and nothing is reported"
        self.abandoned = self.abandoned or not self.ended
        self.changed.set()
        self._signal(signal.SIGKILL)

    def evict(self) -> None:
        message = f"The node was low on resource: memory. Container {self.container['name']} was using too much."
        self.evicted = {"reason": "Evicted", "message": message}
        self._event("Evicted", message, "Warning")
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        "Its processes stand still until `thaw`, so that whoever looks on or acts is in time, on any machine"
        self._to_each(signal.SIGSTOP)

    def thaw(self) -> None:
        "They go on; signals that came meanwhile are heard now"
        self._to_each(signal.SIGCONT)

    def _to_each(self, number: int) -> None:
        for process in [self.main, *self.main.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def report_after_loss(self) -> None:
        "What a kubelet says of a container whose end it has not seen"
        if not self.abandoned:  # it was reported in time
            return
        self.join(60)
        self.abandoned = False
        self.end_as = {"reason": "ContainerStatusUnknown", "message": "The container could not be located"}
        self._report_end(137)
        if "deletionTimestamp" in self.api.get("pods", self.namespace, self.name)["metadata"]:
            self.delete()

    def delete(self) -> None:
        "The last thing: the pod's object goes, and its name is free"
        try:
            self.api.delete("pods", self.namespace, self.name, gracePeriodSeconds=0, preconditions={"uid": self.uid})
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    # Before the process

    def _pause(self, seconds: float) -> None:
        if self.changed.wait(seconds):
            raise Stopped

    def _pull_image(self) -> None:
        image = self.container["image"]
        if "no-such-image" not in image:
            self._event("Pulled", f'Container image "{image}" already present on machine')
            return
        failure = f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": {image}'
        failure = f"rpc error: code = NotFound desc = {failure}: not found"
        while True:
            self._event("Pulling", f'Pulling image "{image}"')
            self._event("Failed", f'Failed to pull image "{image}": {failure}', "Warning")
            self._event("Failed", "Error: ErrImagePull", "Warning")
            self._wait("ErrImagePull", failure)
            self._pause(1)
            self._event("BackOff", f'Back-off pulling image "{image}"')
            self._event("Failed", "Error: ImagePullBackOff", "Warning")
            self._wait("ImagePullBackOff", f'Back-off pulling image "{image}"')
            self._pause(PULL_BACK_OFF)

    def _configure(self) -> tuple[dict[str, Path], dict[str, str]]:
        "Volumes and environment, once what they need is there"
        image = {"HOSTNAME": self.name, "HOME": str(self.inside / "home"), "TMPDIR": str(self.inside / "tmp")}
        if not self.isolated:
            image["GPUML_TERMINATION_LOG"] = str(self.folder / "termination-log")
        image |= self.agent.image
        said = None
        while True:
            try:
                return write_volumes(self.api, self.pod, self.folder / "volumes"), variables(self.api, self.pod, image)
            except ConfigError as error:
                if said != str(error):
                    said = str(error)
                    self._event("Failed", f"Error: {said}", "Warning")
                    self._wait("CreateContainerConfigError", said)
                self._pause(CONFIG_RETRY)

    # The process

    def _start(self, volumes: dict[str, Path], environment: dict[str, str]) -> None:
        command = [*(self.container.get("command") or self.agent.entrypoint), *self.container.get("args", [])]
        command = [expand(word, environment) for word in command]
        self._check_command(command[0], environment)
        workdir = Path(self.container.get("workingDir") or self.inside / "work")
        (self.folder / "termination-log").touch()
        (self.folder / "termination-log").chmod(0o666)
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._isolation(volumes, workdir), *command],
            cwd=workdir if workdir.is_dir() else self.folder / "work",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()
        self.main = self._main_process()
        self.started_at = now()
        self._event("Created", f"Created container {self.container['name']}")
        self._event("Started", f"Started container {self.container['name']}")
        self._report("Running", {"running": {"startedAt": self.started_at}})
        if self.abandoned:  # while it was starting
            self._signal(signal.SIGKILL)
        elif self.kill_at is not None:
            self._say_stop()

    def _check_command(self, program: str, environment: dict[str, str]) -> None:
        in_volume = any(Path(program).is_relative_to(m["mountPath"]) for m in self.container.get("volumeMounts", []))
        if in_volume or shutil.which(program, path=environment["PATH"]):
            return
        failure = f'exec: "{program}": executable file not found in $PATH: unknown'
        self.end_as = {"reason": "StartError", "message": failure}
        self._event("Failed", f"Error: {failure}", "Warning")
        self._report_end(128)
        raise Stopped

    def _isolation(self, volumes: dict[str, Path], workdir: Path) -> list[str]:
        "What comes before the command where it gets namespaces of its own"
        if not self.isolated:
            return []
        names = {"localhost": "127.0.0.1", self.name: "127.0.0.1", **self.agent.services}
        hosts = self.folder / "hosts"
        hosts.write_text("".join(f"{address}\t{name}\n" for name, address in names.items()))
        mode = "ro" if self.security.get("readOnlyRootFilesystem") else "rw"
        mounts = [(self.folder, self.inside, mode), (hosts, "/etc/hosts", mode)]
        mounts += [(self.folder / "termination-log", "/dev/termination-log", "rw")]
        for mount in self.container.get("volumeMounts", []):
            source = volumes[mount["name"]] / mount.get("subPath", "")
            mounts.append((source, mount["mountPath"], "ro" if mount.get("readOnly") else "rw"))
        for folder in (ROOT, Path(sys.base_prefix)):  # what an image would have: not to be hidden by a volume
            if any(folder.is_relative_to(target) for _, target, _ in mounts):
                mounts.append((folder, folder, mode))
        user = self.security.get("runAsUser", 0) if for_any_user() else 0
        settings = [self.folder / "root", mode, f"{user}:{self.security.get('runAsGroup', 0)}"]
        settings += [self.name, workdir, self.folder / "started", *(part for mount in mounts for part in mount), "--"]
        return [*ISOLATED, *map(str, [Path(__file__).with_name("pod.sh"), *settings])]

    def _main_process(self) -> psutil.Process | None:
        "The process that gets the signals: number 1 of the pod, once its namespaces are made"
        outer = psutil.Process(self.process.pid)
        if not self.isolated:
            return outer
        while not (self.folder / "started").exists() and self.process.poll() is None:
            time.sleep(0.01)
        try:
            return next(iter(outer.children()), None)
        except psutil.NoSuchProcess:  # it has ended already
            return None

    def _read_log(self) -> None:
        for line in self.process.stdout:
            with self.more:
                self.lines.append((precise_now(), line if line.endswith(b"\n") else line + b"\n"))
                self.more.notify_all()

    def _signal(self, number: int) -> None:
        if not self.main or self.ended:
            return
        try:
            if number == signal.SIGKILL and not self.isolated:
                os.killpg(self.process.pid, number)
            else:
                self.main.send_signal(number)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass

    def _await_end(self) -> int:
        "The exit code; meanwhile the grace period and the memory limit are kept"
        limit = self.container.get("resources", {}).get("limits", {}).get("memory")
        while True:
            try:
                code = self.process.wait(0.05)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                if self.kill_at is not None and time.monotonic() > self.kill_at:
                    self._signal(signal.SIGKILL)
                if limit and self._memory() > amount_of(limit):
                    self.end_as = {"reason": "OOMKilled"}
                    self._signal(signal.SIGKILL)

    def _memory(self) -> int:
        "Bytes in use, less those of files: what the kernel can't take back"
        used = 0
        try:
            for process in [self.main, *self.main.children(recursive=True)]:
                memory = process.memory_info()
                used += memory.rss - memory.shared
        except (AttributeError, psutil.NoSuchProcess):
            pass  # one has ended meanwhile
        return used

    # What is reported

    def _wait(self, reason: str, message: str | None = None) -> None:
        self.waiting = reason
        self._report("Pending", {"waiting": {"reason": reason, **({"message": message} if message else {})}})

    def _report_end(self, code: int) -> None:
        if self.process:
            if not self.isolated:
                self._signal(signal.SIGKILL)  # what the main process left behind
            self.reader.join(60)
        log = self.folder / "termination-log"
        message = log.read_bytes()[-4096:].decode(errors="replace") if log.exists() else ""
        if code and not message and self.container.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            message = b"".join(line for _, line in self.lines[-80:])[-2048:].decode(errors="replace")
        state = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
        state |= {"startedAt": self.started_at, "finishedAt": now(), **self.end_as}
        self._report("Failed" if code or self.evicted else "Succeeded", {"terminated": state}, **self.evicted)

    def _report(self, phase: str, state: dict, **more) -> None:
        "The pod's status, as far as it is the kubelet's"
        if self.abandoned:
            return
        ready = phase == "Running"
        unready = {} if ready else {"reason": "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"}
        readiness = {"status": str(ready), "lastTransitionTime": now(), **unready}
        conditions = [{"type": "Initialized", "status": "True"}]
        conditions += [{"type": kind, **readiness} for kind in ("Ready", "ContainersReady")]
        if more:
            conditions.append({"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"})
        container = {"name": self.container["name"], "image": self.container["image"], "imageID": "", "restartCount": 0}
        container |= {"ready": ready, "started": ready, "state": state}
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container], **more}
        status |= {"hostIP": "127.0.0.1", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
        body = {"metadata": {"uid": self.uid}, "status": {"startTime": self.bound_at, **status}}
        try:
            self.api.patch("pods", self.namespace, self.name, body, "status", kind="strategic")
        except ApiError as error:
            if error.status not in (404, 409):  # the pod is gone, or it is another one
                raise

    def _event(self, reason: str, message: str, kind: str = "Normal") -> None:
        about = {"apiVersion": "v1", "kind": "Pod", "namespace": self.namespace, "name": self.name, "uid": self.uid}
        body = {"metadata": {"generateName": f"{self.name}."}, "involvedObject": about, "type": kind, "count": 1}
        body |= {"reason": reason, "message": message, "source": {"component": "kubelet", "host": self.node}}
        try:
            self.api.create("events", self.namespace, {**body, "firstTimestamp": now(), "lastTimestamp": now()})
        except ApiError:
            pass  # the namespace is being deleted


def for_any_user() -> bool:
    "Whether any user can get to the checkout, and to Python"
    folders = [Path(sys.base_prefix).resolve(), ROOT]
    return all(place.stat().st_mode & 0o001 for folder in folders for place in (folder, *folder.parents))


def now() -> str:
    return precise_now()[:19] + "Z"


def precise_now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
