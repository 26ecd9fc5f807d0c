"What an administrator applies: renders, is valid, fits together, and holds what it says. The server's part: tests/cluster/test_access.py"

import copy
import ipaddress
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request

import pytest
import requests
from ruamel.yaml import YAML

from gpuml.base.loading import load
from gpuml.cluster.manifest import Source, manifest, run_id, yaml
from tests.conftest import ROOT, free_port
from tests.manifests import (
    OVERLAYS,
    WITH_IDLE,
    containers,
    find,
    matches,
    mlflow_server,
    pod_of,
    prepared,
    ready,
    render,
    render_all,
    started_as,
)
from tests.schemas import validate  # noqa: F401  a fixture
from tests.test_job import VERSIONS
from tests.waiting import until

POLICIES = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
IMAGE = "compute.image=registry.example.com/gpuml-train:0.1.0"


@pytest.fixture(scope="module")
def overlays(tmp_path_factory):
    "Every overlay, rendered"
    return render_all(tmp_path_factory.mktemp("administrator"))


def pods(manifests):
    return [(f"{m['kind']}/{m['metadata']['name']}", m, pod_of(m)) for m in manifests if pod_of(m)]


def test_overlays(overlays):
    "Each object once, in its place; what distinguishes the overlays"
    kinds = {}
    for name, manifests in overlays.items():
        names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in manifests]
        assert len(set(names)) == len(names), name
        kinds[name] = {kind for kind, _, _ in names}
        spaces = {n for _, n, _ in names} - {None}
        assert spaces == {"gpuml-dev", "gpuml-prod", "gpuml-system"}, name
    has = {name: {pod for pod, _, _ in pods(manifests)} for name, manifests in overlays.items()}
    team = {"Deployment/mlflow", "StatefulSet/postgres", "StatefulSet/jupyter"}
    single = {"Deployment/mlflow", "StatefulSet/minio", "Job/buckets", "StatefulSet/jupyter"}
    expected = {"single-node": single, "team": team, "kueue": team}
    assert has == expected | {WITH_IDLE: team | {"Deployment/idle", "Deployment/after"}}
    assert all(kinds[name] >= POLICIES for name in OVERLAYS)
    assert [name for name in OVERLAYS if "ClusterQueue" in kinds[name]] == ["kueue"]


@pytest.fixture(scope="module")
def known(overlays):
    "Of each overlay its objects as YAML, but for Kueue's own kinds, whose schema is not Kubernetes'"
    return {
        name: {yaml([m]) for m in manifests if not m["apiVersion"].startswith("kueue.")}
        for name, manifests in overlays.items()
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_valid_by_the_schema_of(version, overlays, known, validate):  # noqa: F811
    "Every object of every overlay"
    objects = set.union(*known.values())
    assert validate(version, "---\n".join(sorted(objects))) == [None] * len(objects)
    wrong = copy.deepcopy(find(overlays["team"], "Deployment", "mlflow"))
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert "volumeMount" in validate(version, yaml([wrong]))[0]


def test_restricted(overlays):
    "Beyond the standard that their namespaces enforce: nothing writable but volumes, limits, probes, no token"
    for manifests in overlays.values():
        for space in ("gpuml-dev", "gpuml-prod", "gpuml-system"):
            labels = find(manifests, "Namespace", space)["metadata"]["labels"]
            assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
        talking = ("StatefulSet/jupyter", "Deployment/idle", "Deployment/after")
        for what, made, pod in pods(manifests):
            assert pod["automountServiceAccountToken"] is (what in talking), what
            for container in containers(pod):
                assert container["securityContext"]["readOnlyRootFilesystem"], what
                assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys(), what
                probes = {"readinessProbe", "livenessProbe"} if "ports" in container else {"livenessProbe"}
                assert made["kind"] == "Job" or probes <= container.keys(), what


def referred(made: dict, pod: dict) -> list[tuple[str, str, str | None]]:
    "What a pod needs to start: kind, name and key"
    found = []
    for volume in pod.get("volumes", []):
        if "secret" in volume:
            found.append(("Secret", volume["secret"]["secretName"], None))
        if "configMap" in volume and not volume["configMap"].get("optional"):
            found.append(("ConfigMap", volume["configMap"]["name"], None))
        if "persistentVolumeClaim" in volume:
            found.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None))
    if "serviceAccountName" in pod:
        found.append(("ServiceAccount", pod["serviceAccountName"], None))
    for container in containers(pod):
        found += [("Secret", source["secretRef"]["name"], None) for source in container.get("envFrom", [])]
        refs = [v["valueFrom"]["secretKeyRef"] for v in container.get("env", []) if "valueFrom" in v]
        found += [("Secret", ref["name"], ref["key"]) for ref in refs if not ref.get("optional")]
    return found


