"What a pod finds when it starts: its environment, and its volumes as folders"

import base64
import re
from pathlib import Path

from tests.cluster.api import Api, ApiError

KINDS = {"secret": "Secret", "configMap": "ConfigMap"}


class ConfigError(Exception):
    "The container can't be made as it is described, and what the kubelet says of it"


def variables(api: Api, pod: dict, image: dict[str, str]) -> dict[str, str]:
    "The environment: the image's, then `envFrom`, then `env`"
    container, values = pod["spec"]["containers"][0], dict(image)
    for source in container.get("envFrom", []):
        (kind,) = (kind for kind in KINDS if f"{kind}Ref" in source)
        data = content(api, pod, kind, source[f"{kind}Ref"])
        values |= {source.get("prefix", "") + key: value for key, value in data.items()}
    for variable in container.get("env", []):
        value = _value(api, pod, variable["valueFrom"]) if "valueFrom" in variable else variable.get("value", "")
        if value is not None:
            values[variable["name"]] = expand(value, values)
    return values


def write_volumes(api: Api, pod: dict, folder: Path) -> dict[str, Path]:
    "A folder for each volume, by its name: with the files of a Secret or ConfigMap, else empty"
    places = {volume["name"]: folder / volume["name"] for volume in pod["spec"].get("volumes", [])}
    for volume in pod["spec"].get("volumes", []):
        place = places[volume["name"]]
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o777)
        for kind in KINDS.keys() & volume.keys():
            for name, value in content(api, pod, kind, volume[kind]).items():
                (place / name).write_text(value)
    return places


def content(api: Api, pod: dict, kind: str, source: dict) -> dict[str, str]:
    "What is in a Secret or a ConfigMap"
    name = source.get("name") or source["secretName"]
    try:
        data = api.get(f"{kind.lower()}s", pod["metadata"]["namespace"], name).get("data", {})
    except ApiError as error:
        if error.status == 404 and source.get("optional"):
            return {}
        raise ConfigError(f'{kind.lower()} "{name}" not found') from None
    return {key: base64.b64decode(value).decode() for key, value in data.items()} if kind == "secret" else data


def expand(text: str, values: dict[str, str]) -> str:
    "With $(NAME) replaced, as Kubernetes does it: $$(NAME) stays, and so does what is not known"

    def replace(match):
        return match[0][1:] if match[1] else values.get(match[2], match[0])

    return re.sub(r"(\$?)\$\((\w+)\)", replace, text)


def _value(api: Api, pod: dict, source: dict) -> str | None:
    "What `valueFrom` stands for"
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    (kind,) = (kind for kind in KINDS if f"{kind}KeyRef" in source)
    source = source[f"{kind}KeyRef"]
    data = content(api, pod, kind, source)
    if source["key"] not in data and not source.get("optional"):
        where = f"{pod['metadata']['namespace']}/{source['name']}"
        raise ConfigError(f"couldn't find key {source['key']} in {KINDS[kind]} {where}")
    return data.get(source["key"])


def _field(pod: dict, path: str) -> str:
    "Such as metadata.name, or metadata.labels['app']"
    pod = {**pod, "status": {"podIP": "127.0.0.1", "hostIP": "127.0.0.1"}}
    section, field, key = re.fullmatch(r"(\w+)\.(\w+)(?:\['(.+)'\])?", path).groups()
    found = pod[section].get(field, "")
    return found.get(key, "") if key else found
