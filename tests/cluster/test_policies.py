"What the API server answers to whoever asks for more than is meant, and to what gpuml and ordinary pods need: tests/golden/access.md"

import copy
import os
import re

import pytest

from gpuml.base.loading import load
from gpuml.cluster.device_claim import claim_template
from tests.cluster.administer import Administrator
from tests.cluster.api import ApiError
from tests.cluster.applied import IMAGE, MAKER, acting, failures, holding, job_as, made, rights, trial
from tests.cluster.attempts import a_container, a_job, attempts, ordinary, pod_spec
from tests.cluster.cluster import phase
from tests.cluster.plane import Plane
from tests.conftest import ROOT
from tests.manifests import find, pod_of
from tests.waiting import until

GOLDEN = ROOT / "tests" / "golden" / "access.md"


def pod_or_refusal(cluster, namespace: str, name: str) -> str:
    "Empty when the Job's pod is made, else why it is not"

    def look():
        if cluster.pods(namespace, name):
            return "made"
        return next((m for why, m in cluster.events(namespace, name) if why == "FailedCreate"), None)

    answer = cluster.wait(look, 30, f"a pod of {name}, or why there is none")
    return "" if answer == "made" else answer


def answer(cluster, administrator, name: str, request) -> str:
    "What Kubernetes says to the development user; empty where it is done"
    if isinstance(request, dict):
        request["metadata"]["name"] = name
        request = ("POST", administrator.path(request, named=False), request)
    method, path, body, *headers = request
    api = cluster.plane.api("dev-user")
    api.headers = dict(*headers)
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    try:
        api.request(method, path, body, kind=kind)
    except ApiError as error:
        assert error.status in (400, 403, 422), error
        return by_whom(error, failures(cluster.plane, error.audit))
    if refusal := pod_or_refusal(cluster, "gpuml-dev", name):
        return f"no pod: {reason(refusal)}"
    return volume_refusal(cluster, name)


def by_whom(error: ApiError, broken: list[str]) -> str:
    "A refusal of the API server itself, with who refuses: a role, policies (all of them), or its own rules"
    if broken:
        assert any(error.message.endswith(rule.split(": ", 1)[1]) for rule in broken), error
        return "; ".join(f"policy {rule}" for rule in broken)
    by_role = re.search('User "dev-user" (cannot .*?) in API group', error.message)
    return f"role: {by_role[1]}" if by_role else reason(error.message)


def volume_refusal(cluster, name: str) -> str:
    "Why a volume of a Job's pod can't be made; empty where it has none that is made for it"
    (pod,) = cluster.pods("gpuml-dev", name)
    if not any("ephemeral" in volume for volume in pod["spec"]["volumes"]):
        return ""
    pod = pod["metadata"]["name"]

    def look():
        return next((m for why, m in cluster.events("gpuml-dev", pod) if "exceeded quota" in m), None)

    return f"no volume: {reason(cluster.wait(look, 30, f'why a volume of {pod} is not made'))}"


def reason(text: str) -> str:
    "The part that says why, without names that change"
    text = re.split(r"is forbidden: |is invalid: ", text)[-1].removeprefix("Error creating: ")
    return re.sub(r'^violates PodSecurity "restricted:latest"', "Pod Security", text.split(", requested:")[0])


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def test_development_can_not_act_as_production(team, tidy, cluster, administrator, maker):
    "Each attempt of a development user, with its own token, is refused by this server: golden/access.md"
    rows, through = [], []
    for reached, group in attempts().items():
        for name, request in group.items():
            said = answer(cluster, administrator, f"attempt-{len(rows)}", request)
            through += [] if said else [name]
            rows.append(f"| {reached} | {cell(name)} | {cell(said)} |")
    allowed = ordinary()
    user = cluster.plane.api("dev-user")
    asked = [(name, user, job) for name, job in allowed.items()]
    asked += [(name, maker, holding(pod_of(job), "Pod")) for name, job in allowed.items()]
    wrong = {name: said for name, api, body in asked if (said := trial(administrator, api, body))}
    assert not through and not wrong
    text = "\n".join(
        [
            "What a development user tried with its own token, and what Kubernetes 1.37 answered. Policies are those of `k8s/policies`,",
            "and all that an attempt breaks are named; roles, quotas and Pod Security are those of `k8s/`; what else is in the last column",
            f"is Kubernetes' own rule. {len(rows)} attempts, {len(through)} went through.\n",
            "| it would reach | attempt | answer |\n|---|---|---|",
            *rows,
            "\nThe same user may have these, and the server took each:\n",
            *[f"- {name}" for name in allowed],
            "",
        ]
    )
    if os.environ.get("GPUML_GOLDEN"):
        GOLDEN.write_text(text)
    if cluster.plane.version == (1, 37):
        assert text == GOLDEN.read_text()


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("config, user", [("dev", "dev-user"), ("prod", "prod-user")])
def test_gpuml_s_own_jobs_are_admitted(config, user, nodes, team, tidy, cluster):
    "By the server for the user's own token, and so are the pods that Kubernetes makes of it; its token is nowhere"
    job = made(config, f"compute.nodes={nodes}")
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    cluster.plane.api(user).create("jobs", namespace, job)
    assert pod_or_refusal(cluster, namespace, name) == ""
    pods = cluster.wait(lambda: len(p := cluster.pods(namespace, name)) == nodes and p, 30)
    assert not any("projected" in volume for pod in pods for volume in pod["spec"]["volumes"])
    names = {f"{name}-{index}" for index in range(nodes)} if nodes > 1 else {None}
    assert {pod["spec"].get("hostname") for pod in pods} == names