@pytest.mark.parametrize("overlay", [*OVERLAYS, WITH_IDLE])
def test_what_is_named_is_there(overlay, overlays):
    "Secrets with their keys, ConfigMaps, accounts, claims, roles: nothing waits for what nobody makes"
    manifests = overlays[overlay]
    there = {(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]): m for m in manifests}
    for what, made, pod in pods(manifests):
        for kind, name, key in referred(made, pod):
            found = there[kind, made["metadata"]["namespace"], name]
            assert key is None or key in found["data"], f"{what}: {kind} {name} has no {key}"
        assert "priorityClassName" not in pod or ("PriorityClass", None, pod["priorityClassName"]) in there
        volumes = {v["name"] for v in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in made["spec"].get("volumeClaimTemplates", [])}
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, what
            known = set()  # only what stands before it
            for variable in container.get("env", []):
                assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= known, variable
                known.add(variable["name"])
    for binding in (m for m in manifests if m["kind"].endswith("RoleBinding")):
        role = binding["roleRef"]
        space = binding["metadata"].get("namespace") if role["kind"] == "Role" else None
        assert (role["kind"], space, role["name"]) in there, binding["metadata"]["name"]


def test_what_the_shipped_configs_name_is_there(overlays):
    "Namespace, class, Secret with its keys, MLflow's name: config/dev.yaml and config/prod.yaml as they are"
    for manifests in overlays.values():
        for config in (load("dev", start=ROOT), load("prod", start=ROOT)):
            c = config.compute
            find(manifests, "Namespace", c.namespace)
            find(manifests, "PriorityClass", c.priority_class)
            secret = find(manifests, "Secret", c.s3_secret, c.namespace)
            assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= secret["data"].keys()
            assert f"requests.{c.gpu_resource}" in find(manifests, "ResourceQuota", "gpus", c.namespace)["spec"]["hard"]
    assert load("prod", start=ROOT).tracking.uri == "http://mlflow:5000"


