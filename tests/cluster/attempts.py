"What a development user could try to get more than is meant, by what it would reach"

from tests.cluster.applied import made
from tests.manifests import pod_of

Request = tuple  # method, path, body, and perhaps headers
DEV, PROD = "/api/v1/namespaces/gpuml-dev", "/api/v1/namespaces/gpuml-prod"
JOBS = "/apis/batch/v1/namespaces/gpuml-{}/jobs"
RBAC = "rbac.authorization.k8s.io"
PRODUCTION = {"priorityClassName": "gpuml-prod"}
STRANGER = "docker.io/someone/miner:1"
DEVICES = {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "gpu.example.com"}}]}}
OLD_VOLUMES = {
    "hostPath": {"path": "/var/lib/kubelet"},
    "nfs": {"server": "10.0.0.9", "path": "/home"},
    "iscsi": {"targetPortal": "10.0.0.9:3260", "iqn": "iqn.2001-04.com.example:x", "lun": 0},
    "cephfs": {"monitors": ["10.0.0.9:6789"]},
    "rbd": {"monitors": ["10.0.0.9:6789"], "image": "x"},
    "glusterfs": {"endpoints": "x", "path": "/"},
    "fc": {"targetWWNs": ["50060e801049cfd1"], "lun": 0},
    "flexVolume": {"driver": "example.com/x"},
    "awsElasticBlockStore": {"volumeID": "x"},
    "gcePersistentDisk": {"pdName": "x"},
    "azureDisk": {"diskName": "x", "diskURI": "https://x.blob.core.windows.net/x/x.vhd"},
    "azureFile": {"secretName": "x", "shareName": "x"},
    "cinder": {"volumeID": "x"},
    "vsphereVolume": {"volumePath": "x"},
    "portworxVolume": {"volumeID": "x"},
    "quobyte": {"registry": "10.0.0.9:7861", "volume": "x"},
    "scaleIO": {"gateway": "x", "system": "x", "secretRef": {"name": "x"}, "volumeName": "x"},
    "storageos": {"volumeName": "x"},
    "photonPersistentDisk": {"pdID": "x"},
}


def pod_spec(**changes) -> dict:
    "Of a job that gpuml makes"
    return pod_of(made("dev")) | changes


def a_job(namespace: str = "gpuml-dev", labels: dict | None = None, notes: dict | None = None, **changes) -> dict:
    "A job that gpuml makes, with another pod spec, labels of the Job, annotations of its pods"
    job = made("dev")
    job["metadata"] |= {"namespace": namespace, "labels": job["metadata"]["labels"] | (labels or {})}
    job["spec"]["template"]["metadata"]["annotations"] |= notes or {}
    job["spec"]["template"]["spec"] |= changes
    return job


def with_labels(labels: dict, **changes) -> dict:
    "A job whose pods have labels more, and another spec"
    job = a_job(**changes)
    job["spec"]["template"]["metadata"]["labels"] |= labels
    return job


def with_volume(**volume) -> dict:
    "A job with one volume more"
    return a_job(volumes=[*pod_spec()["volumes"], {"name": "another"} | volume])


def with_container(**changes) -> dict:
    "A job whose container is another"
    return a_job(containers=[a_container(**changes)])


def a_container(**changes) -> dict:
    (container,) = pod_spec()["containers"]
    return container | changes


def with_context(**changes) -> dict:
    "A job whose container has other rights"
    return with_container(securityContext=a_container()["securityContext"] | changes)


def with_resource(name: str, amount: int) -> dict:
    resources = {kind: found | {name: amount} for kind, found in a_container()["resources"].items()}
    return with_container(resources=resources)


def an_object(version: str, kind: str, spec: dict | None = None, namespace: str = "gpuml-dev", **more) -> dict:
    metadata = {"name": "bypass"} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata} | ({"spec": spec} if spec else {}) | more


