"What an administrator does: apply manifests, ask who may do what"

import json
from functools import cache

from tests.cluster.api import Api, ApiError


class Administrator:
    "Applies manifests to a cluster, and knows which kinds its server has"

    def __init__(self, plane):
        self.plane, self.api = plane, plane.api()
        self._resources = cache(self._discover)

    def _discover(self, version: str) -> dict[str, dict]:
        "The kinds of an API version; none where the server does not have it"
        try:
            found = self.api.request("GET", f"/api/{version}" if version == "v1" else f"/apis/{version}")
        except ApiError:
            return {}
        return {r["kind"]: r for r in json.loads(found.data)["resources"] if "/" not in r["name"]}

    def knows(self, manifest: dict) -> bool:
        return manifest["kind"] in self._resources(manifest["apiVersion"])

    def path(self, manifest: dict, named: bool = True, namespace: str = "") -> str:
        "Where an object is, or where one of its kind is made"
        version = manifest["apiVersion"]
        resource = self._resources(version)[manifest["kind"]]
        namespace = manifest["metadata"].get("namespace") or namespace
        where = f"/namespaces/{namespace}" if resource["namespaced"] else ""
        path = f"{'/api' if version == 'v1' else '/apis'}/{version}{where}/{resource['name']}"
        return f"{path}/{manifest['metadata']['name']}" if named else path

    def apply(self, manifest: dict, trial: bool = False) -> None:
        "As `kubectl apply --server-side`; as a trial everything is checked, and nothing kept"
        query = {"fieldManager": "tests", "force": "true"} | ({"dryRun": "All"} if trial else {})
        self.api.request("PATCH", self.path(manifest), manifest, query, kind="application/apply-patch+yaml")

    def remove(self, manifest: dict) -> None:
        try:
            self.api.request("DELETE", self.path(manifest), {"gracePeriodSeconds": 0})
        except ApiError as error:
            if error.status != 404:
                raise

    def token(self, namespace: str, account: str) -> str:
        "A ServiceAccount's own, as a pod would carry it"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        return self.api.create("serviceaccounts", namespace, body, account, "token")["status"]["token"]


def watch_config_maps(plane) -> None:
    """A policy that concerns nothing, whose values are a ConfigMap: the server watches ConfigMaps while it is there.

    Once no policy has one, the server stops its watch for good, and knows no later change of a ConfigMap (1.37.2)"""
    spec = {"paramKind": {"apiVersion": "v1", "kind": "ConfigMap"}, "validations": [{"expression": "true"}]}
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CONNECT"], "resources": ["nodes/proxy"]}
    spec |= {"matchConstraints": {"resourceRules": [rule]}}
    values = {"name": "none", "namespace": "default", "parameterNotFoundAction": "Allow"}
    binding = {"policyName": "watching", "validationActions": ["Warn"], "paramRef": values}
    version = "admissionregistration.k8s.io/v1"
    for kind, body in (("ValidatingAdmissionPolicy", spec), ("ValidatingAdmissionPolicyBinding", binding)):
        made = {"apiVersion": version, "kind": kind, "metadata": {"name": "watching"}, "spec": body}
        Administrator(plane).apply(made)


def may(api: Api, verb: str, resource: str, namespace: str = "", name: str = "") -> bool:
    "Whether the user of these requests may, by the user's own question; a resource as kubectl has it: jobs.batch, pods/log"
    resource, _, part = resource.partition("/")
    resource, _, group = resource.partition(".")
    attributes = {"verb": verb, "group": group, "resource": resource, "subresource": part}
    return _review(api, "SelfSubjectAccessReview", attributes | {"namespace": namespace, "name": name})


def _review(api: Api, kind: str, attributes: dict, **who) -> bool:
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": {"resourceAttributes": attributes, **who}}
    answer = api.request("POST", f"/apis/authorization.k8s.io/v1/{kind.lower()}s", body)
    return json.loads(answer.data)["status"]["allowed"]