def test_what_kubernetes_makes_is_left_to_it(overlays):
    "A manifest for it would meet it: each namespace's own account and the authorities' certificates come a moment later"
    own = {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt"), ("Namespace", "default")}
    for manifests in overlays.values():
        assert not own & {(m["kind"], m["metadata"]["name"]) for m in manifests}


@pytest.mark.parametrize("service, port", [("mlflow", 5000), ("minio", 9000)])
def test_one_name_in_every_namespace(overlays, service, port):
    manifests = overlays["single-node"]
    (own,) = find(manifests, "Service", service, "gpuml-system")["spec"]["ports"]
    assert own["port"] == port
    for space in ("gpuml-dev", "gpuml-prod"):
        spec = find(manifests, "Service", service, space)["spec"]
        assert spec == {"type": "ExternalName", "externalName": f"{service}.gpuml-system.svc.cluster.local"}


def may_connect(manifests, source, target, port, protocol="TCP") -> bool:
    "What NetworkPolicies say of a connection between (namespace, pod labels), or to an address"

    def spaces(name):
        return find(manifests, "Namespace", name)["metadata"]["labels"] | {"kubernetes.io/metadata.name": name}

    def chooses(peer, place, of):
        if isinstance(place, str) or "ipBlock" in peer:
            block = peer.get("ipBlock")
            inside = (
                isinstance(place, str) and block and ipaddress.ip_address(place) in ipaddress.ip_network(block["cidr"])
            )
            return inside and not any(
                ipaddress.ip_address(place) in ipaddress.ip_network(e) for e in block.get("except", [])
            )
        there = spaces(place[0]) if place[0].startswith("gpuml-") else {"kubernetes.io/metadata.name": place[0]}
        same = matches(peer["namespaceSelector"], there) if "namespaceSelector" in peer else place[0] == of[0]
        return same and matches(peer.get("podSelector", {}), place[1])

    def open_at(place, other, kind, peers):
        if isinstance(place, str) or not place[0].startswith("gpuml-"):
            return True
        policies = [m for m in manifests if m["kind"] == "NetworkPolicy" and m["metadata"]["namespace"] == place[0]]
        chosen = [
            p["spec"]
            for p in policies
            if matches(p["spec"]["podSelector"], place[1]) and kind in p["spec"]["policyTypes"]
        ]
        return not chosen or any(
            ("ports" not in rule or (port, protocol) in [(p["port"], p.get("protocol", "TCP")) for p in rule["ports"]])
            and any(chooses(peer, other, place) for peer in rule[peers])
            for spec in chosen
            for rule in spec.get(kind.lower(), [])
        )

    return open_at(source, target, "Egress", "to") and open_at(target, source, "Ingress", "from")


JOB, PROD = ("gpuml-dev", {"job-name": "j"}), ("gpuml-prod", {"job-name": "p"})
SEVERAL, PROD_SEVERAL = (
    (space, {"app.kubernetes.io/managed-by": "gpuml", "gpuml.io/nodes": "2"}) for space in ("gpuml-dev", "gpuml-prod")
)
MLFLOW, MINIO, POSTGRES, JUPYTER, BUCKETS, IDLE = (
    ("gpuml-system", {"app.kubernetes.io/name": name})
    for name in ("mlflow", "minio", "postgres", "jupyter", "buckets", "idle")
)
DNS, STRANGER = ("kube-system", {"k8s-app": "kube-dns"}), ("default", {"app": "x"})
METADATA, HUB, API = "169.254.169.254", "52.84.1.1", "10.96.0.1"
OPEN = [
    (JOB, MLFLOW, 5000), (PROD, MLFLOW, 5000), (JUPYTER, MLFLOW, 5000), (JOB, MINIO, 9000), (PROD, MINIO, 9000),
    (JUPYTER, MINIO, 9000), (MLFLOW, MINIO, 9000), (BUCKETS, MINIO, 9000), (MLFLOW, POSTGRES, 5432), (JOB, HUB, 443),
    (PROD, HUB, 443), (JUPYTER, HUB, 443), (JUPYTER, API, 443), (JOB, DNS, 53), (PROD, DNS, 53), (MLFLOW, DNS, 53),
    (SEVERAL, SEVERAL, 29400), (SEVERAL, SEVERAL, 51234), (PROD_SEVERAL, PROD_SEVERAL, 29400), (SEVERAL, MLFLOW, 5000),
]  # fmt: skip
SHUT = [
    (JOB, POSTGRES, 5432), (PROD, POSTGRES, 5432), (JUPYTER, POSTGRES, 5432), (JOB, MINIO, 9001), (JOB, PROD, 8888),
    (PROD, JOB, 8888), (JOB, JUPYTER, 8888), (PROD, JUPYTER, 8888), (JOB, API, 443), (PROD, API, 443), (JOB, METADATA, 80), (JOB, METADATA, 443), (PROD, METADATA, 53),
    (JUPYTER, METADATA, 80), (JUPYTER, METADATA, 443), (MLFLOW, METADATA, 443), (JOB, HUB, 80), (STRANGER, MLFLOW, 5000),
    (STRANGER, MINIO, 9000), (STRANGER, JUPYTER, 8888), (STRANGER, JOB, 8888), (POSTGRES, HUB, 443), (MINIO, HUB, 443),
    (JOB, SEVERAL, 29400), (SEVERAL, JOB, 8888), (SEVERAL, PROD_SEVERAL, 29400), (PROD_SEVERAL, SEVERAL, 29400),
    (STRANGER, SEVERAL, 29400), (JUPYTER, SEVERAL, 29400), (SEVERAL, API, 443), (SEVERAL, JUPYTER, 8888),
]  # fmt: skip


@pytest.mark.parametrize("overlay", ["single-node", "team"])
def test_network(overlay, overlays):
    "Who reaches whom: by the rules of NetworkPolicy, since no network plug-in is here to ask"
    names = {"single-node": POSTGRES, "team": MINIO}
    for cases, expected in ((OPEN, True), (SHUT, False)):
        for source, target, port in cases:
            if names[overlay] in (source, target):
                continue
            if target is MINIO and source is BUCKETS and overlay == "team":
                continue
            assert may_connect(overlays[overlay], source, target, port) is expected, (source, target, port)
    assert may_connect(overlays[overlay], JOB, DNS, 53, "UDP")
    assert may_connect(overlays[overlay], MLFLOW, "10.20.30.40", 5432) is (overlay == "team")  # a managed database


def test_network_of_idle(overlays):
    "It asks Prometheus and the API server, and nobody else"
    prometheus = ("monitoring", {"app.kubernetes.io/name": "prometheus"})
    for target, port in ((prometheus, 9090), (API, 443), (API, 6443), (DNS, 53)):
        assert may_connect(overlays[WITH_IDLE], IDLE, target, port), (target, port)
    for target, port in ((MLFLOW, 5000), (METADATA, 443), (HUB, 80), (JOB, 8888), (prometheus, 22)):
        assert not may_connect(overlays[WITH_IDLE], IDLE, target, port), (target, port)
    after = ("gpuml-system", {"app.kubernetes.io/name": "after"})  # the API server alone
    assert may_connect(overlays[WITH_IDLE], after, API, 443) and may_connect(overlays[WITH_IDLE], after, DNS, 53)
    assert not any(
        may_connect(overlays[WITH_IDLE], after, *to) for to in ((prometheus, 9090), (MLFLOW, 5000), (METADATA, 443))
    )


OURS = r"registry\.example\.com/gpuml-(dev|train):[\d.]+"  # an administrator's own, whose digests nobody knows before


def test_images_are_pinned(overlays):
    "By version and digest; of MLflow's by its version alone"
    for name, manifests in overlays.items():
        for what, _, pod in pods(manifests):
            for container in containers(pod):
                pinned = r"[a-z0-9.-]+\.[a-z]+/[a-z0-9/._-]+:[\w.-]*\d[\w.-]*"
                pinned += "" if what == "Deployment/mlflow" else r"@sha256:[0-9a-f]{64}"
                assert re.fullmatch(f"{pinned}|{OURS}", container["image"]), f"{name} {what}: {container['image']}"


def test_priorities(overlays):
    "Development preempts nothing; neither is the default of a cluster that others use too"
    prod, dev = (find(overlays["team"], "PriorityClass", name) for name in ("gpuml-prod", "gpuml-dev"))
    assert prod["value"] > 0 > dev["value"] and dev["preemptionPolicy"] == "Never"
    assert not any(c.get("globalDefault") for c in (prod, dev))


def test_development_keeps_a_floor(overlays):
    for name in ("team", "kueue"):
        gpus = {
            space: int(find(overlays[name], "ResourceQuota", "gpus", space)["spec"]["hard"]["requests.nvidia.com/gpu"])
            for space in ("gpuml-dev", "gpuml-prod")
        }
        assert 0 < gpus["gpuml-prod"] < gpus["gpuml-dev"]
    queues = {}
    for queue in ("gpuml-dev", "gpuml-prod"):
        resources = find(overlays["kueue"], "ClusterQueue", queue)["spec"]["resourceGroups"][0]["flavors"][0][
            "resources"
        ]
        queues[queue] = next(r for r in resources if r["name"] == "nvidia.com/gpu")
    assert queues["gpuml-prod"]["borrowingLimit"] == "0"
    assert int(queues["gpuml-prod"]["nominalQuota"]) + int(queues["gpuml-dev"]["nominalQuota"]) == gpus["gpuml-dev"]


def test_kueue_covers_what_jobs_ask_for(overlays):
    "A job that asks for what its ClusterQueue does not cover is never admitted"
    asked = set(made_for("prod")["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"])
    for queue in ("gpuml-dev", "gpuml-prod"):
        spec = find(overlays["kueue"], "ClusterQueue", queue)["spec"]
        (group,) = spec["resourceGroups"]
        assert asked <= set(group["coveredResources"]) == {r["name"] for r in group["flavors"][0]["resources"]}
        assert find(overlays["kueue"], "LocalQueue", "gpuml", queue)["spec"]["clusterQueue"] == queue


def test_secrets(tmp_path):
    "Made once, at random, for their owner's eyes; git ignores them, and the repository has none"
    made = prepared(tmp_path)
    files = {f: f.read_text() for f in made.glob("overlays/*/secrets/*.env")}
    assert len(files) == 11 and not any("RANDOM" in text for text in files.values())
    assert all(f.stat().st_mode & 0o077 == 0 for f in files)
    values = re.findall(r"=([0-9a-f]{40})$", "\n".join(files.values()), re.M)
    assert len(values) == len(set(values)) == 7
    again = subprocess.run([made / "secrets.sh", "single-node"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {f: f.read_text() for f in files} == files
    (made / "overlays" / "team" / "secrets" / "mlflow.env").unlink()
    unfilled = subprocess.run([made / "secrets.sh", "team"], capture_output=True, text=True)
    assert unfilled.returncode == 1 and "mlflow.env" in unfilled.stdout and "yours to fill in" in unfilled.stderr
    for file in files:
        path = file.relative_to(made.parent)
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0, path
    for file in (ROOT / "k8s").rglob("*.yaml"):
        assert not re.search(r"^kind: Secret$", file.read_text(), re.M), file


MC = """\
#!/bin/sh
echo "$*" >> calls
case "$*" in
    "admin policy attach"*) [ ! -e "attached-$5" ] || exit 1; touch "attached-$5" ;;
    "admin user info minio "*) ls attached-* 2>/dev/null | grep "${5#gpuml-}" ;;
esac
exit 0
"""


def test_buckets_again_and_again(overlays, tmp_path):
    "MinIO's client is not to be had here, so a stand-in that refuses what the real one refuses: attaching twice"
    (container,) = pod_of(find(overlays["single-node"], "Job", "buckets"))["containers"]
    for user in ("development", "production", "mlflow"):
        (tmp_path / user).mkdir()
        (tmp_path / user / "AWS_ACCESS_KEY_ID").write_text(f"gpuml-{user}")
        (tmp_path / user / "AWS_SECRET_ACCESS_KEY").write_text(f"secret of {user}")
    (tmp_path / "mc").write_text(MC)
    (tmp_path / "mc").chmod(0o755)
    script = container["args"][0].replace("/keys/", f"{tmp_path}/")
    for _ in range(2):
        subprocess.run(
            [*container["command"], script], check=True, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
        )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.count("mb --ignore-existing minio/datasets minio/models minio/mlflow") == 2
    assert calls.count("admin user add minio gpuml-mlflow secret of mlflow") == 2
    assert calls.count("admin policy create minio gpuml-production /policies/production.json") == 2
    assert [c for c in calls if "attach" in c] == [
        f"admin policy attach minio gpuml-{user} --user gpuml-{user}"
        for user in ("development", "production", "mlflow")
    ]
    for policy in find(overlays["single-node"], "ConfigMap", "bucket-policies")["data"].values():
        assert {s["Effect"] for s in json.loads(policy)["Statement"]} == {"Allow"}


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "k8s" / "gpu").iterdir()))
def test_gpu_values(file):
    "Valid YAML, and so is the YAML in it; a shared GPU has a name of its own"
    values = YAML(typ="safe").load((ROOT / "k8s" / "gpu" / file).read_text())
    configs = values["devicePlugin"]["config"]["data"] if "devicePlugin" in values else values["config"]["map"]
    assert configs.keys() == {"whole", "shared"}
    shared = YAML(typ="safe").load(configs["shared"])["sharing"]["timeSlicing"]
    assert shared["renameByDefault"] and shared["resources"][0]["replicas"] > 1
    assert "sharing" not in YAML(typ="safe").load(configs["whole"])