def _priority() -> dict[str, dict | Request]:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": pod_spec(**PRODUCTION)}
    apps = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    cron = {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": {"spec": template["spec"]}}}}
    budget = {"minAvailable": 1, "selector": {}}
    return {
        "Job with production's class": a_job(**PRODUCTION),
        "the same in gpuml-prod": a_job("gpuml-prod", **PRODUCTION),
        "the same in namespace default": a_job("default", **PRODUCTION),
        "CronJob with production's class": an_object("batch/v1", "CronJob", cron),
        "Pod with production's class": an_object("v1", "Pod", template["spec"]),
        "Deployment with production's class": an_object("apps/v1", "Deployment", apps),
        "Job without a class": a_job(priorityClassName=""),
        "Job with system-cluster-critical": a_job(priorityClassName="system-cluster-critical"),
        "Job with an integer priority": a_job(priority=100000),
        "Job that preempts after all": a_job(preemptionPolicy="PreemptLowerPriority"),
        "Job with Kueue's production priority": a_job(labels={"kueue.x-k8s.io/priority-class": "gpuml-prod"}),
        "Job with another priority of Kueue": a_job(labels={"kueue.x-k8s.io/priority-class": "urgent"}),
        "a group of pods with production's class": (
            "POST",
            "/apis/scheduling.k8s.io/v1alpha3/namespaces/gpuml-dev/podgroups",
            an_object("scheduling.k8s.io/v1alpha3", "PodGroup", PRODUCTION),
        ),
        "Job that takes a day to end": a_job(terminationGracePeriodSeconds=86400),
        "a budget that forbids disruption": an_object("policy/v1", "PodDisruptionBudget", budget),
        "a PriorityClass of one's own": an_object("scheduling.k8s.io/v1", "PriorityClass", namespace="", value=200000),
        "evict a production pod": ("POST", f"{PROD}/pods/x/eviction", an_object("policy/v1", "Eviction")),
        "cancel a production job": ("DELETE", JOBS.format("prod") + "/x", None),
    }


def _image() -> dict[str, dict | Request]:
    stranger = a_container(name="other", image=STRANGER, command=["true"])
    return {
        "Job with an image from elsewhere": with_container(image=STRANGER),
        "its first container from elsewhere": a_job(initContainers=[stranger]),
        "its sidecar from elsewhere": a_job(initContainers=[stranger | {"restartPolicy": "Always"}]),
        "an image from elsewhere, mounted": with_volume(image={"reference": STRANGER}),
        "an image by a CSI driver": with_volume(
            csi={"driver": "image.csi.example.com", "volumeAttributes": {"image": STRANGER}}
        ),
        "a registry whose name begins like ours": with_container(image="registry.example.com.evil.test/x:1"),
        "add a container to a pod": (
            "PATCH",
            f"{DEV}/pods/x/ephemeralcontainers",
            {"spec": {"ephemeralContainers": [stranger]}},
        ),
    }


def _node() -> dict[str, dict | Request]:
    target = {"target": {"kind": "Node", "name": "gpu-1"}}
    return {
        "Job bound to a node by name": a_job(nodeName="gpu-1"),
        "bind a pod to a node": ("POST", f"{DEV}/pods/x/binding", an_object("v1", "Binding") | target),
        "nominate a node for a pod": ("PATCH", f"{DEV}/pods/x/status", {"status": {"nominatedNodeName": "gpu-1"}}),
        "take a node's taints off": ("PATCH", "/api/v1/nodes/gpu-1", {"spec": {"taints": None}}),
        "label a node": ("PATCH", "/api/v1/nodes/gpu-1", {"metadata": {"labels": {"a": "b"}}}),
        "Job in the node's network": a_job(hostNetwork=True),
        "Job on a port of the node": with_container(ports=[{"containerPort": 80, "hostPort": 80}]),
        "Job among the node's processes": a_job(hostPID=True),
        "Job in the node's memory": a_job(hostIPC=True),
        "Job whose kubelet asks another host": with_container(
            livenessProbe={"httpGet": {"host": "169.254.169.254", "port": 80}}
        ),
        "Job with a sysctl of the node": a_job(
            securityContext=pod_spec()["securityContext"] | {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}
        ),
    }


def _device() -> dict[str, dict | Request]:
    every = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    file = {"fileKeyRef": {"volumeName": "work", "path": "env", "key": "x"}}
    return {
        "Job with more GPUs than the quota has": with_resource("nvidia.com/gpu", 9),
        "Job that sees every GPU of its node": with_container(env=every),
        "the same from a file": with_container(env=[{"name": "NVIDIA_VISIBLE_DEVICES", "valueFrom": file}]),
        "the same for an older image": with_container(env=[{"name": "CUDA_VERSION", "value": "12"}]),
        "the same in a first container": a_job(initContainers=[a_container(name="first", env=every)]),
        "the same by another runtime": a_job(runtimeClassName="nvidia"),
        "the same by an annotation for containerd": a_job(notes={"cdi.k8s.io/x": "nvidia.com/gpu=all"}),
        "the same by one for NVIDIA's plugin": a_job(notes={"nvidia.cdi.k8s.io/container.train": "nvidia.com/gpu=all"}),
        "the same by one for CRI-O": a_job(notes={"io.kubernetes.cri-o.Devices": "/dev/nvidia0"}),
        "Job with a device of the node": with_volume(hostPath={"path": "/dev/nvidia0"}),
        "privileged Job": with_context(privileged=True, allowPrivilegeEscalation=True),
        "GPUs for all containers at once": a_job(resources={"limits": {"nvidia.com/gpu": "9"}}),
        "Job that names another's claim": a_job(resourceClaims=[{"name": "gpu", "resourceClaimName": "another-gpu"}]),
        "Job with a DeviceClass as a resource": with_resource("deviceclass.resource.kubernetes.io/gpu.example.com", 9),
        "a claim of one's own": an_object("resource.k8s.io/v1", "ResourceClaim", DEVICES),
        "a template for claims": an_object("resource.k8s.io/v1", "ResourceClaimTemplate", {"spec": DEVICES}),
        "a DeviceClass of one's own": an_object("resource.k8s.io/v1", "DeviceClass", {"selectors": []}, namespace=""),
        "Job with overhead": a_job(overhead={"cpu": "1m"}),
        "make a pod larger": ("PATCH", f"{DEV}/pods/x/resize", {"spec": {"containers": []}}),
        "more GPUs in the quota": (
            "PATCH",
            f"{DEV}/resourcequotas/gpus",
            {"spec": {"hard": {"requests.nvidia.com/gpu": "99"}}},
        ),
        "no quota": ("DELETE", f"{DEV}/resourcequotas/only-gpuml-dev", None),
    }


def _data() -> dict[str, dict | Request]:
    token = {"serviceAccountToken": {"path": "token"}}
    certificate = {"signerName": "kubernetes.io/kube-apiserver-client", "keyType": "ED25519", "keyPath": "key"}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    volumes = [{"name": kind.lower(), kind: source} for kind, source in OLD_VOLUMES.items()]
    return {
        "Job with a token": a_job(automountServiceAccountToken=True),
        "Job with a token as a volume": with_volume(projected={"sources": [token]}),
        "Job with its pod's certificate": with_volume(
            projected={"sources": [{"podCertificate": certificate | {"certificateChainPath": "chain"}}]}
        ),
        "Job with JupyterLab's account": a_job(serviceAccountName="notebook"),
        "a token for JupyterLab's account": (
            "POST",
            "/api/v1/namespaces/gpuml-system/serviceaccounts/notebook/token",
            {"spec": {}},
        ),
        "Job with every volume of a server or node": a_job(volumes=[*pod_spec()["volumes"], *volumes]),
        "Job with a volume that is made for it": with_volume(ephemeral={"volumeClaimTemplate": {"spec": claim}}),
        "a volume of one's own": an_object("v1", "PersistentVolumeClaim", claim),
        "read the S3 keys": ("GET", f"{DEV}/secrets/gpuml-s3", None),
        "read production's S3 keys": ("GET", f"{PROD}/secrets/gpuml-s3", None),
        "read production's log": ("GET", f"{PROD}/pods/x/log", None),
        "a shell in a pod": ("POST", f"{DEV}/pods/x/exec?command=sh", None),
        "attach to a pod": ("POST", f"{DEV}/pods/x/attach", None),
        "reach a pod's ports": ("POST", f"{DEV}/pods/x/portforward", None),
        "open a network": (
            "DELETE",
            "/apis/networking.k8s.io/v1/namespaces/gpuml-dev/networkpolicies/default-deny",
            None,
        ),
        "a name of another's pod, where jobs of several nodes meet": a_job(subdomain="gpuml", hostname="other-1-0"),
        "the same with labels of such a pod": with_labels(
            {"batch.kubernetes.io/job-completion-index": "other-1-0"}, subdomain="gpuml", hostname="x-other-1-0"
        ),
        "a name that pods look up": an_object("v1", "Service", {"type": "ExternalName", "externalName": "evil.test"}),
        "change a Job that is there": ("PATCH", JOBS.format("dev") + "/x", {"spec": {"parallelism": 9}}),
        "change a pod": ("PATCH", f"{DEV}/pods/x", {"metadata": {"labels": {"a": "b"}}}),
    }


def _rights() -> dict[str, dict | Request]:
    binding = {
        "subjects": [{"kind": "User", "name": "dev-user", "apiGroup": RBAC}],
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "cluster-admin"},
    }
    context = pod_spec()["securityContext"]
    return {
        "Job as root": a_job(securityContext=context | {"runAsUser": 0, "runAsNonRoot": False}),
        "Job with another capability": with_context(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        "Job that may gain rights": with_context(allowPrivilegeEscalation=True),
        "Job without seccomp": with_context(seccompProfile={"type": "Unconfined"}),
        "Job without AppArmor": with_context(appArmorProfile={"type": "Unconfined"}),
        "Job with another SELinux type": with_context(seLinuxOptions={"type": "spc_t"}),
        "Job that sees all of /proc": a_job(
            hostUsers=False,
            containers=[a_container(securityContext=a_container()["securityContext"] | {"procMount": "Unmasked"})],
        ),
        "Job as a process of a Windows host": a_job(
            securityContext=context | {"windowsOptions": {"hostProcess": True}}, hostNetwork=True
        ),
        "another policy": ("PATCH", f"{DEV}/configmaps/gpuml-policy", {"data": {"graceSeconds": "86400"}}),
        "a namespace without policies": (
            "PATCH",
            "/api/v1/namespaces/gpuml-dev",
            {"metadata": {"labels": {"gpuml.io/tier": None}}},
        ),
        "no policy at all": (
            "DELETE",
            "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/gpuml-pods",
            None,
        ),
        "a role for oneself": an_object(f"{RBAC}/v1", "RoleBinding", **binding),
        "a role for oneself everywhere": an_object(f"{RBAC}/v1", "ClusterRoleBinding", namespace="", **binding),
        "speak as production": ("GET", JOBS.format("prod"), None, {"Impersonate-User": "prod-user"}),
    }


def attempts() -> dict[str, dict[str, dict | Request]]:
    "By what it would reach, and by name: an object to make, or (method, path, body) of another request"
    return {
        "a higher priority": _priority(),
        "an image": _image(),
        "a node": _node(),
        "a device": _device(),
        "others' data": _data(),
        "more rights": _rights(),
    }


def ordinary() -> dict[str, dict]:
    "What jobs and notebooks need, or what reaches nothing of others: Jobs"
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["gpu-1"]}]}
                ]
            }
        }
    }
    file = {"fileKeyRef": {"volumeName": "work", "path": "env", "key": "x"}}
    bundle = {"name": "x", "path": "ca.pem"}
    sidecar = a_container(name="proxy", restartPolicy="Always")
    spread = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    return {
        "a job as gpuml makes it": a_job(),
        "nodes by label, and one by its name, through the scheduler (priorities count)": a_job(
            nodeSelector={"gpu": "h100"}, affinity=affinity
        ),
        "tolerations, also of every taint: a taint keeps nobody away who may make pods": a_job(
            tolerations=[{"operator": "Exists"}]
        ),
        "spread over zones": a_job(topologySpreadConstraints=[spread]),
        "another scheduler's name, scheduling gates, readiness gates: who asks waits": a_job(
            schedulerName="other",
            schedulingGates=[{"name": "example.com/x"}],
            readinessGates=[{"conditionType": "a/b"}],
        ),
        "an image of the registry, mounted": with_volume(image={"reference": "registry.example.com/model:1"}),
        "native sidecars and first containers of the registry": a_job(initContainers=[sidecar]),
        "Secrets and ConfigMaps of the namespace: its people share them": with_volume(
            projected={"sources": [{"secret": {"name": "gpuml-s3"}}, {"configMap": {"name": "x"}}]}
        ),
        "what is known of the pod, and certificates of authorities": with_volume(
            projected={
                "sources": [
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                    {"clusterTrustBundle": bundle},
                ]
            }
        ),
        "a claim that an administrator made": with_volume(persistentVolumeClaim={"claimName": "data"}),
        "variables from a file of the pod's own": with_container(env=[{"name": "A", "valueFrom": file}]),
        "CPU and memory for all containers at once": a_job(resources={"limits": {"memory": "2Gi"}}),
        "devices by a template for claims": a_job(resourceClaims=[{"name": "g", "resourceClaimTemplateName": "gpu"}]),
        "another GPU than nvidia.com/gpu: each name needs a line in the quota": with_resource(
            "nvidia.com/mig-1g.5gb", 1
        ),
        "a user namespace, also as its root": a_job(
            hostUsers=False, securityContext=pod_spec()["securityContext"] | {"runAsUser": 0, "runAsNonRoot": False}
        ),
        "a job of several nodes as gpuml makes it": made("dev", "compute.nodes=2"),
        "names of its own: host name, aliases, name servers": a_job(
            hostname="a",
            subdomain="b",
            setHostnameAsFQDN=True,
            hostAliases=[{"ip": "10.0.0.1", "hostnames": ["x"]}],
            dnsPolicy="None",
            dnsConfig={"nameservers": ["10.0.0.2"]},
        ),
        "its containers' processes together": a_job(shareProcessNamespace=True),
        "Kueue's queue, and its own priority": a_job(
            labels={"kueue.x-k8s.io/queue-name": "gpuml", "kueue.x-k8s.io/priority-class": "gpuml-dev"}
        ),
    }