def test_nothing_but_production_in_its_namespace(team, tidy, cluster, administrator):
    "A job of another class is refused at once; and where no policy is asked, the quota refuses its pod"
    job = made("prod", "compute.priority_class=gpuml-dev", run="prod-other-1")
    with pytest.raises(ApiError, match="gpuml-pods.*priorityClassName must be gpuml-prod in namespace gpuml-prod, not"):
        cluster.plane.api("prod-user").create("jobs", "gpuml-prod", job)
    binding = find(team, "ValidatingAdmissionPolicyBinding", "gpuml-pods")
    administrator.remove(binding)
    api = acting(administrator, "prod-user", "gpuml-prod")
    try:
        cluster.wait(lambda: trial(administrator, api, job) == "", 30)
        cluster.plane.api("prod-user").create("jobs", "gpuml-prod", job)
        assert "exceeded quota: only-gpuml-prod" in pod_or_refusal(cluster, "gpuml-prod", "prod-other-1")
    finally:
        administrator.apply(binding)
        cluster.wait(lambda: "gpuml-pods" in trial(administrator, api, job), 30)


def test_production_leaves_a_floor(team, tidy, cluster):
    "With a quota of one GPU of two, a second production job waits, and development runs beside the first"
    quota(cluster, "1")
    cluster.agent.add_node("gpu-2")
    try:
        for name in ("first", "second"):
            cluster.plane.api("prod-user").create("jobs", "gpuml-prod", job_as("gpuml-prod", name))
            if name == "first":
                cluster.wait_pod("gpuml-prod", name, phase("Running"))
        assert (
            "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1"
            in pod_or_refusal(cluster, "gpuml-prod", "second")
        )
        cluster.plane.api("dev-user").create("jobs", "gpuml-dev", job_as("gpuml-dev", "dev"))
        cluster.wait_pod("gpuml-dev", "dev", phase("Running"))
    finally:
        cluster.agent.remove_node("gpu-2")
        quota(cluster, "6")


def quota(cluster, gpus: str) -> None:
    "What production may have, once the server counts by it"
    cluster.admin.patch("resourcequotas", "gpuml-prod", "gpus", {"spec": {"hard": {"requests.nvidia.com/gpu": gpus}}})

    def known():
        hard = cluster.admin.get("resourcequotas", "gpuml-prod", "gpus")["status"].get("hard", {})
        return hard.get("requests.nvidia.com/gpu") == gpus

    cluster.wait(known, 20)


TOKEN = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}
ELSEWHERE = a_container(image="registry.example.com.evil.test/x:1")
EVERY_GPU = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
GPUS = "NVIDIA_… and CUDA_VERSION in env, or runtimeClassName, may reach GPUs that were not asked for, and so production's; take compute.gpus"
STRANGER = "images must come from registry.example.com/, not registry.example.com.evil.test/x:1; compute.image names it"
REFUSED = {
    "another class": ({"priorityClassName": "system-cluster-critical"}, "priorityClassName must be gpuml-dev in namespace gpuml-dev, not system-cluster-critical"),
    "no class": ({"priorityClassName": ""}, "priorityClassName must be gpuml-dev in namespace gpuml-dev, and is not set"),
    "a day to end": ({"terminationGracePeriodSeconds": 86400}, "terminationGracePeriodSeconds must be at most 120 in namespace gpuml-dev, not 86400: production waits as long; compute.grace sets it"),
    "one second more": ({"terminationGracePeriodSeconds": 121}, "terminationGracePeriodSeconds must be at most 120 in namespace gpuml-dev, not 121: production waits as long; compute.grace sets it"),
    "an image from elsewhere": ({"containers": [ELSEWHERE]}, STRANGER),
    "a first container from elsewhere": ({"initContainers": [ELSEWHERE | {"name": "first"}]}, STRANGER),
    "an image from elsewhere, mounted": ({"volumes": [*pod_spec()["volumes"], {"name": "i", "image": {"reference": "registry.example.com.evil.test/x:1"}}]}, STRANGER),
    "a token": ({"automountServiceAccountToken": True}, "set automountServiceAccountToken: false; jobs do not talk to the API server"),
    "a token as a volume": ({"volumes": [*pod_spec()["volumes"], TOKEN]}, "no volume may hold a ServiceAccount's token, nor a certificate of its pod; jobs do not talk to the API server"),
    "every GPU of the node": ({"containers": [a_container(env=EVERY_GPU)]}, GPUS),
    "every GPU, for an older image": ({"containers": [a_container(env=[{"name": "CUDA_VERSION", "value": "12"}])]}, GPUS),
    "every GPU, by another runtime": ({"runtimeClassName": "nvidia"}, GPUS),
    "a node by name": ({"nodeName": "gpu-1"}, "nodeName goes past the scheduler, and so past priorities; take nodeSelector (compute.node_selector)"),
    "another's claim": ({"resourceClaims": [{"name": "g", "resourceClaimName": "x"}]}, "a claim by its name may be another's, with its device; take a resourceClaimTemplateName"),
}  # fmt: skip


