"""`ray_cluster.yaml`: Ray's own validation takes it, and it says what a farm needs of its nodes."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[2] / "ray_cluster.yaml"
CAPABLE = {"g5.2xlarge": (24, 32), "g6.2xlarge": (24, 32), "g6e.2xlarge": (48, 64)}
"""Machines with one GPU that has bfloat16: its memory and the host's, GB. A g4dn's T4 has none."""


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_rays_own_validation_accepts_it(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert prepared["max_workers"] == config["available_node_types"]["gpu"]["max_workers"]


def test_a_key_that_ray_does_not_know_is_refused(config):
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config({**prepare_config(config), "head_nodes": 1})


def test_the_head_renders_nothing_and_a_worker_has_one_capable_gpu(config):
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert gpu["resources"]["GPU"] == 1
    vram, memory = CAPABLE[gpu["node_config"]["InstanceType"]]
    assert vram >= 16
    assert memory >= 32


def words(command: str) -> list[str]:
    return shlex.split(command.replace("&", " "))


def test_every_ray_asks_for_its_token_and_the_head_runs_farm_up(config):
    head, workers = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    starts = [words(command) for command in [*head, *workers] if " start " in command or "farm up" in command]
    assert len(starts) == 3
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]
    up = starts[1]
    assert up[up.index("~/venv/bin/farm") :][:2] == ["~/venv/bin/farm", "up"]
    assert {"FARM_VRAM_GIB=16", "FARM_ADDRESS=127.0.0.1:6379"} <= set(up)
    assert f"FARM_RENDERERS={config['max_workers']}" in up


def test_its_ports_are_closed(config):
    head = words(config["head_start_ray_commands"][1])
    closing = {"--include-dashboard=false", "AUTOSCALER_METRIC_PORT=-1", "DASHBOARD_METRIC_PORT=-1"}
    assert closing | {"RAY_enable_metrics_collection=0"} <= set(head)
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(not found["CidrIp"].endswith("/0") for found in rule["IpRanges"])
    assert not any("FARM_HTTP_HOST" in command for command in config["head_start_ray_commands"])
