"""scripts/demo: on a model of 14 linears, and with small scripts in the place of the commands."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from cast_serve.__main__ import app as cast_serve
from cast_serve.checkpoint.inspect import inspect
from cast_train.__main__ import app as cast_train
from cast_train.checkpoint.channel_order import ORDER_FILE
from tests.cast_train.conftest import llama_dir, text_file
from tests.demo_commands import COMMAND, LOAD, SAID
from tests.scripts import load_script

__all__ = ["llama_dir", "text_file"]

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 52  # of 60 for `make demo`: the others are make's, scripts/setup's and scripts/data's


@pytest.fixture
def script() -> ModuleType:
    return load_script("demo")


@pytest.fixture
def say(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the commands say, beside `SAID`; the demo runs them in a folder of its own."""
    paths = {"ROOT": tmp_path, "OUT": tmp_path / "runs/demo", "BIN": tmp_path / "bin"}
    for name, path in paths.items():
        monkeypatch.setattr(script, name, path)
    paths["BIN"].mkdir()
    for name in ("cast-train", "cast-serve", "cast-loadtest"):
        command = paths["BIN"] / name
        command.write_text(f"#!{sys.executable} -S\n{COMMAND}")
        command.chmod(0o755)

    def note(**said: Any) -> None:
        (paths["BIN"] / "said.json").write_text(json.dumps(SAID | said))

    note()
    return note


@pytest.fixture
def demo(
    script: ModuleType,
    llama_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ModuleType:
    small = {"MODEL": llama_dir, "OUT": tmp_path / "out", "EVAL_TOKENS": 1024, "TRAIN_STEPS": 1}
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    for name in ("TRAIN_TEXT", "HELDOUT_TEXT"):
        longer = tmp_path / name
        longer.write_text(text_file.read_text() * 20 + name, encoding="utf-8")
        monkeypatch.setattr(script, name, longer)
    return script


def in_process(_: object, *command: object) -> dict[str, Any]:
    """As the script's `Steps.call`, without a process for each command."""
    words = [str(word) for word in command]
    app = {"cast-train": cast_train, "cast-serve": cast_serve}[words[0]]
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, f"{words}: {done.output}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_int8_model_is_served_and_told_beside_the_bf16_one(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Path] = []

    def serve(_: object, folder: Path) -> dict[str, Any]:
        served.append(folder)
        return LOAD

    monkeypatch.setattr(demo.Steps, "call", in_process)
    monkeypatch.setattr(demo, "serve_and_compare", serve)
    demo.main([word for name in demo.ALSO for word in ("--also", name)])
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])

    (int8,) = served
    about, in_bf16 = inspect(int8), inspect(demo.OUT / "sparse")
    assert (about["quantized"], about["head"]) == ("int8", "int8")
    assert (in_bf16["quantized"], in_bf16["head"]) == (None, None)
    assert int8 == demo.OUT / "int8"  # what `make serve` serves

    assert list(result["perplexity"]) == [
        *("dense", "magnitude", "wanda", "sparsegpt"),
        *("cast", "cast_int8", "fixed", "cast_2_4"),
    ]
    steps = demo.Steps(is_verbose=False)
    bf16, eight = (
        demo.evaluate(steps, folder)["perplexity"] for folder in (demo.OUT / "sparse", int8)
    )
    assert result["perplexity"]["cast"] == pytest.approx(bf16, rel=1e-4)
    assert result["perplexity"]["cast_int8"] == pytest.approx(eight, rel=1e-6)
    assert bf16 != eight
    assert result["bits_per_weight"]["cast_int8"] == about["bits_per_weight"]
    assert result["bits_per_weight"]["cast"] == in_bf16["bits_per_weight"]
    assert (in_bf16["pattern"], in_bf16["zeros"]) == ("32:64", 0.5)
    two_four = inspect(demo.OUT / "two-of-four")
    assert (two_four["pattern"], two_four["zeros"]) == ("2:4", result["zeros"]["cast_2_4"])
    assert two_four["bits_per_weight"] == result["bits_per_weight"]["cast_2_4"]
    assert result["perplexity"]["cast_2_4"] == pytest.approx(
        demo.evaluate(steps, demo.OUT / "two-of-four")["perplexity"], rel=1e-4
    )
    records = [
        json.loads((demo.OUT / name / "cast.json").read_text())
        for name in ("gated", "fixed-gated", "two-of-four-gated")
    ]
    assert [record["method"] for record in records] == ["gates", "fixed", "gates"]
    assert [record["config"]["zeros"] for record in records] == [0.5, 0.5, 1.0]
    assert (demo.OUT / "two-of-four" / ORDER_FILE).is_file()
    fixed = demo.evaluate(steps, demo.OUT / "fixed-gated")
    assert result["perplexity"]["fixed"] == pytest.approx(fixed["perplexity_hard"], rel=1e-4)
    assert result["weight_bytes"]["sparse"] == about["linear_weight_bytes"]