@pytest.fixture(scope="module")
def runtime(team, administrator):
    "A RuntimeClass, as NVIDIA's GPU Operator makes it"
    runtime = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "nvidia"},
        "handler": "nvidia",
    }
    administrator.apply(runtime)
    yield
    administrator.remove(runtime)


@pytest.mark.parametrize("kind", ["Job", "CronJob", "Pod", "Deployment"])
def test_policies_refuse(kind, runtime, maker, administrator, cluster):
    "Whatever the kind, for somebody who may make any; the sentence is what the user reads"
    policy = "ValidatingAdmissionPolicy 'gpuml-pods' with binding 'gpuml-pods' denied request: "
    wrong = {}
    for case, (change, sentence) in REFUSED.items():
        again = {"restartPolicy": "Always"} if kind == "Deployment" else {}
        said = trial(administrator, maker, holding(pod_spec(**again, **change), kind))
        if not said.endswith(policy + sentence):
            wrong[case] = said
    assert not wrong
    assert trial(administrator, maker, holding(pod_spec(**again), kind)) == ""


def test_production_s_class_elsewhere(maker, administrator, cluster):
    "In every namespace it takes the verb `use`: a person's own right to make pods is not enough, and Kueue's label counts"
    refused = "may not use PriorityClass gpuml-prod in namespace default"
    spec = pod_of(made("prod"))
    for kind in ("Job", "CronJob", "Pod"):
        assert f"{MAKER} {refused}" in trial(administrator, maker, holding(spec, kind, namespace="default"))
    queued = holding(spec | {"priorityClassName": "gpuml-dev"}, "Job", namespace="default")
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/priority-class": "gpuml-prod"}
    assert refused in trial(administrator, maker, queued)
    other = {"containers": [{"name": "a", "image": "nginx"}]}  # of another team: without a class, with any image
    assert trial(administrator, maker, holding(other, "Pod", namespace="default")) == ""


def test_what_is_there_can_end_after_a_change_of_policy(team, tidy, maker, administrator, cluster):
    "Finalizers of pods and Jobs are taken off, Jobs are suspended, whatever is asked of new ones; not so Deployments"
    job = made("dev")
    name = job["metadata"]["name"]
    cluster.plane.api("dev-user").create("jobs", "gpuml-dev", job)
    pod = cluster.wait_pod("gpuml-dev", name, lambda pod: True)["metadata"]["name"]
    deployment = holding(pod_spec(restartPolicy="Always"), "Deployment", "there") | {}
    deployment["spec"]["replicas"] = 0
    administrator.apply(deployment)
    params = copy.deepcopy(find(team, "ConfigMap", "gpuml-policy", "gpuml-dev"))
    params["data"] |= {"images": "ghcr.io/a/", "graceSeconds": "1"}
    administrator.apply(params)
    try:
        cluster.wait(lambda: "gpuml-pods" in trial(administrator, maker, made("dev", run="new")), 20)
        cluster.admin.patch("pods", "gpuml-dev", pod, {"metadata": {"annotations": {"a": "b"}}})
        cluster.admin.patch("jobs", "gpuml-dev", name, {"spec": {"suspend": True}})
        deployment["metadata"]["labels"] = {"a": "b"}
        with pytest.raises(ApiError, match="gpuml-pods"):
            administrator.apply(deployment)
    finally:
        administrator.apply(find(team, "ConfigMap", "gpuml-policy", "gpuml-dev"))
        administrator.remove(deployment)
        cluster.wait(lambda: trial(administrator, maker, made("dev", run="new")) == "", 20)


