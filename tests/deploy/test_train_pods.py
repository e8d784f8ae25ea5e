"""deploy/k8s/train: its objects against their schemas, and its command as two pods would run it."""

import copy
import os
import re
import shutil
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from pydantic import ValidationError

from cast_serve.checkpoint.record import verify
from cast_serve.ports import free_port
from cast_train.__main__ import app
from tests.cast_train.conftest import llama_dir, settings_file, text_file

__all__ = ["llama_dir", "settings_file", "text_file"]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/k8s/train"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
JOB = ("spec", "replicatedJobs", 0, "template", "spec")
CONTAINER = (*JOB, "template", "spec", "containers", 0)

Resource = dict[str, Any]


@pytest.fixture(scope="module")
def resources(npm: str, check: Any) -> dict[str, Resource]:
    return {each["kind"]: each for each in check.render(FOLDER)}


@pytest.fixture(scope="module")
def model(npm: str, check: Any) -> Any:
    """Kubeflow's pydantic model of a JobSet, with those of everything in it."""
    sys.path.append(str(check.tools() / "models"))
    name = "kubeflow_trainer_api.models.jobset_v1alpha2_job_set"
    return import_module(name).JobsetV1alpha2JobSet


def at(resource: Resource, place: tuple[str | int, ...]) -> Any:
    found: Any = resource
    for part in place:
        found = found[part]
    return found


def child_job(jobset: Resource) -> Resource:
    """The Job that JobSet's controller makes of it."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    metadata = {
        **jobset["metadata"],
        "name": f"{jobset['metadata']['name']}-{replicated['name']}-0",
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **replicated["template"]}


def is_known(model: Any, jobset: Resource) -> bool:
    """Whether it has JobSet's fields, of their types, and no others, which the model drops."""
    try:
        return bool(model.from_dict(jobset).to_dict() == jobset)
    except ValidationError:
        return False


def built_in(resources: dict[str, Resource]) -> list[Resource]:
    others = [each for kind, each in resources.items() if kind != "JobSet"]
    return [*others, child_job(resources["JobSet"])]


def test_every_object_keeps_to_its_schema_and_to_policy(
    check: Any, model: Any, resources: dict[str, Resource]
) -> None:
    assert set(resources) == {"JobSet", "NetworkPolicy", "PersistentVolumeClaim", "ServiceAccount"}
    assert is_known(model, resources["JobSet"])
    check.check_schemas(built_in(resources))
    check.check_policy({"train": built_in(resources)})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReason"), []),
        ((*JOB, "podFailurePolicies"), {}),
        ((*CONTAINER, "arg"), []),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        ((*JOB, "completions"), "2"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else repr(value),
)
def test_what_jobset_does_not_know_is_caught(
    model: Any, resources: dict[str, Resource], place: tuple[str | int, ...], value: Any
) -> None:
    broken = copy.deepcopy(resources["JobSet"])
    at(broken, place[:-1])[place[-1]] = value
    assert not is_known(model, broken)


