"""Launches of servers, with a mock in place of `cast-serve up`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.errors import LaunchError
from loadtest.record import Recorded
from loadtest.send.launches import parse_variants, served
from tests.conftest import Opened

FAKE = f"""#!{sys.executable}
import os, pathlib, sys
arguments = sys.argv[1:]
asked = pathlib.Path(__file__).with_name("asked")
with asked.open("a") as file:
    file.write(" ".join(arguments) + "\\n")
launch = str(len(asked.read_text().splitlines()))
if "--fail" in arguments or launch == os.environ.get("FAILING_LAUNCH"):
    sys.exit("no such model")
port = int(arguments[arguments.index("--port") + 1])
names = [arguments[n + 1].split("=")[0] for n, word in enumerate(arguments) if word == "--variant"]
if "--config" in arguments:
    names = ["dense", "lossless", "ngram"]
import uvicorn
from loadtest.mock_server import MockVariant, create_app
variant = MockVariant(0.01, 0.001, fail_every=int(launch == os.environ.get("SICK_LAUNCH")))
app = create_app(dict.fromkeys(names, variant))
uvicorn.run(app, port=port, log_level="warning", loop="asyncio")
"""


QUICK = ("--output-tokens", "3", "--prompt-tokens", "4")


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


def variants(model: Path) -> list[str]:
    return [word for name in ("dense", "sparse") for word in ("--variant", f"{name}={model}")]


def test_launches_swap_places_and_become_one_record(asked: Path, model: Path, guard: Path) -> None:
    out = asked.with_name("out")
    arguments = ["run", "--launches", "3", "--blocks", "2", "--num-prompts", "2", "--same-model"]
    arguments += [*QUICK, *variants(model), "--vllm-flags", "--enforce-eager"]
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


CONFIG = """
[variant.dense]
dir = "model"
cores = "0"
[variant.lossless]
dir = "model"
draft = "model"
[variant.ngram]
dir = "model"
"""


def test_two_variants_of_a_file_are_compared(asked: Path, model: Path) -> None:
    config, out = model.with_name("serve.toml"), asked.with_name("out")
    config.write_text(CONFIG)
    arguments = ["run", "--config", str(config), "--candidate", "lossless", "--launches", "2"]
    arguments += ["--blocks", "2", "--num-prompts", "2", "--vllm-flags", "--enforce-eager", *QUICK]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    lines = asked.read_text().splitlines()
    assert len(lines) == 2
    assert all(line.endswith(f"--config {config} -- --enforce-eager") for line in lines)
    recorded = Recorded.read(out)
    assert recorded.variants == ("dense", "lossless")
    assert [block.launch for block in recorded.blocks] == [0] * 4 + [1] * 4
    assert recorded.about["servers"]["lossless"] == {"dir": "model", "draft": "model"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: [Errno 2]"),
        ("[variant.dense", "cannot be read: "),
        (CONFIG, "has no [variant.sparse], but dense, lossless, ngram; name two"),
        ("", "has no [variant.dense], but none; name two"),
        ("variant = 3", "has no [variant.dense], but none; name two"),
    ],
)
def test_a_file_without_the_variants_is_refused(
    asked: Path, text: str | None, message: str
) -> None:
    config = asked.with_name("serve.toml")
    if text is not None:
        config.write_text(text)
    done = CliRunner().invoke(app, ["run", "--config", str(config)])
    assert done.exit_code == 2
    assert f"--config {config} {message}" in done.stderr
    assert not asked.exists()


def test_the_first_launch_that_is_measured_settles_the_plan(
    asked: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up of the first launch fails, so the second finds out the size of a block."""
    monkeypatch.setenv("SICK_LAUNCH", "1")
    out = asked.with_name("out")
    arguments = ["run", "--launches", "3", "--blocks", "2", "--block-s", "0.4", *QUICK]
    done = CliRunner().invoke(app, [*arguments, *variants(model), "--out", str(out)])
    assert done.exit_code == 1, done.output
    recorded = Recorded.read(out)
    assert recorded.is_complete
    assert [block.launch for block in recorded.blocks] == [1] * 4 + [2] * 4
    assert {len(block.requests) for block in recorded.blocks} == {
        recorded.about["plan"]["num_prompts"]
    }
    assert "4 warm-up requests failed" in done.stderr


def test_a_launch_that_fails_leaves_what_the_earlier_ones_measured(
    asked: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING_LAUNCH", "3")
    out = asked.with_name("out")
    arguments = ["run", "--launches", "3", "--blocks", "2", "--num-prompts", "2", *QUICK]
    arguments += ["--concurrency", "1,2", *variants(model), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    assert "launch 3: `cast-serve up` ended with 1; it printed:\nno such model" in done.stderr
    assert f"the measurements are in {out}; " in done.stderr
    for load in ("concurrency-1", "concurrency-2"):
        recorded = Recorded.read(out / load)
        assert [block.launch for block in recorded.blocks] == [0] * 4 + [1] * 4
        assert not recorded.is_complete
        report = (out / load / "report.md").read_text()
        assert "INCOMPLETE: the run was stopped: 4 of 6 block pairs" in report
    again = CliRunner().invoke(app, ["report", str(out)])
    assert again.exit_code == 3  # it was stopped
    sweep = json.loads(again.stdout.splitlines()[-1])
    assert {point["run"] for point in sweep["points"]} == {"concurrency-1", "concurrency-2"}


def test_a_server_that_does_not_start_is_told_with_its_last_lines(asked: Path, model: Path) -> None:
    server = served({"dense": model, "sparse": model}, None, 0, ["--fail"])
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

    with pytest.raises(KeyboardInterrupt), served({"dense": model}, None, 0, []):
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    assert len(opened) == 1
    opened.check_closed()