DOCS = [ROOT / "docs" / name for name in ("administrator.md", "cluster-user.md")]


def test_a_second_jupyterlab(tmp_path):
    "As docs/administrator.md has it: beside the first, with its own account, token, volume and address"
    made = prepared(tmp_path)
    (made / "overlays" / "ada").mkdir()
    (text,) = re.findall(r"```yaml\n(namePrefix.*?)```", DOCS[0].read_text(), re.S)
    (made / "overlays" / "ada" / "kustomization.yaml").write_text(text)
    (made / "overlays" / "ada" / "jupyter.env").write_text("JUPYTER_TOKEN=x\n")
    manifests, first = render(made, "ada"), render(made, "team")
    kinds = ["ClusterRoleBinding", "NetworkPolicy", "Role", "RoleBinding", "RoleBinding", "Secret", "Service"]
    assert sorted(m["kind"] for m in manifests) == [*kinds, "ServiceAccount", "StatefulSet"]
    assert not {(m["kind"], m["metadata"]["name"]) for m in manifests} & {
        (m["kind"], m["metadata"]["name"]) for m in first
    }
    lab = find(manifests, "StatefulSet", "ada-jupyter")["spec"]
    labels, pod = lab["template"]["metadata"]["labels"], lab["template"]["spec"]
    assert find(manifests, "Service", "ada-jupyter")["spec"]["selector"].items() <= labels.items()
    other = find(first, "StatefulSet", "jupyter")["spec"]
    assert not matches(lab["selector"], other["template"]["metadata"]["labels"])
    assert not matches(other["selector"], labels) and lab["serviceName"] == "ada-jupyter"
    assert not find(first, "Service", "jupyter")["spec"]["selector"].items() <= labels.items()
    (role,) = (m for m in manifests if m["kind"] == "Role")
    assert {name for rule in role["rules"] for name in rule["resourceNames"]} == {"ada-jupyter-0", "ada-jupyter"}
    (binding,) = (m for m in manifests if m["kind"] == "RoleBinding" and m["roleRef"]["kind"] == "Role")
    assert binding["roleRef"]["name"] == role["metadata"]["name"] and binding["subjects"][0]["name"] == "ada"
    assert pod["serviceAccountName"] == find(manifests, "RoleBinding", "ada-gpuml-notebook")["subjects"][0]["name"]
    (container,) = pod["containers"]
    token = next(v for v in container["env"] if v["name"] == "JUPYTER_TOKEN")["valueFrom"]["secretKeyRef"]["name"]
    assert token == next(m for m in manifests if m["kind"] == "Secret")["metadata"]["name"]
    others = [m for m in first if (m["kind"], m["metadata"]["name"]) != ("NetworkPolicy", "jupyter")]
    for target, port in ((MLFLOW, 5000), (HUB, 443), (API, 443)):
        assert may_connect([*others, *manifests], ("gpuml-system", labels), target, port)
    egress = find(manifests, "NetworkPolicy", "ada-jupyter")["spec"]["egress"]
    assert egress == find(first, "NetworkPolicy", "jupyter")["spec"]["egress"]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_what_the_pages_name_is_there(page):
    "Files and folders, and what users are said to read"
    text = page.read_text()
    for path in re.findall(r"`((?:k8s|docker|config|nbs)/[\w./-]+)`", text) + re.findall(r"\]\(([^)#:]+)\)", text):
        place = (page.parent if path.endswith((".md", ".png")) else ROOT) / path
        assert place.exists() or path.startswith(
            ("docker/", "k8s/overlays/ada", "k8s/overlays/single-node/secrets/")
        ), path


