"""scripts/check-deploy finds nothing in deploy/, and finds what is broken in a copy of it."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

Resource = dict[str, Any]
Rendered = dict[str, list[Resource]]


def find(resources: list[Resource], kind: str, name: str) -> Resource:
    """A copy of one resource, to be broken."""
    found = (r for r in resources if (r["kind"], r["metadata"]["name"]) == (kind, name))
    return copy.deepcopy(next(found))


def put(resource: Resource, place: tuple[str | int, ...], value: Any) -> None:
    *parents, last = place
    spot: Any = resource
    for part in parents:
        spot = spot[part]
    spot[last] = value


POD = ("spec", "template", "spec")
RANK = ("spec", "leaderWorkerTemplate", "workerTemplate", "spec")


@pytest.mark.usefixtures("npm", "promtool")
def test_the_whole_chain_finds_nothing() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check-deploy"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"num_checks": 7, "num_failed": 0}


@pytest.mark.usefixtures("npm")
def test_a_kustomization_that_names_no_file_is_caught(check: Any, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy/k8s/base", tmp_path / "base")
    (tmp_path / "base/gateway.yaml").unlink()
    with pytest.raises(check.Problem, match="gateway.yaml"):
        check.render(tmp_path / "base")


@pytest.mark.usefixtures("npm")
def test_an_old_copy_of_the_rules_is_caught(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "prometheusrule.yaml"
    old.write_text(check.rule_file().replace("for: 2m", "for: 1m"))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "RULE_FILE", old)
    with pytest.raises(check.Problem, match="is old; run scripts/check-deploy --write"):
        check.check_kustomize()


@pytest.mark.parametrize(
    ("overlay", "kind", "name", "place", "value", "said"),
    [
        ("cpu", "Deployment", "gateway", (*POD, "terminationGracePeriod"), 9, "'terminationGrace"),
        ("cpu", "Deployment", "gateway", ("spec", "replicas"), "two", "'two' is not"),
        ("cpu", "Service", "gateway", ("spec", "ports", 0, "targetport"), 80, "'targetport'"),
        ("cpu", "NetworkPolicy", "worker", ("spec", "ingres"), [], "'ingres'"),
        ("multi-node", "LeaderWorkerSet", "group-dense", ("spec", "size"), 2, "'size'"),
        ("multi-node", "LeaderWorkerSet", "group-dense", (*RANK, "hostNetwrk"), 1, "'hostNetwrk'"),
    ],
)
def test_a_field_that_kubernetes_does_not_know_is_caught(
    check: Any,
    rendered: Rendered,
    overlay: str,
    kind: str,
    name: str,
    place: tuple[str | int, ...],
    value: Any,
    said: str,
) -> None:
    broken = find(rendered[overlay], kind, name)
    check.check_schemas([broken])
    put(broken, place, value)
    with pytest.raises(check.Problem, match=rf"{kind} {name}: .*{said}"):
        check.check_schemas([broken])


@pytest.mark.parametrize(
    ("kind", "name", "place", "value", "said"),
    [
        ("ScaledObject", "worker-dense", ("spec", "maxReplicas"), 4, '"maxReplicas"'),
        ("ServiceMonitor", "gateway", ("spec", "endpoints", 0, "interval"), 15, "interval"),
        # The compiler knows no patterns and no limits.
        ("PodMonitor", "worker", ("spec", "podMetricsEndpoints", 0, "interval"), "15 s", "pattern"),
        ("HTTPRoute", "gateway", ("spec", "hostnames"), ["a_b"], "pattern"),
    ],
)
def test_a_custom_resource_that_its_model_refuses_is_caught(
    check: Any,
    rendered: Rendered,
    kind: str,
    name: str,
    place: tuple[str | int, ...],
    value: Any,
    said: str,
) -> None:
    broken = find(rendered["cpu with all components"], kind, name)
    put(broken, place, value)
    with pytest.raises(check.Problem, match=said):
        check.check_models([broken], {})


@pytest.mark.usefixtures("npm")
def test_a_dashboard_with_an_unknown_field_is_caught(check: Any) -> None:
    dashboard = json.loads(check.dashboards()["workers.json"])
    dashboard["panels"][0]["fieldConfig"]["default"] = {}
    with pytest.raises(check.Problem, match="'\"default\"' does not exist"):
        check.check_models([], {"broken.json": json.dumps(dashboard)})


@pytest.mark.parametrize(
    ("container", "said"),
    [
        ({"resources": {}}, "CKV_K8S_1[0-3] "),
        ({"securityContext": {"runAsUser": 0, "runAsNonRoot": False}}, "CKV_K8S_"),
        ({"image": "cast-serve:latest"}, "CKV_K8S_14 "),
    ],
    ids=["without limits", "root", "latest"],
)
def test_a_container_against_policy_is_caught(
    check: Any, rendered: Rendered, container: dict[str, Any], said: str
) -> None:
    broken = copy.deepcopy(rendered["cpu"])
    deployment = next(r for r in broken if r["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0] |= container
    with pytest.raises(check.Problem, match=said):
        check.check_policy({"broken": broken})


def test_a_skip_without_a_reason_is_caught(check: Any, rendered: Rendered) -> None:
    broken = copy.deepcopy(rendered["multi-node"])
    group = next(r for r in broken if r["kind"] == "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    template["metadata"]["annotations"]["checkov.io/skip3"] = "CKV_K8S_8"
    with pytest.raises(check.Problem, match="group-dense-worker skips CKV_K8S_8 "):
        check.check_policy({"broken": broken})


@pytest.mark.usefixtures("promtool")
@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        ("prometheus.yml", "scrape_interval: 5s", "scrape_interval: 5", "scrape_interval|duration"),
        ("rules.yaml", "sum by (variant) (", "sum by (variant (", "could not parse expression"),
        ("rules.yaml", "summary: Variant", "sumary: Variant", "CastVariantDown"),
        (
            "rules.yaml",
            "offset 15m)\n          ) == 0",
            "offset 15m)\n          ) == 1",
            "CastVariantDown",
        ),
        ("rules.yaml", "deploy.md#castvariantdown", "deploy.md#down", "CastVariantDown"),
        (
            "rules.yaml",
            "groups:",
            "groups:\n  - {name: new, rules: [{record: a:b, expr: up}]}",
            "no test queries a:b",
        ),
        (
            "rules.yaml",
            "groups:",
            "groups:\n  - {name: new, rules: [{alert: New, expr: up == 0}]}",
            "no test in which New fires",
        ),
    ],
    ids=["type", "syntax", "misspelt", "untrue", "runbook", "untested record", "untested alert"],
)
def test_a_broken_prometheus_file_is_caught(
    check: Any, tmp_path: Path, name: str, before: str, after: str, said: str
) -> None:
    shutil.copytree(ROOT / "deploy/prometheus", tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(check.Problem, match=said):
        check.check_prometheus(tmp_path)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("sum(cast_request_total)", "no metric is called cast_request_total"),
        ("rate(cast_inter_token_latency_seconds[5m])", "cast_inter_token_latency_seconds$"),
        ('{__name__=~"cast_.*"}', "no metric is called"),
        ("sum by (variant (up)", "unclosed"),
    ],
)
def test_a_query_that_asks_for_nothing_is_caught(check: Any, query: str, said: str) -> None:
    with pytest.raises(check.Problem, match=said):
        check.check_queries({"panel": query})


def test_dashboards_and_autoscaling_are_asked(check: Any, rendered: Rendered) -> None:
    """Every query of both gets into the check above."""
    found = check.queries(check.dashboards(), rendered["cpu with keda"])
    scalers = [place for place in found if place.startswith("ScaledObject")]
    assert scalers == ["ScaledObject worker-dense", "ScaledObject worker-sparse"]
    num_targets = sum(text.count('"expr"') for text in check.dashboards().values())
    assert num_targets > 20
    assert sum(".json, " in place for place in found) == num_targets


def test_vllms_metrics_are_vllms() -> None:
    """Each listed series is one that vLLM's source names, less what prometheus_client appends."""
    vllm = next(Path(folder) for folder in sys.path if (Path(folder) / "vllm/v1/metrics").is_dir())
    source = "".join(path.read_text() for path in (vllm / "vllm/v1/metrics").glob("*.py"))
    lines = (ROOT / "deploy/check/vllm-metrics.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert len(listed) > 5
    for line in listed:
        names = {line, *(line.removesuffix(s) for s in ("_total", "_bucket", "_sum", "_count"))}
        assert any(f'name="{name}"' in source for name in names), line


def test_a_dockerfile_against_the_rules_is_caught(check: Any, tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM docker.io/library/python:latest\nRUN cd /tmp && pip install torch\n")
    with pytest.raises(check.Problem, match="DL3007"):
        check.check_dockerfile(broken)
