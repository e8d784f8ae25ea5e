"""Launches of servers, with a mock in place of `cast-serve up`."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest import measure
from loadtest.__main__ import app
from loadtest.record import Recorded
from loadtest.send.launches import LaunchError, parse_variants, served
from loadtest.send.paired import Plan
from loadtest.send.schedule import Schedule
from loadtest.send.sweep import Load
from loadtest.send.workload import Workload
from tests.conftest import Opened
from tests.loadtest.recordings import recorded, request, two_pairs

FAKE = f"""#!{sys.executable}
import os, pathlib, sys
arguments = sys.argv[1:]
pathlib.Path(__file__).with_name("asked").open("a").write(" ".join(arguments) + "\\n")
if "--fail" in arguments:
    sys.exit("no such model")
port = arguments[arguments.index("--port") + 1]
names = [arguments[n + 1].split("=")[0] for n, word in enumerate(arguments) if word == "--variant"]
mock = [sys.executable, "-m", "loadtest.mock_server", "--port", port]
for name in names:
    mock += ["--variant", f"{{name}}=0.01,0.001"]
os.execv(sys.executable, mock)
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake writes down its arguments, a line a launch."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setattr("loadtest.send.launches.sys.executable", str(fake))
    return tmp_path / "asked"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_launches_swap_places_and_become_one_record(asked: Path, model: Path, guard: Path) -> None:
    out = asked.with_name("out")
    arguments = ["run", "--launches", "3", "--blocks", "2", "--num-prompts", "2", "--same-model"]
    arguments += ["--output-tokens", "3", "--prompt-tokens", "4", "--vllm-flags", "--enforce-eager"]
    for name in ("dense", "sparse"):
        arguments += ["--variant", f"{name}={model}"]
    done = CliRunner().invoke(app, [*arguments, "--guard", str(guard), "--out", str(out)])
    assert done.exit_code == 0, done.output
    lines = asked.read_text().splitlines()
    orders = [
        [word for word in line.split() if word.startswith(("dense=", "sparse="))] for line in lines
    ]
    assert [order[0].partition("=")[0] for order in orders] == ["dense", "sparse", "dense"]
    assert all(line.endswith("-- --enforce-eager") for line in lines)
    recorded = Recorded.read(out)
    assert [block.launch for block in recorded.blocks] == [0] * 4 + [1] * 4 + [2] * 4
    assert [block.block_pair for block, _ in recorded.pairs] == list(range(6))
    starts_s = [block.started_s for block in recorded.blocks]
    assert starts_s == sorted(starts_s)
    assert len(recorded.warmup) == 3 * 4
    result = json.loads((out / "result.json").read_text())
    assert result["num_launches"] == 3
    assert list(result["models"]["dense"]) == ["config.json"]
    assert "3 launches of the servers and 6 block pairs" in (out / "report.md").read_text()


def test_the_first_launch_that_is_measured_settles_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The warm-up of the first launch fails, so the second finds out the size of a block."""
    lost = recorded(
        [request(None, None, "dense", None)], plan={"num_warmup": 1, "num_prompts": None}
    )
    sized = two_pairs(plan={"num_warmup": 1, "num_prompts": 3})
    runs = iter([lost, sized, sized])
    planned: list[int | None] = []

    async def run(_: object, __: object, load: Load, ___: object) -> Recorded:
        planned.append(load.plan.num_prompts)
        return next(runs)

    monkeypatch.setattr(measure, "served", lambda *_: nullcontext("http://server"))
    monkeypatch.setattr(measure, "_run", run)
    job = measure.Job(
        loads=[Load(None, Plan(), Schedule())],
        workload=Workload(),
        timeout_s=1.0,
        api_key=None,
        num_processes=1,
        quality_workload=Workload(),
        num_quality_prompts=0,
        questions=[],
        url=None,
        models={"dense": Path(), "sparse": Path()},
        num_launches=3,
        vllm_flags=[],
    )
    ((_, found),) = measure.measure(job, lambda *_: {})
    assert planned == [None, None, 3]
    assert found.about["plan"]["num_prompts"] == 3
    assert {block.launch for block in found.blocks} == {1, 2}


def test_a_server_that_does_not_start_is_told_with_its_last_lines(asked: Path, model: Path) -> None:
    server = served({"dense": model, "sparse": model}, 0, ["--fail"])
    message = r"(?s)launch 1: .*ended with 1; .*no such model"
    with pytest.raises(LaunchError, match=message), server:
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dense"], "'dense' is not NAME=DIR"),
        (["dense=/absent"], "/absent holds no model"),
        (["dense=MODEL"], "--baseline and --candidate are dense, sparse"),
    ],
)
def test_wrong_variants_are_refused(model: Path, given: list[str], message: str) -> None:
    texts = [text.replace("MODEL", str(model)) for text in given]
    with pytest.raises(ValueError, match=message):
        parse_variants(texts, ("dense", "sparse"))


def test_ctrl_c_while_the_servers_end_leaves_none_behind(
    asked: Path, model: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    wait = subprocess.Popen.wait

    def interrupted(process: "subprocess.Popen[bytes]", timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), served({"dense": model}, 0, []):
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    assert len(opened) == 1
    opened.check_closed()