def test_it_fits_a_screen_of_80_columns_and_ends_with_json(
    script: ModuleType, say: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    script.OUT.mkdir(parents=True)
    (script.OUT / "of-last-time").touch()
    script.main([])
    shown = capfd.readouterr()
    (line,) = shown.out.splitlines()
    result = json.loads(line)
    assert list(result["perplexity"]) == ["dense", "sparsegpt", "cast", "cast_int8"]
    assert {"perplexity", "bits_per_weight", "speedups", "machine", "versions"} <= set(result)
    lines = shown.err.splitlines()
    assert [text for text in lines if len(text) > 80] == []
    assert len(lines) <= MAX_LINES, shown.err
    assert "noise" not in shown.err
    assert [text[:5] for text in lines if text[2:3] == "/"] == [
        f"{number:2}/6 " for number in range(1, 7)
    ]
    assert not (script.OUT / "of-last-time").exists()
    log = (script.OUT / "demo.log").read_text()
    assert "noise cast-train oneshot" in log
    assert '"tokens_seen": 40960' in log
    assert "noise cast-serve up" in (script.OUT / "serve.log").read_text()
    row = next(text for text in lines if text.startswith(" CAST int8"))
    assert row.split() == ["CAST", "int8", "21.8", "1.00", "50%", "9.0"]
    answers = [text for text in lines if "The capital of Spain is [Madrid]" in text]
    assert len(answers) == 2 * len((*script.PROMPTS, *script.QUESTIONS))


def test_also_adds_models_to_compare_with(
    script: ModuleType, say: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    script.main(["--also", "fixed", "--also", "2:4"])
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    for start, cells in (
        ("fixed mask", ["50.1", "2.30", "50%"]),
        ("CAST 2:4", ["50.1", "2.30", "50%", "9.0", "0.0%"]),
    ):
        row = next(text for text in lines if text.strip().startswith(start))
        assert row.split() == [*start.split(), *cells]
    assert " 8/8 " in shown.err
    with pytest.raises(SystemExit, match="2"):
        script.main(["--also", "dense"])


def test_a_load_test_that_was_too_slow_loses_nothing_and_is_told(
    script: ModuleType, say: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    say(load={**LOAD, "harness": {"is_void": True, "why": "it was late"}})
    script.main([])
    shown = capfd.readouterr()
    assert "it was late" in shown.err
    assert json.loads(shown.out)["speedups"] == LOAD["speedups"]
    assert (script.OUT / "guard.toml").read_text() == "allow_void = true\n"


def test_the_recording_fits_too_and_its_figures_are_the_records(script: ModuleType) -> None:
    page = (ROOT / "docs/index.md").read_text()
    lines = page.partition("```text\n")[2].partition("\n```")[0].splitlines()
    assert 40 < len(lines) < 60  # the last line, JSON, is left out
    assert [text for text in lines if len(text) > 80] == []
    rows = [" ".join(text.split()) for text in lines]
    record = json.loads((ROOT / "benchmarks/records/demo.json").read_text())
    for name, value in record["perplexity"].items():
        start = f"{script.NAMES.get(name, name.replace('_', ' '))} {value:.1f} "
        start += f"{value / record['perplexity']['dense']:.2f} "
        assert [row for row in rows if row.startswith(start)], start
    for title, key, scale, name in (
        ("first token (TTFT), ms", "ttft_s", 1e3, "ttft_p50"),
        ("each token after it (TPOT), ms", "tpot_s", 1e3, "tpot_p50"),
        ("output tokens/s", "output_tokens_per_s", 1, "throughput"),
    ):
        dense, sparse = (scale * record[key][side] for side in ("dense", "sparse"))
        gain = record["speedups"][name]
        ends = f"{gain['low']:.2f} to {gain['high']:.2f}"
        assert f"{title} {dense:.1f} {sparse:.1f} {gain['ratio']:.2f} {ends}" in rows


@pytest.mark.parametrize(
    ("failing", "told", "log"),
    [
        ("oneshot --model", "cast-train oneshot ended with 1", "runs/demo/demo.log"),
        ("cast-loadtest run", "cast-loadtest run ended with 1", "runs/demo/demo.log"),
        ("cast-serve up", "cast-serve up ended with 1", "runs/demo/serve.log"),
    ],
)
def test_a_step_that_fails_shows_its_last_lines_and_names_the_log(
    script: ModuleType, say: Callable[..., None], failing: str, told: str, log: str
) -> None:
    say(failing=failing)
    with pytest.raises(SystemExit) as stopped:
        script.main([])
    first, *tail, last = str(stopped.value.code).splitlines()
    assert first == f"demo: {told}; its last lines:"
    assert last == f"demo: all lines: {log}"
    assert tail == [
        *(f"    noise {number}" for number in range(11, 30)),
        "    no room: " + "x" * 200,
    ]


def test_verbose_shows_what_the_commands_print(
    script: ModuleType, say: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    script.main(["--verbose"])
    shown = capfd.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["num_train_tokens"] == 40960
    for text in ("noise cast-train oneshot", "noise cast-serve up", "$ cast-loadtest run --url"):
        assert text in shown.err
    assert not list(script.OUT.glob("*.log"))
    say(failing="cast-serve up")
    with pytest.raises(SystemExit, match="demo: cast-serve up ended with 1$"):
        script.main(["--verbose"])


def test_make_serve_serves_what_the_demo_compared() -> None:
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if " up " in line)
    assert "--variant sparse=runs/demo/int8" in line