def made_for(config: str, *overrides: str) -> dict:
    return manifest(
        load(config, [IMAGE, *overrides], start=ROOT),
        run_id(config, "0f2a9c11d4", 1),
        Source("0f2a9c11d4", "s3://m/b", "a.ipynb"),
    )


def test_allowed_images_end_with_a_slash(overlays):
    "registry.example.com would also begin registry.example.com.evil.test/x"
    for manifests in overlays.values():
        for m in manifests:
            if (m["kind"], m["metadata"]["name"]) == ("ConfigMap", "gpuml-policy"):
                assert all(prefix.endswith("/") for prefix in m["data"]["images"].split(" "))


def test_mlflow_starts_as_it_is_told(overlays, tmp_path):
    "The server's own command line, with the names by which pods ask for it, and no others; on PostgreSQL: test_mlflow.py"
    with mlflow_server(overlays["single-node"], tmp_path, {"/data/": f"{tmp_path}/"}) as port:
        known = [f"{name}:{port}" for name in ("mlflow", "localhost", "mlflow.gpuml-system")]
        answers = {host: status(port, host) for host in [*known, "evil.test", "mlflow"]}
        assert answers == dict.fromkeys(known, 200) | {"evil.test": 403, "mlflow": 403}
        assert (tmp_path / "mlflow.db").exists()


