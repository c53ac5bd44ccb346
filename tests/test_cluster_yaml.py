"""cluster.yaml, by Ray's own loader and schema, and what it promises about security and cost."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.resources import check, shape_of
from cluster.store import RunStore
from pipeline.plan import demands, plan
from pipeline.recipe.reading import load

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture(scope="module")
def config() -> Any:
    """The file as `ray up` completes it before it asks AWS anything."""
    prepared = prepare_config(yaml.safe_load(TEXT))
    validate_config(prepared)
    return prepared


def workers(config: Any) -> dict[str, Any]:
    return {name: spec for name, spec in config["available_node_types"].items() if name != config["head_node_type"]}


def starts(config: Any, role: str) -> list[str]:
    return [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]


def test_ray_takes_every_key_of_it(config: Any) -> None:
    assert config["provider"]["type"] == "aws"
    unknown = yaml.safe_load(TEXT) | {"head_nodes": {}}
    with pytest.raises(Exception, match="head_nodes"):
        validate_config(prepare_config(unknown))


def test_the_head_runs_no_work(config: Any) -> None:
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    (start,) = starts(config, "head")
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(start.split())


def test_every_node_asks_for_the_token(config: Any) -> None:
    for role in ("head", "worker"):
        (start,) = starts(config, role)
        assert start.index("export RAY_AUTH_MODE=token") < start.index("ray start")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["head_setup_commands"][0]
    assert "chmod 600 ~/.ray/auth_token" in config["worker_setup_commands"][0]


def test_nothing_listens_to_the_world_but_ssh(config: Any) -> None:
    (start,) = starts(config, "head")
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "0.0.0.0" not in TEXT
    assert "IpPermissions" not in config["provider"]["security_group"]


def test_permissions_come_from_instance_profiles_and_no_secret_is_in_the_file(config: Any) -> None:
    for name, spec in config["available_node_types"].items():
        node = spec["node_config"]
        assert node["IamInstanceProfile"] == {"Name": "tophat-head" if name == "head" else "tophat-worker"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert not re.search(r"AKIA|SECRET|PASSWORD|AWS_ACCESS|BEGIN .*KEY|\b[0-9a-f]{32,}\b", TEXT)
    assert not re.search(r"https?://|--(extra-)?index-url|docker", TEXT)


def test_workers_start_from_none_and_those_with_gpus_are_spot(config: Any) -> None:
    assert {name: spec["min_workers"] for name, spec in workers(config).items()} == {"cpu": 0, "gpu": 0}
    for spec in workers(config).values():
        spot = spec["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == ("GPU" in spec["resources"])
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["max_workers"] == sum(spec["max_workers"] for spec in workers(config).values())


def test_nodes_get_the_versions_that_were_tested(config: Any) -> None:
    mounts = config["file_mounts"]
    for name in ("pyproject.toml", "constraints.txt"):
        assert mounts[f"~/tophat/{name}"] == name
        assert (ROOT / name).is_file()
    pinned = re.search(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == ray.__version__
    (install,) = [command for command in config["setup_commands"] if "pip install" in command]
    assert "--constraint ~/tophat/constraints.txt" in install
    assert "--requirement ~/tophat/requirements.txt" in install


def test_the_requirements_that_a_node_installs(config: Any, tmp_path: Path) -> None:
    (extract,) = [command for command in config["setup_commands"] if "tomllib" in command]
    (tmp_path / "tophat").mkdir()
    (tmp_path / "tophat" / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    command = extract.replace("python3", sys.executable).replace("~", str(tmp_path))
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=30)
    requirements = (tmp_path / "tophat" / "requirements.txt").read_text().splitlines()
    assert any(re.match(r"ray\[.*default.*\]", line) for line in requirements)
    assert not any(line.startswith(("mypy", "pytest")) for line in requirements)


def test_it_can_grow_to_what_the_papers_recipe_needs(config: Any, tmp_path: Path) -> None:
    head = {"Alive": True, "Labels": {"ray.io/node-group": "head"}, "Resources": {"node:__internal_head__": 1.0}}
    check(demands(plan(load("paper"), RunStore(str(tmp_path))).planned), shape_of([head], config))