def test_names_and_numbers_agree(resources: dict[str, Resource]) -> None:
    jobset = resources["JobSet"]
    job, container = at(jobset, JOB), at(jobset, CONTAINER)
    pod, labels = job["template"]["spec"], job["template"]["metadata"]["labels"]
    name, (replicated,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    script = container["command"][2]
    # Pod 0, as JobSet names it in the headless Service of the set's name.
    assert f"--rdzv-endpoint {name}-{replicated['name']}-0-0.{name}:" in script
    lost, out_of_memory = (rule["action"] for rule in job["podFailurePolicy"]["rules"])
    assert lost == out_of_memory == "FailJob"
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == container["name"]
    assert pod["serviceAccountName"] == resources["ServiceAccount"]["metadata"]["name"]
    assert resources["ServiceAccount"]["automountServiceAccountToken"] is False
    claim = resources["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {"claimName": claim["metadata"]["name"]} in [
        volume.get("persistentVolumeClaim") for volume in pod["volumes"]
    ]
    policy = resources["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {"matchLabels": labels}
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    assert policy["egress"][0] == {"to": [{"podSelector": policy["podSelector"]}]}
    (shutdown_s,) = re.findall(r"--shutdown-timeout (\d+)", script)
    assert pod["terminationGracePeriodSeconds"] > int(shutdown_s)
    assert container["image"] == f"registry.example.com/cast-train:{VERSION}"
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {flag for parameter in commands["run"].params for flag in parameter.opts}
    assert {word for word in container["args"] if word.startswith("--")} <= known


def test_pods_are_restricted(resources: dict[str, Resource]) -> None:
    pod, container = at(resources["JobSet"], CONTAINER[:-2]), at(resources["JobSet"], CONTAINER)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for volume in pod["volumes"]:
        assert "persistentVolumeClaim" in volume or volume["emptyDir"]["sizeLimit"]


@pytest.mark.parametrize(
    ("message", "action"),
    [  # as Kubernetes' Job controller words them
        (
            "Pod cast-serve/train-node-0-1-x2v has condition DisruptionTarget matching FailJob "
            "rule at index 0",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "Container train for pod cast-serve/train-node-0-1-x2v failed with exit code 137 "
            "matching FailJob rule at index 1",
            "FailJobSet",
        ),
    ],
)
def test_a_lost_pod_is_replaced_and_too_little_memory_ends_the_run(
    resources: dict[str, Resource], message: str, action: str
) -> None:
    policy = resources["JobSet"]["spec"]["failurePolicy"]
    assert policy["restartStrategy"] == "BlockingRecreate"
    for rule in policy["rules"]:
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    patterns = ((rule, rule.get("onJobFailureMessagePatterns", [""])) for rule in policy["rules"])
    first = next(r for r, found in patterns if any(re.search(p, message) for p in found))
    assert first["action"] == action
    assert at(resources["JobSet"], JOB)["backoffLimit"] == 0


def test_the_number_of_pods_is_set_in_one_place(npm: str, check: Any, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "train")
    file = tmp_path / "train/jobset.yaml"
    file.write_text(file.read_text().replace("parallelism: 2 ", "parallelism: 5 "))
    (jobset,) = (each for each in check.render(tmp_path / "train") if each["kind"] == "JobSet")
    job = at(jobset, JOB)
    assert job["parallelism"] == job["completions"] == 5
    env = {each["name"]: each["value"] for each in at(jobset, CONTAINER)["env"]}
    assert env["PET_NNODES"] == "5"


def start(container: Resource, index: int, data: Path, port: int) -> psutil.Popen:
    """A pod's container as processes of this machine, on its CPU."""
    words = [*container["command"], *container["args"]]
    words = [re.sub(r"train-node-0-0\.train:\d+", f"127.0.0.1:{port}", word) for word in words]
    words = [re.sub("^/data/", f"{data}/", word) for word in words]
    env = {each["name"]: each["value"] for each in container["env"]}
    env |= {"JOB_COMPLETION_INDEX": str(index), "PET_NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (data / f"log-{index}").open("a") as log:
        return psutil.Popen(
            [*words, "--config", str(data / "settings.toml"), "--set", "steps=16"],
            env={**os.environ, **env, "PATH": path},
            stdout=log,
            stderr=log,
        )


def kill(pod: psutil.Popen) -> None:
    """As when its node is gone: without a signal that anything could handle."""
    for process in (*pod.children(recursive=True), pod):
        process.kill()
    pod.wait()


def test_a_run_goes_on_after_a_pod_is_lost(
    resources: dict[str, Resource],
    llama_dir: Path,
    text_file: Path,
    settings_file: Path,
    tmp_path: Path,
) -> None:
    container = at(resources["JobSet"], CONTAINER)
    shutil.copytree(llama_dir, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "tokens")
    shutil.copy(settings_file, tmp_path / "settings.toml")
    port, pods = free_port(), []
    try:
        pods = [start(container, index, tmp_path, port) for index in (1, 0)]
        while not list(tmp_path.glob("out.partial/checkpoint-*/complete")):
            assert all(pod.poll() is None for pod in pods), (tmp_path / "log-0").read_text()[-3000:]
            time.sleep(0.05)
        kill(pods[0])
        # JobSet: all others end before any begins.
        pods[1].terminate()
        assert pods[1].wait() != 0
        assert not (tmp_path / "out").exists()
        pods = [start(container, index, tmp_path, port) for index in (0, 1)]
        for pod in pods:
            assert pod.wait() == 0, (tmp_path / "log-0").read_text()[-3000:]
    finally:
        for pod in pods:
            if pod.is_running():
                kill(pod)
    record = verify(tmp_path / "out")  # the gated checkpoint
    assert record["num_processes"] == 2
    (first, second) = (launch["step"] for launch in record["origins"])
    assert first == 0 < second < record["steps"] == 16
