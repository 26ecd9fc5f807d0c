"GPUs by Dynamic Resource Allocation: what a driver and an administrator make known, and pods that claim some"

from tests.cluster.api import Api
from tests.cluster.cluster import job

NAMED = "gpuml.test/named-gpu"  # what the devices of a class are called besides


def device_class(name: str, driver: str, **spec) -> dict:
    "All devices of a driver"
    selector = {"cel": {"expression": f'device.driver == "{driver}"'}}
    return {"metadata": {"name": name}, "spec": {"selectors": [selector], **spec}}


def resource_slice(node: str, driver: str, count: int) -> dict:
    "The devices of a driver on a node"
    pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
    devices = [{"name": f"gpu-{i}", "attributes": {"type": {"string": "gpu"}}} for i in range(count)]
    spec = {"driver": driver, "nodeName": node, "pool": pool, "devices": devices}
    return {"metadata": {"name": f"{node}-{driver}"}, "spec": spec}


def offer(admin: Api, node: str, count: int) -> list[tuple[str, str]]:
    "Devices of two drivers on a node: of the class plain-gpu, and of named-gpu, which are `NAMED` too; what was made"
    made = []
    for name, more in {"plain-gpu": {}, "named-gpu": {"extendedResourceName": NAMED}}.items():
        driver = f"{name}.gpuml.test"
        for kind, body in {
            "deviceclasses": device_class(name, driver, **more),
            "resourceslices": resource_slice(node, driver, count),
        }.items():
            admin.create(kind, "", body)
            made.append((kind, body["metadata"]["name"]))
    return made


def claiming(name: str, template: str, command: str = "exec sleep 6000", **more) -> dict:
    "A Job whose pod claims what a template asks for"
    body = job(name, command, gpus=0, resourceClaims=[{"name": "gpus", "resourceClaimTemplateName": template}], **more)
    body["spec"]["template"]["spec"]["containers"][0]["resources"]["claims"] = [{"name": "gpus"}]
    return body