@pytest.mark.parametrize("images", ["", " ", "registry.example.com/ ", "ghcr.io/a/  registry.example.com/"])
def test_a_space_too_many_admits_nothing(images, team, maker, administrator, cluster):
    params = copy.deepcopy(find(team, "ConfigMap", "gpuml-policy", "gpuml-dev"))
    params["data"]["images"] = images
    stranger = a_job(containers=[a_container(image="docker.io/someone/miner:1")])
    administrator.apply(params)
    try:
        sentence = f"images must come from {images}, not docker.io/someone/miner:1"
        cluster.wait(lambda: sentence in trial(administrator, maker, stranger), 20)
    finally:
        administrator.apply(find(team, "ConfigMap", "gpuml-policy", "gpuml-dev"))
        cluster.wait(lambda: trial(administrator, maker, made("dev")) == "", 20)


def test_without_its_values_a_policy_refuses_all(team, maker, administrator, cluster):
    params = find(team, "ConfigMap", "gpuml-policy", "gpuml-dev")
    administrator.remove(params)
    try:
        cluster.wait(lambda: "no params found" in trial(administrator, maker, made("dev")), 20)
    finally:
        administrator.apply(params)
        cluster.wait(lambda: trial(administrator, maker, made("dev")) == "", 20)


def test_claims_of_devices(team, maker, administrator, cluster):
    "Of the DeviceClasses that the namespace's values name, whoever asks and in whichever form"

    def claim(request: dict, kind: str = "ResourceClaim") -> dict:
        spec = {"devices": {"requests": [{"name": "gpu"} | request]}}
        spec = {"spec": spec} if kind == "ResourceClaimTemplate" else spec
        metadata = {"name": "x", "namespace": "gpuml-dev"}
        return {"apiVersion": "resource.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": spec}

    one, other = {"deviceClassName": "gpu.example.com"}, {"deviceClassName": "other.example.com"}
    requests = [{"exactly": one}, {"firstAvailable": [{"name": "a"} | one]}]
    mixed = [{"exactly": other}, {"firstAvailable": [{"name": "a"} | one, {"name": "b"} | other]}]
    kinds = ("ResourceClaim", "ResourceClaimTemplate")
    refused = (
        "devices must be of a DeviceClass that deviceClasses names in ConfigMap gpuml-policy of namespace gpuml-dev"
    )
    for kind in kinds:
        assert all(refused in trial(administrator, maker, claim(request, kind)) for request in requests)
    params = copy.deepcopy(find(team, "ConfigMap", "gpuml-policy", "gpuml-dev"))
    params["data"]["deviceClasses"] = "more.example.com gpu.example.com"
    administrator.apply(params)
    try:
        cluster.wait(lambda: trial(administrator, maker, claim(requests[0])) == "", 20)
        for kind in kinds:
            assert [trial(administrator, maker, claim(request, kind)) for request in requests] == ["", ""]
            assert all(refused in trial(administrator, maker, claim(request, kind)) for request in mixed)
            everything = claim({"exactly": one | {"adminAccess": True}}, kind)
            assert "adminAccess" in trial(administrator, maker, everything)
        compute = ["compute.device_class=gpu.example.com", f"compute.image={IMAGE}"]
        ours = [claim_template(load("dev", compute, start=ROOT).compute), made("dev", compute[0])]
        assert [trial(administrator, cluster.plane.api("dev-user"), body) for body in ours] == ["", ""]
    finally:
        administrator.apply(find(team, "ConfigMap", "gpuml-policy", "gpuml-dev"))


GANGS = {"feature-gates": "GenericWorkload=true", "runtime-config": "scheduling.k8s.io/v1alpha3=true"}


def test_a_group_of_pods_has_no_class_that_its_maker_may_not_use(overlays, tmp_path):
    "Where native gang scheduling is on, which is off by default, a group's class is its pods'"
    plane = Plane(tmp_path, apiserver_flags=GANGS)
    try:
        administrator = Administrator(plane.start())
        wanted = ("Namespace", "PriorityClass")
        mine = [m for m in overlays["team"] if m["kind"] in wanted or m["metadata"]["name"] == "gpuml-production-class"]
        for m in [*mine, *rights(MAKER)]:
            administrator.apply(m)
        maker, refused = acting(administrator, MAKER), "may not use PriorityClass gpuml-prod in namespace default"
        group = {"apiVersion": "scheduling.k8s.io/v1alpha3", "kind": "PodGroup"}
        group |= {"metadata": {"name": "x", "namespace": "default"}}
        spec = {"schedulingPolicy": {"basic": {}}}
        production = group | {"spec": spec | {"priorityClassName": "gpuml-prod"}}
        until(lambda: refused in trial(administrator, maker, production))
        assert trial(administrator, maker, group | {"spec": spec | {"priorityClassName": "gpuml-dev"}}) == ""
    finally:
        plane.stop()
