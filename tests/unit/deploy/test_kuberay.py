"""The manifests for KubeRay, against the parts of its CRD that they use, and against what plutino and Ray need."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

from coordinator.cli import app
from coordinator.scheduling.ray_backend.placement import LEAST_BUDGET_BYTES, OVERHEAD_BYTES, RayNode, place
from plutino.sizes import GIB, MIB, parse_size

KUBERAY_DIR = Path(__file__).resolve().parents[3] / "deploy" / "kuberay"
RAY_DAEMONS_BYTES = 300 * MIB
"""Measured: raylet and the two agents beside it take 205 MiB."""


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY_DIR / "cluster.yaml").read_text()))


@pytest.fixture(scope="module")
def cluster(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (document for document in documents if document["kind"] == "RayCluster")
    return found


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    values = yaml.safe_load((KUBERAY_DIR / "raycluster.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(values)
    return jsonschema.Draft202012Validator(values)


def groups_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def node_of(group: dict[str, Any]) -> RayNode:
    """The group's pods as Ray sees them; KubeRay fills processors in from the limit."""
    container, parameters = container_of(group), group["rayStartParams"]
    cpus = float(parameters.get("num-cpus", container["resources"]["limits"]["cpu"]))
    memory = float(parameters["memory"])
    return RayNode(node_id="n", host="n", address="10.0.0.1", free_cpus=cpus, free_memory_bytes=memory)


def test_cluster_is_what_the_crd_allows(cluster: dict[str, Any], schema: jsonschema.Draft202012Validator) -> None:
    assert [error.message for error in schema.iter_errors(cluster)] == []


@pytest.mark.parametrize("damage", ["unknown field", "no template", "number as parameter", "bad quantity"])
def test_schema_refuses_a_damaged_cluster(
    cluster: dict[str, Any], schema: jsonschema.Draft202012Validator, damage: str
) -> None:
    broken = yaml.safe_load(yaml.safe_dump(cluster))
    worker = broken["spec"]["workerGroupSpecs"][0]
    if damage == "unknown field":
        worker["replica"] = 1
    elif damage == "no template":
        del worker["template"]
    elif damage == "number as parameter":
        worker["rayStartParams"]["memory"] = 1
    else:
        container_of(worker)["resources"]["limits"]["memory"] = "8 GiB"

    assert list(schema.iter_errors(broken))


def test_every_container_holds_rays_token_from_the_secret_and_no_other_secret_is_written(
    cluster: dict[str, Any], documents: list[dict[str, Any]]
) -> None:
    for group in groups_of(cluster):
        environment = {entry["name"]: entry for entry in container_of(group)["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "plutino-ray-token"
    assert "Secret" not in {document["kind"] for document in documents}


def test_policies_let_only_the_clusters_pods_reach_ray_and_others_the_ports_with_tls(
    documents: list[dict[str, Any]], cluster: dict[str, Any]
) -> None:
    own = {"ray.io/cluster": cluster["metadata"]["name"]}
    among, devices = (document["spec"] for document in documents if document["kind"] == "NetworkPolicy")

    assert among["podSelector"]["matchLabels"] == own
    assert among["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
    assert devices["podSelector"]["matchLabels"] == {**own, "ray.io/node-type": "head"}
    # Devices, joining and bulk; the people's port, in between, is for the pod itself.
    assert [entry["port"] for rule in devices["ingress"] for entry in rule["ports"]] == [7420, 7422, 7423]


def test_head_runs_the_coordinator_with_options_that_it_knows(cluster: dict[str, Any]) -> None:
    (script,) = container_of(cluster["spec"]["headGroupSpec"])["args"]
    words = shlex.split(re.sub(r"\$\([^)]*\)", "10.0.0.1", script.split("exec plutino ", 1)[1].replace("\\\n", " ")))

    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    options = command.make_context("up", words[1:]).params

    assert (options["fleet"], options["ray_address"], options["listen"]) == ("ray", "10.0.0.1:6379", "0.0.0.0:7420")


def test_each_worker_gets_an_agent_and_the_head_none(cluster: dict[str, Any]) -> None:
    head, *workers = (place([node_of(group)], covered=()) for group in groups_of(cluster))

    assert head.bundles == ()
    assert [bundle.num_cpus for worker in workers for bundle in worker.bundles] == [4, 2]
    assert all(bundle.budget_bytes > LEAST_BUDGET_BYTES for worker in workers for bundle in worker.bundles)


def test_limits_hold_rays_daemons_and_object_store_beside_the_agent(cluster: dict[str, Any]) -> None:
    for group in groups_of(cluster):
        parameters, resources = group["rayStartParams"], container_of(group)["resources"]
        inside = int(parameters["memory"]) + int(parameters["object-store-memory"]) + RAY_DAEMONS_BYTES

        assert inside <= parse_size(resources["limits"]["memory"].replace("Gi", "GiB"))
        assert resources["requests"] == resources["limits"]
    assert OVERHEAD_BYTES < GIB


def test_ray_of_image_and_cluster_is_the_tested_one(cluster: dict[str, Any]) -> None:
    image = (KUBERAY_DIR / "Dockerfile").read_text().split("FROM rayproject/ray:", 1)[1].split("-", 1)[0]

    assert cluster["spec"]["rayVersion"] == image
    assert image.split(".")[0] == version("ray").split(".")[0]
