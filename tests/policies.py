"ValidatingAdmissionPolicies, evaluated by their own CEL expressions as the API server does it from 1.30 on"

from collections.abc import Callable
from dataclasses import dataclass, field

import celpy
from celpy import celtypes

from tests.manifests import find, matches

RESOURCES = {
    "Pod": ("", "pods"), "Job": ("batch", "jobs"), "CronJob": ("batch", "cronjobs"), "Deployment": ("apps", "deployments"),
    "StatefulSet": ("apps", "statefulsets"), "ReplicationController": ("", "replicationcontrollers"),
    "Scale": ("apps", "statefulsets"),
}  # fmt: skip


@dataclass
class Request:
    "What a user asks of the API server"

    user: str
    object: dict
    namespace: str
    operation: str = "CREATE"
    groups: list[str] = field(default_factory=list)
    part: str = ""  # subresource


def refusals(manifests: list[dict], request: Request, allowed: Callable[[str, dict], bool]) -> list[str]:
    "What the policies say against a request, as `POLICY: message`; `allowed(user, attributes)` is what roles say"
    said = []
    for binding in (m["spec"] for m in manifests if m["kind"] == "ValidatingAdmissionPolicyBinding"):
        policy = find(manifests, "ValidatingAdmissionPolicy", binding["policyName"])["spec"]
        if _concerns(policy, binding, request, manifests):
            said += [
                f"{binding['policyName']}: {message}"
                for message in _verdict(policy, binding, request, manifests, allowed)
            ]
    return said


def _concerns(policy: dict, binding: dict, request: Request, manifests: list[dict]) -> bool:
    group, resource = RESOURCES[request.object["kind"]]
    resource += f"/{request.part}" if request.part else ""
    rules = policy["matchConstraints"]["resourceRules"]
    hit = any(
        group in rule["apiGroups"] and resource in rule["resources"] and request.operation in rule["operations"]
        for rule in rules
    )
    labels = next(
        (
            m["metadata"]["labels"]
            for m in manifests
            if (m["kind"], m["metadata"]["name"]) == ("Namespace", request.namespace)
        ),
        {},
    )
    return hit and matches(binding.get("matchResources", {}).get("namespaceSelector", {}), labels)


def _verdict(policy: dict, binding: dict, request: Request, manifests: list[dict], allowed: Callable) -> list[str]:
    group, resource = RESOURCES[request.object["kind"]]
    about = {
        "operation": request.operation,
        "namespace": request.namespace,
        "name": request.object.get("metadata", {}).get("name", ""),
        "userInfo": {"username": request.user, "groups": request.groups},
        "resource": {"group": group, "version": "v1", "resource": resource},
    }
    known = {"object": celpy.json_to_cel(request.object), "request": celpy.json_to_cel(about)}
    known |= {"authorizer": celtypes.MapType({}), "variables": celtypes.MapType({})}
    if "paramKind" in policy:
        known["params"] = celpy.json_to_cel(
            find(manifests, "ConfigMap", binding["paramRef"]["name"], request.namespace)
        )

    def value(expression):
        return _program(expression, lambda attributes: allowed(request.user, attributes)).evaluate(known)

    try:
        if not all(value(condition["expression"]) for condition in policy.get("matchConditions", [])):
            return []
        for variable in policy.get("variables", []):
            known["variables"][celtypes.StringType(variable["name"])] = value(variable["expression"])
        wrong = [check for check in policy["validations"] if not value(check["expression"])]
        return [
            str(value(check["messageExpression"]) if "messageExpression" in check else check["message"])
            for check in wrong
        ]
    except celpy.CELEvalError as e:
        return [f"an expression failed: {e}"]  # failurePolicy: Fail


def _program(expression: str, allowed: Callable[[dict], bool]) -> celpy.Runner:
    "With what Kubernetes adds to CEL: `split`, and the authorizer, here a map that grows with each call"

    def step(name):
        return lambda so_far, value: celtypes.MapType({**so_far, celtypes.StringType(name): value})

    functions = {name: step(name) for name in ("group", "resource", "namespace", "name", "check")}
    functions["allowed"] = lambda asked: celtypes.BoolType(allowed({str(k): str(v) for k, v in asked.items()}))
    functions["split"] = lambda text, by: celtypes.ListType(
        celtypes.StringType(part) for part in str(text).split(str(by))
    )
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions=functions)
