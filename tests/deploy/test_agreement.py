"""Compose, Kubernetes, Prometheus, the image and the command line name the same things."""

import json
import re
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import typer
import yaml

from cast_serve.__main__ import app
from cast_serve.engine.worker import _publish
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.guard import Guard

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
OURS = ("gateway", "worker-dense", "worker-sparse")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Named = dict[tuple[str, str], dict[str, Any]]


def kubernetes_container(cpu: Named, name: str) -> dict[str, Any]:
    return dict(cpu["Deployment", name]["spec"]["template"]["spec"]["containers"][0])


def ours_of(command: list[str]) -> list[str]:
    """The part before `--`: after it come vLLM's flags."""
    return command[: command.index("--")] if "--" in command else command


def without_cores(command: list[str]) -> list[str]:
    """Compose shares one machine out by cores, which Kubernetes does by limits."""
    if "--cores" not in command:
        return command
    at = command.index("--cores")
    return command[:at] + command[at + 2 :]


@pytest.mark.parametrize("name", OURS)
def test_compose_and_kubernetes_run_the_same_command(cpu: Named, name: str) -> None:
    assert without_cores(SERVICES[name]["command"]) == kubernetes_container(cpu, name)["args"]


@pytest.mark.parametrize("name", OURS)
def test_commands_and_flags_exist(name: str) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    command, *arguments = ours_of(SERVICES[name]["command"])
    known = {flag for parameter in commands[command].params for flag in parameter.opts}
    used = {argument for argument in arguments if argument.startswith("--")}
    assert used
    assert used <= known


def test_settings_exist_and_agree(cpu: Named) -> None:
    in_compose = SERVICES["gateway"]["environment"]
    (source,) = kubernetes_container(cpu, "gateway")["envFrom"]
    in_kubernetes = cpu["ConfigMap", source["configMapRef"]["name"]]["data"]
    # Compose publishes on this machine alone, and asks clients for no key unless it is given.
    assert in_compose["CAST_API_KEYS"] == "${CAST_API_KEYS:-}"
    files = {"CAST_API_KEYS_FILE": "/etc/cast-serve/keys"}
    files["CAST_WORKER_KEY_FILE"] = "/etc/cast-worker/key"
    keys = ("CAST_WORKER_KEY", "CAST_API_KEYS")
    shared = {name: value for name, value in in_compose.items() if name not in keys}
    assert {**shared, **files} == in_kubernetes
    known = {f"CAST_{field.upper()}" for field in GatewaySettings.model_fields}
    assert set(in_compose) <= known


@pytest.mark.parametrize("name", OURS)
def test_images_of_the_packages_version(cpu: Named, name: str) -> None:
    image, target = f"cast-serve:{VERSION}", None
    if name == "gateway":
        image, target = f"cast-serve-gateway:{VERSION}", "gateway"
        assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text()
    assert SERVICES[name]["image"] == image
    assert SERVICES[name]["build"].get("target") == target
    assert kubernetes_container(cpu, name)["image"] == f"registry.example.com/{image}"


@pytest.mark.parametrize("name", OURS)
def test_ports_agree(cpu: Named, name: str) -> None:
    command = SERVICES[name]["command"]
    port = command[command.index("--port") + 1]
    assert kubernetes_container(cpu, name)["ports"][0]["containerPort"] == int(port)
    *command, url = SERVICES[name]["healthcheck"]["test"]
    assert command == ["CMD", "python", "-m", "cast_serve.health"]  # nothing to quote
    assert re.fullmatch(rf"http://127\.0\.0\.1:{port}/\w+", url)


def test_the_gateway_knows_every_worker_by_its_name_and_port() -> None:
    variants = re.findall(r"(\w+)=http://([\w-]+):(\d+)", " ".join(SERVICES["gateway"]["command"]))
    for variant, host, port in variants:
        worker = SERVICES[host]["command"]
        assert worker[worker.index("--name") + 1] == variant
        assert worker[worker.index("--port") + 1] == port
        assert set(SERVICES[host]["networks"]) & set(SERVICES["gateway"]["networks"])
    assert {host for _, host, _ in variants} == {name for name in OURS if name != "gateway"}


