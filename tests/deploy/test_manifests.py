"""The Kubernetes manifests against schemas, without a cluster.

Kubernetes' own kinds: the JSON schemas that kubernetes-validate ships, which are made from Kubernetes' OpenAPI
document; strictly, so that a field that does not exist is an error. RayService: its fields as far as they are used,
after the Go types of KubeRay (ray-operator/apis/ray/v1: RayServiceSpec, RayClusterSpec, HeadGroupSpec,
WorkerGroupSpec, AutoscalerOptions); its pod templates by Kubernetes' schema of a pod; its Serve config by Ray's own
model of it; its flags by our own parser. Nothing here was applied to a cluster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBERNETES = "1.34"
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


COUNT = {"type": "integer", "minimum": 0}
TEMPLATE = {"type": "object"}  # see ``pods_of``
RAY_SERVICE = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_object(["name"], name={"type": "string"}, labels=STRINGS),
    spec=_object(
        ["serveConfigV2", "rayClusterConfig"],
        serveConfigV2={"type": "string"},
        rayClusterConfig=_object(
            ["headGroupSpec"],
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=_object([], idleTimeoutSeconds=COUNT),
            headGroupSpec=_object(["rayStartParams", "template"], rayStartParams=STRINGS, template=TEMPLATE),
            workerGroupSpecs={
                "type": "array",
                "items": _object(
                    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                    groupName={"type": "string"},
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=STRINGS,
                    template=TEMPLATE,
                ),
            },
        ),
    ),
)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def check(document: dict[str, Any]) -> None:
    """Raises an error of the schema that it does not fit."""
    if document.get("kind") != "RayService":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.Draft202012Validator(RAY_SERVICE).validate(document)
    for template in pods_of(document):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pods_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = document["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def ray_service() -> dict[str, Any]:
    return next(one for one in documents("rayservice.yaml") if one["kind"] == "RayService")


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_every_document_fits_its_schema(name: str) -> None:
    found = documents(name)
    assert found
    for document in found:
        check(document)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *way, last = [int(step) if step.isdecimal() else step for step in path.split("/")]
        at: Any = document
        for step in way:
            at = at[step]
        at[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("server.yaml", "Deployment", _set("spec/replica", 2)),
        ("server.yaml", "Deployment", _set("spec/replicas", "two")),
        ("server.yaml", "Deployment", _set("spec/template/spec/containers/0/readinessProbe/httpget", {})),
        ("server.yaml", "Service", _set("spec/ports/0/targetport", 8000)),
        ("rayservice.yaml", "RayService", _set("spec/serveConfig", "")),
        ("rayservice.yaml", "RayService", _set("spec/rayClusterConfig/workerGroupSpecs/0/maxReplicas", "8")),
        ("rayservice.yaml", "RayService", _set("spec/rayClusterConfig/headGroupSpec/rayStartParams/num-cpus", 0)),
        (
            "rayservice.yaml",
            "RayService",
            _set("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/envs", []),
        ),
    ],
)
def test_the_schemas_find_mistakes(name: str, kind: str, change: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(next(one for one in documents(name) if one["kind"] == kind))
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_what_belongs_together_has_one_name() -> None:
    claim, deployment, service = documents("server.yaml")
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert service["spec"]["ports"][0]["targetPort"] == pod["spec"]["containers"][0]["ports"][0]["name"]
    for template in pods_of(ray_service()):
        claimed = template["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
        assert claimed == documents("rayservice.yaml")[0]["metadata"]["name"]


def test_the_server_s_flags_are_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from manylora.server.cli import serve_config
    from manylora.server.cli_flags import add_serve

    arguments = documents("server.yaml")[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    commands = argparse.ArgumentParser().add_subparsers()
    parsed = add_serve(commands).parse_args(_below(tmp_path, arguments[1:]))
    config = serve_config(parsed)
    grace = documents("server.yaml")[1]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.api.shutdown_grace + 5
    assert config.api.is_public


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_the_fleet_s_config_is_one_of_ray_s_and_its_flags_are_ours(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import ray
    from ray.serve.schema import ServeDeploySchema

    from manylora.deploy.ray_serve.app import fleet, fleet_config, parser

    document = ray_service()
    serve = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = serve.applications
    assert application.import_path == f"{fleet.__module__}:{fleet.__name__}"
    config = fleet_config(parser().parse_args(_below(tmp_path, application.args["flags"])))
    group = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (config.replicas, config.max_replicas) == (group["minReplicas"], group["maxReplicas"])
    assert serve.http_options.port == config.server.api.port
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.server.api.shutdown_grace
    assert document["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    requests = group["template"]["spec"]["containers"][0]["resources"]
    assert config.cpus == float(requests["requests"]["cpu"])
    assert config.gpus == float(requests["limits"]["nvidia.com/gpu"])


def _below(folder: Path, flags: list[str]) -> list[str]:
    """The flags with /data moved to ``folder``, where there are directories."""
    moved = [flag.replace("=/data", f"={folder}") for flag in flags]
    for flag in moved:
        if f"={folder}" in flag:
            Path(flag.partition("=")[2]).mkdir(parents=True, exist_ok=True)
    return moved
