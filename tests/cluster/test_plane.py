"The test bed itself: what a cluster does, this one does too"

import threading

from tests.cluster.cluster import job, phase


def test_a_job_runs_and_its_log_can_be_read_meanwhile_and_after(cluster, namespace):
    script = "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two"
    cluster.admin.create("jobs", namespace, job("j", script))
    pod = cluster.wait_pod(namespace, "j", phase("Running"))["metadata"]["name"]
    cluster.wait(lambda: cluster.admin.logs(namespace, pod) == "one\n", 10)
    followed = []
    follower = threading.Thread(target=lambda: followed.append(cluster.admin.logs(namespace, pod, follow="true")))
    follower.start()
    (cluster.agent.worker(namespace, pod).folder / "work" / "go").touch()
    assert cluster.wait_job(namespace, "j") == "Complete"
    follower.join(10)
    assert followed == ["one\ntwo\n"] == [cluster.admin.logs(namespace, pod)]
    assert cluster.admin.logs(namespace, pod, tailLines=1) == "two\n"