def test_prometheus_scrapes_the_gateway(cpu: Named) -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert int(port) == kubernetes_container(cpu, host)["ports"][0]["containerPort"]
    assert set(SERVICES["prometheus"]["networks"]) & set(SERVICES[host]["networks"])


def mounted(service: dict[str, Any], path: str) -> Path:
    """Where compose takes a container's file from."""
    mounts = dict(reversed(volume.split(":")[:2]) for volume in service["volumes"])
    return ROOT / "deploy" / str(mounts[path])


def test_prometheus_finds_its_files() -> None:
    service = SERVICES["prometheus"]
    config_at = Path(service["command"][0].removeprefix("--config.file="))
    config = yaml.safe_load(mounted(service, str(config_at)).read_text())
    (rules,) = config["rule_files"]
    assert mounted(service, str(config_at.parent / rules)).is_file()


def test_grafana_finds_its_files_and_prometheus() -> None:
    service = SERVICES["grafana"]
    folder = mounted(service, "/etc/grafana/provisioning")
    (provider,) = yaml.safe_load((folder / "dashboards/cast-serve.yaml").read_text())["providers"]
    home = Path(service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounted(service, provider["options"]["path"]) / home.name).is_file()
    assert str(home.parent) == provider["options"]["path"]
    sources = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]
    assert set(service["networks"]) & set(SERVICES["prometheus"]["networks"])


def test_grafana_shows_every_label_of_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[str] = []

    def gauge(name: str, text: str, labels: list[str]) -> Any:
        published.extend(labels)
        return MagicMock()

    monkeypatch.setattr("prometheus_client.Gauge", gauge)
    _publish("sparse", defaultdict(int), "bfloat16")
    board = json.loads((ROOT / "deploy/grafana/dashboards/variants.json").read_text())
    (panel,) = (panel for panel in board["panels"] if panel["title"] == "What runs")
    by, of = re.findall(r"\((.*?)\)", panel["targets"][0]["expr"])
    assert of == "cast_variant_info"
    assert "head" in published
    assert by.split(", ") == published


@pytest.mark.parametrize("name", SERVICES)
def test_compose_services_are_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["image"].endswith(":latest")
    for published in service.get("ports", []):
        address = r"\$\{CAST_PUBLISH:-127\.0\.0\.1\}:\$\{CAST_[A-Z]+_PORT:-(\d+)\}:\1"
        assert re.fullmatch(address, published), published


@pytest.mark.parametrize("name", [name for name in OURS if name != "gateway"])
def test_workers_read_weights_only_and_cannot_be_reached_from_outside(name: str) -> None:
    weights, compiled = SERVICES[name]["volumes"]
    assert weights.endswith(":/models:ro")
    assert compiled == f"compiled-{name.removeprefix('worker-')}:/tmp/cache"  # its own
    assert compiled.partition(":")[0] in COMPOSE["volumes"]
    assert SERVICES[name]["networks"] == ["workers"]
    assert COMPOSE["networks"]["workers"]["internal"] is True
    key = SERVICES[name]["environment"]["CAST_WORKER_KEY"]
    assert key == SERVICES["gateway"]["environment"]["CAST_WORKER_KEY"]
    assert key.startswith("${CAST_WORKER_KEY:?")  # without one nothing starts
    assert "ports" not in SERVICES[name]


def test_the_gate_and_the_alert_have_one_limit_of_agreement() -> None:
    guard = Guard.read(ROOT / "deploy/canary-guard.toml")
    rules = (ROOT / "deploy/prometheus/rules.yaml").read_text()
    limit = re.search(r"cast_shadow_token_agreement_ratio\) < ([\d.]+)", rules)
    assert limit is not None
    assert guard.min_token_agreement == float(limit[1])
