from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from manylora.deploy.ray_serve.app import FleetConfig, application, fleet, fleet_config, parser
from manylora.server.config import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return ["--model", str(tmp_path / "base"), "--state-dir", str(tmp_path / "state")]


def config_of(flags: list[str], *more: str) -> FleetConfig:
    return fleet_config(parser().parse_args([*flags, *more]))


def test_a_server_s_flags_and_the_fleet_s(flags: list[str], tmp_path: Path) -> None:
    config = config_of(flags, "--replicas", "3", "--max-rows", "8", "--routing", "random", "--admin-key", "k")
    assert (config.replicas, config.max_replicas, config.routing) == (3, None, "random")
    assert (config.target_ongoing, config.max_ongoing) == (8, 16)
    assert config.server.api.admin_key == "k"
    assert config.address.directory == tmp_path / "state"
    assert config.address.name != config_of([*flags[:-1], str(tmp_path / "other")]).address.name


def test_paths_mean_the_same_in_a_replica_s_directory(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "alice").mkdir()
    monkeypatch.chdir(tmp_path)
    config = config_of(["--model", "base", "--adapter", "alice=alice", "--adapter", "hub=org/hub"])
    assert config.server.model == str(tmp_path / "base")
    assert [spec.source for spec in config.server.adapters] == [str(tmp_path / "alice"), "org/hub"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter-dir", ".", "--watch"], "--watch: replicas would see a folder change at different times"),
        (["--state-dir", "none"], "--state-dir: a fleet needs one"),
        (["--port", "0"], "--port: Ray's proxies need a port"),
        (["--replicas", "0"], "--replicas: expected 1 to 10000, got 0"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas: expected 3 to 10000, got 2"),
        (["--target-ongoing", "0"], "--target-ongoing: expected more than 0, got 0"),
        (["--max-ongoing", "0"], "--max-ongoing: expected 1 or more, got 0"),
        (["--ingresses", "0"], "--ingresses: expected 1 or more, got 0"),
        (["--routing", "nearest"], "--routing: expected affinity or random, got 'nearest'"),
        (["--replica-gpus", "-1"], "--replica-gpus: expected 0 or more, got -1"),
        (["--max-rank", "0"], "--max-rank: expected 1 to 1024, got 0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_flag(flags: list[str], more: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(flags, *more)
    assert str(error.value).startswith(message)


def test_the_application_has_what_the_flags_ask_for(flags: list[str]) -> None:
    config = config_of(flags, "--replicas", "2", "--max-replicas", "4", "--max-rows", "8", "--ingresses", "2")
    ingress = application(config)._bound_deployment
    assert (ingress.name, ingress.num_replicas) == ("Ingress", 2)
    server = ingress.init_args[0]._bound_deployment
    made = server._deployment_config
    assert made.autoscaling_config.min_replicas == 2
    assert made.autoscaling_config.max_replicas == 4
    assert made.autoscaling_config.target_ongoing_requests == 8
    assert made.max_ongoing_requests == 16
    assert made.max_queued_requests == config.server.engine.max_queue
    assert made.graceful_shutdown_timeout_s > config.server.api.shutdown_grace
    assert made.request_router_config.request_router_kwargs == {"policy": "affinity"}
    fixed = application(replace(config, max_replicas=None))._bound_deployment.init_args[0]._bound_deployment
    assert fixed.num_replicas == 2


def test_what_a_ray_service_imports_takes_flags_alone(flags: list[str]) -> None:
    assert fleet({"flags": flags})._bound_deployment.name == "Ingress"
    with pytest.raises(ConfigError, match="expected flags alone, got \\['replicas'\\] too"):
        fleet({"flags": flags, "replicas": ["2"]})


def test_neither_the_fleet_s_process_nor_the_front_holds_torch() -> None:
    code = "import sys, manylora.deploy.ray_serve.app; sys.exit(bool({'torch', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_wrong_flags_end_the_command_before_ray_is_started(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "manylora.deploy.ray_serve", "--replicas", "0", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "manylora: --replicas: expected 1 to 10000, got 0" in done.stderr
    assert "Ray" not in done.stderr
