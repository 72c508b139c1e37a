"""What a fleet is started with: the examples' arguments, and bad options."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.eager_tiny import write_bundle
from helpers.paths import ROOT
from typer.testing import CliRunner

from jet_export.cli.app import app
from jet_export.runtime.capacity import Serving
from jet_export.server.openai.http import Tls
from jet_export.server.openai.serve import HttpOptions
from jet_export.server.ray.autoscaling import KV_AT, KV_USED
from jet_export.server.ray.config import FleetConfig, parse_replicas
from jet_export.server.ray.serve import DIRECT, check_room, serve_fleet
from jet_export.utils.errors import JetExportError

EXAMPLES = ROOT / "examples" / "ray"


def test_the_examples_arguments_are_read() -> None:
    (application,) = yaml.safe_load((EXAMPLES / "serve.yaml").read_text())["applications"]
    config = FleetConfig.of(application["args"])
    assert application["import_path"] == "jet_export.server.ray.app:build"
    assert (config.replicas, config.least, config.most, config.api.names) == (None, 1, 8, ("jet-2b",))
    assert config.serving == Serving(slots=64, max_waiting=256)
    service = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert FleetConfig.of(application["args"]).most == 4


def test_the_examples_are_what_ray_serve_and_kuberay_take() -> None:
    """Ray Serve's own schema; the fields of KubeRay's RayService and of its groups (apis/ray/v1, 1.4)."""
    pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    service = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    for text in ((EXAMPLES / "serve.yaml").read_text(), service["spec"]["serveConfigV2"]):
        assert ServeDeploySchema.model_validate(yaml.safe_load(text)).applications[0].name == "jet-export"
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert set(cluster) == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())  # a map of strings
        (container,) = group["template"]["spec"]["containers"]
        assert {e["name"]: e["value"] for e in container["env"]} == DIRECT


@pytest.mark.parametrize(
    "args, said",
    [
        ({}, "args of the application: 'bundle'"),
        ({"bundle": "b", "replicas": 0}, "--replicas 0: not between 1 and 1024"),
        ({"bundle": "b", "replicas": "some"}, "neither a number nor auto"),
        ({"bundle": "b", "colour": "red"}, "colour"),
        ({"bundle": "b", "serving": {"seats": 3}}, "seats"),
        ({"bundle": "b", "least": 3, "most": 2}, "no range of replicas"),
        ({"bundle": "b", "ingresses": 0}, "needs at least 1"),
        ({"bundle": "b", "router": "best"}, "router 'best' is not known"),
    ],
)
def test_bad_arguments_are_named(args: dict, said: str) -> None:
    with pytest.raises(JetExportError, match=said):
        FleetConfig.of(args)


def test_an_application_that_scales(tmp_path: Path) -> None:
    """Ray checks the deployments' options; no cluster runs."""
    pytest.importorskip("ray")
    from jet_export.server.ray.app import build

    bundle = str(write_bundle(tmp_path / "b"))
    ingress = build({"bundle": bundle, "replicas": "auto", "least": 2, "most": 5, "serving": {"slots": 4}})
    (engine,) = ingress._bound_deployment.init_args
    scaling = engine._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3.0)
    metrics = {KV_USED: {"a": KV_AT, "b": 2 * KV_AT}}
    context = SimpleNamespace(config=scaling, total_num_requests=6, aggregated_metrics=metrics)
    assert scaling.policy.get_policy()(context)[0] == pytest.approx(3)  # a copy, which Ray takes to the controller
    (fixed,) = build({"bundle": bundle, "replicas": 3})._bound_deployment.init_args
    assert fixed._bound_deployment.num_replicas == 3


def test_a_machine_that_is_too_small_is_refused(tmp_path: Path) -> None:
    config = FleetConfig(bundle=str(write_bundle(tmp_path / "b")), replicas=3)
    check_room(config, {"CPU": 3.0})  # a bundle for the CPU needs no GPU
    with pytest.raises(JetExportError, match="this machine has 2 CPUs, each replica takes 1"):
        check_room(config, {"CPU": 2.0})
    with pytest.raises(JetExportError, match="this machine has 1 GPUs, each replica takes 1"):
        check_room(FleetConfig(bundle=config.bundle, replicas=None, least=2, gpus=1.0), {"CPU": 8.0, "GPU": 1.0})


@pytest.mark.parametrize(
    "options, said",
    [
        (["--replicas", "2"], "belongs to --openai"),
        (["--openai", "--ray", "auto"], "belongs to --replicas"),
        (["--openai", "--replicas", "two"], "neither a number nor auto"),
        (["--openai", "--replicas", "2", "--port", "0"], "needs a port"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(JetExportError, match=said):
        CliRunner().invoke(app, ["serve", str(tmp_path), *options], catch_exceptions=False)
    assert parse_replicas("auto") is None and parse_replicas("3") == 3
    with pytest.raises(JetExportError, match="has no TLS"):
        serve_fleet(FleetConfig(bundle=str(tmp_path)), HttpOptions(tls=object.__new__(Tls)), None, print)
