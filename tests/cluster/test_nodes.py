"The real nodes themselves: names, services, logs, devices, and nothing that stays"

import ssl
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import job, phase
from tests.cluster.nodes import footprint, machine
from tests.cluster.nodes.devices import HOST

IMAGE = "gpuml-train:test"


def run_pod(real, namespace, name, command, node, labels=None, **resources):
    "A Job's pod on a node, without a GPU"
    body = job(name, command, gpus=0, image=IMAGE, nodeName=node)
    template = body["spec"]["template"]
    template["metadata"] = {"labels": labels or {}}
    template["spec"]["containers"][0]["resources"] = {"limits": resources}
    real.admin.create("jobs", namespace, body)


def log_of(real, namespace, name):
    "What a Job's pod has written by its end"
    assert real.wait_job(namespace, name) == "Complete", real.kubectl("logs", f"job/{name}", namespace=namespace).stdout
    return real.kubectl("logs", f"job/{name}", namespace=namespace).stdout


def test_a_service_by_its_name_from_another_node(real, real_namespace):
    serve = "echo hello > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"
    run_pod(real, real_namespace, "server", serve, "node-1", {"app": "web"})
    service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    real.admin.create("services", real_namespace, {"metadata": {"name": "web"}, "spec": service})
    real.wait_pod(real_namespace, "server", phase("Running"))
    code = "import urllib.request as r; print(r.urlopen('http://web', timeout=5).read().decode())"
    ask = f'for i in $(seq 300); do python -c "{code}" && exit; sleep 1; done; exit 1'
    run_pod(real, real_namespace, "client", ask, "node-2", **{HOST: 1})
    assert "hello" in log_of(real, real_namespace, "client")


def test_a_pod_reaches_the_api_server_by_its_service(real, real_namespace):
    code = "import ssl, urllib.request as r; c = ssl.create_default_context(cafile='/ca/ca.crt'); "
    code += "print(r.urlopen('https://kubernetes.default.svc/version', context=c).read().decode())"
    body = job("client", ["python", "-c", code], gpus=0, image=IMAGE)
    spec = body["spec"]["template"]["spec"]
    spec["volumes"] = [{"name": "ca", "configMap": {"name": "kube-root-ca.crt"}}]
    spec["containers"][0]["volumeMounts"] = [{"name": "ca", "mountPath": "/ca"}]
    spec["containers"][0]["resources"] = {"limits": {HOST: 1}}
    real.admin.create("jobs", real_namespace, body)
    assert f'"minor": "{real.plane.version[1]}"' in log_of(real, real_namespace, "client")


def test_logs_through_the_kubelet_for_those_who_may(real, real_namespace):
    run_pod(real, real_namespace, "talks", "for i in 1 2 3; do echo line $i; sleep 0.5; done", "node-2")
    real.wait_pod(real_namespace, "talks", lambda pod: pod["status"]["phase"] != "Pending")
    followed = real.kubectl("logs", "--follow", "job/talks", namespace=real_namespace).stdout
    assert followed.splitlines() == ["line 1", "line 2", "line 3"]
    trust = ssl.create_default_context(cafile=str(real.plane.certificate))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"https://{real.nodes['node-2'].address}:10250/pods", context=trust)


def test_a_device_that_is_not_well_is_not_given(real):
    def allocatable():
        return real.admin.get("nodes", "", "node-2")["status"]["allocatable"]["nvidia.com/gpu"]

    assert allocatable() == "1"
    real.nodes["node-2"].gpus.set(0, unhealthy=1)
    try:
        real.wait(lambda: allocatable() == "0", 20, "no GPU to give")
    finally:
        real.nodes["node-2"].gpus.set(1)
    real.wait(lambda: allocatable() == "1", 20, "a GPU to give")


def is_running(pid):
    "A process whose parent is gone may stay in the list for a while, after its end"
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path):
    "Without a control plane: a node's network and mounts, and a process in its cgroup and network"
    if reason := machine.lacks():
        pytest.skip(reason)
    script = """
        import os, subprocess, time
        from pathlib import Path
        from tests.cluster.nodes import footprint, machine
        from tests.cluster.nodes.programs import Programs
        folder, network = footprint.begin()
        network.start()
        programs = Programs(folder)
        programs.start_namespace(network.add_node(1, []), folder / "kubelet")
        group = footprint.group_name(network.number, 1)
        machine.make_group(group)
        child = subprocess.Popen([*programs.entry, "sleep", "12345"], start_new_session=True)
        for root in machine.groups():
            (root / group / "cgroup.procs").write_text(str(child.pid))
        print(child.pid, flush=True)
        time.sleep(300)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait(600)
    assert is_running(child) and Path(f"/run/netns/gpuml-{process.pid}-1").exists()
    command = [sys.executable, "-c", "from tests.cluster.nodes import footprint; footprint.clear(footprint.begin()[0])"]
    subprocess.run(command, check=True)
    assert not is_running(child) and not (machine.runs() / str(process.pid)).exists()
    network = subprocess.check_output(["ip", "-o", "link"], text=True) + subprocess.check_output(
        ["ip", "netns"], text=True
    )
    assert str(process.pid) not in network and not machine.processes_in(footprint.group_name(process.pid, 1))
