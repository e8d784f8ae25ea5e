"""scripts/demo on a model of 14 linears: all but the serving, through the real commands."""

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from cast_serve.__main__ import app as cast_serve
from cast_serve.checkpoint.inspect import inspect
from cast_train.__main__ import app as cast_train
from loadtest.report.tables import rewritten
from tests.cast_train.conftest import llama_dir, text_file

__all__ = ["llama_dir", "text_file"]

ROOT = Path(__file__).resolve().parent.parent
SPEEDUP = {"ratio": 2.0, "low": 1.9, "high": 2.1}
LOAD = {
    "ttft_s": {"dense": {"median": 0.2}, "sparse": {"median": 0.1}},
    "tpot_s": {"dense": {"median": 0.03}, "sparse": {"median": 0.015}},
    "output_tokens_per_s": {"dense": 25.0, "sparse": 50.0},
    "speedups": {"ttft_p50": SPEEDUP, "tpot_p50": SPEEDUP, "throughput": SPEEDUP},
    "memory_bytes": {"dense": 2e6, "sparse": 1e6},
}


@pytest.fixture
def demo(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    loader = SourceFileLoader("demo", str(ROOT / "scripts/demo"))
    spec = importlib.util.spec_from_loader("demo", loader)
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    small = {"MODEL": llama_dir, "OUT": tmp_path / "out", "EVAL_TOKENS": 1024, "TRAIN_STEPS": 1}
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    for name in ("TRAIN_TEXT", "HELDOUT_TEXT"):
        longer = tmp_path / name
        longer.write_text(text_file.read_text() * 20, encoding="utf-8")
        monkeypatch.setattr(script, name, longer)
    return script


def in_process(title: str, *command: object) -> dict[str, Any]:
    """As the script's `call`, without a process for each command."""
    words = [str(word) for word in command]
    app = {"cast-train": cast_train, "cast-serve": cast_serve}[words[0]]
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, f"{title}: {done.output}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_int8_model_is_served_and_told_beside_the_bf16_one(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served: list[Path] = []

    def serve(folder: Path) -> dict[str, Any]:
        served.append(folder)
        return LOAD

    monkeypatch.setattr(demo, "call", in_process)
    monkeypatch.setattr(demo, "serve_and_compare", serve)
    demo.main()
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])

    (int8,) = served
    about, in_bf16 = inspect(int8), inspect(demo.OUT / "sparse")
    assert (about["quantized"], about["head"]) == ("int8", "int8")
    assert (in_bf16["quantized"], in_bf16["head"]) == (None, None)
    assert int8 == demo.OUT / "int8"  # what `make serve` serves

    assert list(result["perplexity"]) == [
        *("dense", "magnitude", "wanda", "sparsegpt"),
        *("cast_soft", "cast", "cast_int8", "cast_fewer_zeros"),
    ]
    bf16, eight = (
        demo.perplexity("", folder)["perplexity"] for folder in (demo.OUT / "sparse", int8)
    )
    assert result["perplexity"]["cast"] == pytest.approx(bf16, rel=1e-4)
    assert result["perplexity"]["cast_int8"] == pytest.approx(eight, rel=1e-6)
    assert bf16 != eight
    assert result["bits_per_weight"]["cast_int8"] == about["bits_per_weight"]
    assert result["bits_per_weight"]["cast"] == in_bf16["bits_per_weight"]
    fewer = inspect(demo.OUT / "fewer-zeros")
    assert (in_bf16["zeros"], fewer["zeros"]) == (0.5, result["zeros"]["cast_fewer_zeros"])
    assert fewer["bits_per_weight"] == result["bits_per_weight"]["cast_fewer_zeros"]
    assert result["perplexity"]["cast_fewer_zeros"] == pytest.approx(
        demo.perplexity("", demo.OUT / "fewer-zeros")["perplexity"], rel=1e-4
    )
    assert result["weight_bytes"]["sparse"] == about["linear_weight_bytes"]

    for text in ("cast int8", "sparse (int8)", "bits"):
        assert text in " ".join(shown.err.split())
    (tmp_path / "demo.json").write_text(shown.out.splitlines()[-1])
    page = "".join(
        f"<!-- table: {kind} demo.json -->\n<!-- end of table -->\n"
        for kind in ("demo_quality", "demo_speed")
    )
    tables = rewritten(page, tmp_path)
    assert "| the same in 8 bits, head too | trained alike with fewer zeros |" in tables
    assert "| dense | sparse, 8 bits | gain |" in tables


def test_make_serve_serves_what_the_demo_compared() -> None:
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if " up " in line)
    assert "--variant sparse=runs/demo/int8" in line
