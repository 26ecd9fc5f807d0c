"A project whose `prod` is a namespace of the tests' cluster, with data and output on a real S3 server"

import json
import time
from contextlib import contextmanager

from gpuml.base.loading import load
from gpuml.base.storage import Storage
from gpuml.cluster.sending import submit
from tests.cluster.cluster import phase
from tests.conftest import OFFLINE, ROOT, rows
from tests.s3 import KEY, SECRET
from tests.standing import make_calm

PROD = """\
data:
  train: {data}
  max_length: 24
  endpoint: {endpoint}
  cache: {cache}
model:
  name: {model}
train:
  epochs: {epochs}
  batch_size: 8
  learning_rate: 2e-4
tracking:
  uri: {tracking}
  experiment: {namespace}
  log_model: false
compute:
  image: gpuml-train:test
  namespace: {namespace}
  priority_class: {priority}
  cpu: 100m
  memory: 4Gi
  disk: 1Gi
  grace: 60
output: {output}
"""


class Site:
    "A project whose `prod` is a namespace of the cluster, with data on S3"

    def __init__(self, cluster, namespace, folder, s3, monkeypatch):
        self.cluster, self.namespace, self.folder, self.s3 = cluster, namespace, folder, s3
        self.notebook = folder / "nbs" / "train.ipynb"
        self.notebook.parent.mkdir(exist_ok=True)
        self.notebook.write_text((ROOT / "nbs" / "train.ipynb").read_text())
        self.tracking = "http://mlflow:5000"
        monkeypatch.setenv("KUBECONFIG", str(cluster.plane.kubeconfig("admin", namespace)))
        cluster.secret(namespace, "gpuml-s3", AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
        cluster.agent.image["HF_HUB_OFFLINE"] = "1"
        cluster.agent.image["OMP_NUM_THREADS"] = "1"
        self.put_data("a.csv", rows(24))
        self.write("prod", "gpuml-prod", 2)

    def put_data(self, name, found):
        text = "text,label\n" + "".join(f"{t},{label}\n" for t, label in found)
        Storage(self.s3.endpoint).put_bytes(text.encode(), self.s3.url(f"data/{name}"))

    def write(self, name, priority, epochs):
        "A config of this namespace"
        text = PROD.format(
            data=self.s3.url("data/"), endpoint=self.s3.endpoint, cache=self.folder / "cache", model=OFFLINE, epochs=epochs, tracking=self.tracking,
            namespace=self.namespace, priority=priority, output=self.s3.url("out"),
        )  # fmt: skip
        (self.folder / "config" / f"{name}.yaml").write_text(text)

    def add_cell(self, source, before=None):
        "A cell of the notebook, above the first one with a text in it, or at the end; saved"
        tree = json.loads(self.notebook.read_text())
        cell = {
            "cell_type": "code",
            "id": "added",
            "metadata": {},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        found = (i for i, there in enumerate(tree["cells"]) if before and before in "".join(there["source"]))
        tree["cells"].insert(next(found, len(tree["cells"])), cell)
        self.notebook.write_text(json.dumps(tree))

    def calm(self, seconds):
        "An update of its jobs takes so long at least"
        make_calm(self.notebook, seconds)

    def config(self, *overrides, of="prod"):
        return load(of, overrides)

    def submit(self, *overrides, of="prod", **more):
        return submit(self.config(*overrides, of=of), self.notebook, **more)

    def wait_update(self, job):
        "Until its training has done an update: from then on it has something to save"
        self.cluster.wait(lambda: (how := job.status.progress) and "update" in how and "update 0" not in how, 300)

    def worker(self, job):
        "What runs a job's pod"
        pod = self.cluster.wait_pod(self.namespace, job.run_id, phase("Running"))
        return self.cluster.agent.worker(self.namespace, pod["metadata"]["name"])

    @contextmanager
    def standing(self, job):
        "Its pods stand still until one of them was told to end, by what is done inside: it is not over before"
        pods = filter(phase("Running"), self.cluster.pods(self.namespace, job.run_id))
        workers = [self.cluster.agent.worker(self.namespace, pod["metadata"]["name"]) for pod in pods]
        for worker in workers:
            worker.freeze()
        yield
        self.cluster.wait_pod(self.namespace, job.run_id, lambda pod: "deletionTimestamp" in pod["metadata"], 120)
        for worker in workers:
            worker.thaw()

    def why(self, job, part, seconds=120):
        "The state, once its sentence has the part in it"
        said, begun = [], time.monotonic()

        def look():
            said.append(str(job.status))
            return part in said[-1]

        try:
            self.cluster.wait(look, seconds)
        except AssertionError:
            raise AssertionError(f"never said {part!r}; said: {list(dict.fromkeys(said))}") from None
        print(f"{time.monotonic() - begun:.1f} s: {said[-1]}")
        return said[-1]
