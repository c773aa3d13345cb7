"""cluster.yaml against Ray's own schema, and what neither it nor the Dockerfile may have in it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = (ROOT / "cluster.yaml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Keys, tokens and passwords, as they look.
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_\w{20}|ghp_\w{20}|-----BEGIN|(password|secret|api_key|access_key)\s*[:=]\s*\S", re.I
)
Change = Callable[[dict[str, Any]], Any]


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as Ray completes it. Raises as `ray up` does."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def test_ray_takes_the_file() -> None:
    whole = checked(yaml.safe_load(CLUSTER))
    head, gpu = (whole["available_node_types"][name] for name in ("head", "gpu"))
    assert whole["head_node_type"] == "head" and head["resources"].get("GPU", 0) == 0
    assert head["max_workers"] == 0 and gpu["resources"]["GPU"] == 1
    assert 0 < gpu["min_workers"] <= gpu["max_workers"] <= whole["max_workers"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]  # the head must not be taken away


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(max_worker=3),
        lambda config: config.update(head_node_type="gpu2"),
        lambda config: config["available_node_types"]["gpu"].pop("node_config"),
        lambda config: config["available_node_types"]["gpu"]["resources"].update(GPU="one"),
        lambda config: config.update(idle_timeout_minutes="soon"),
    ],
)
def test_ray_would_refuse_a_mistake(change: Change) -> None:
    import jsonschema

    config = yaml.safe_load(CLUSTER)
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        checked(config)


def test_every_ray_process_asks_for_a_token_and_the_dashboard_stays_on_its_machine() -> None:
    config = yaml.safe_load(CLUSTER)
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0] and "0.0.0.0" not in CLUSTER
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in DOCKERFILE


@pytest.mark.parametrize("text", [CLUSTER, DOCKERFILE])
def test_nothing_secret_is_in_a_file(text: str) -> None:
    assert SECRET.search(text) is None
    assert SECRET.search(text + "\naws_access_key: abc") is not None


def test_what_is_copied_exists_and_the_versions_are_pinned() -> None:
    config = yaml.safe_load(CLUSTER)
    assert config["file_mounts"]["~/cggr_ray"] == "." and ".venv" in config["rsync_exclude"]
    assert any("-c ~/cggr_ray/constraints.txt -e ~/cggr_ray" in command for command in config["setup_commands"])
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "cggr_ray", "trainables", "search_spaces", "analysis"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    assert "pip install --no-cache-dir -c constraints.txt ." in DOCKERFILE


def test_the_container_is_nobody_s_root_and_from_an_official_image() -> None:
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    assert re.fullmatch(r"FROM python:3\.\d+-slim", lines[0]) and DOCKERFILE.count("\nFROM ") == 1
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["racer"] and lines.index("USER racer") > max(k for k, line in enumerate(lines) if "RUN" in line)