def test_jupyterlab_starts_as_it_is_told(overlays, tmp_path):
    "The pod's own command and environment: a new project, which tracks in the cluster's MLflow, for whoever has the token"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "lab").write_text(f'#!/bin/sh\nexec {ROOT}/docker/lab.sh --allow-root "$@"\n')
    (tmp_path / "bin" / "lab").chmod(0o755)
    (command, environment), port = started_as(overlays["single-node"], "StatefulSet", "jupyter", {}), free_port()
    command = [word.replace("/work/", f"{tmp_path}/work/") for word in command]
    environment["PATH"] = f"{tmp_path}/bin:{environment['PATH']}"
    environment |= {"HOME": str(tmp_path / "work"), "JUPYTER_IP": "127.0.0.1", "JUPYTER_PORT": str(port)}
    (container,) = find(overlays["single-node"], "StatefulSet", "jupyter")["spec"]["template"]["spec"]["containers"]
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {p["port"] for p in probes} == {"http"} and container["ports"][0]["containerPort"] == 8888
    log = open(tmp_path / "log", "w")
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: server.poll() is not None or all(ready(f"http://127.0.0.1:{port}{p['path']}") for p in probes))
        assert server.poll() is None, (tmp_path / "log").read_text()
        address = f"http://127.0.0.1:{port}/api/contents"
        assert requests.get(address, timeout=600).status_code == 403
        login = {"Authorization": f"token {environment['JUPYTER_TOKEN']}"}
        there = requests.get(address, headers=login, timeout=600).json()["content"]
        assert {entry["name"] for entry in there} == {"config", "data", "nbs"}
        assert "uri: http://mlflow:5000" in (tmp_path / "work" / "project" / "config" / "dev.yaml").read_text()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(600)


def status(port: int, host: str) -> int:
    "Of a request that names a host"
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=600).status
    except urllib.error.HTTPError as e:
        return e.code
