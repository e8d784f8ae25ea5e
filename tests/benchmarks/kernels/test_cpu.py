import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.kernels import cpu, ops_cpu, shapes
from cast_serve.kernels import int4_packed_shape, packed_shape, packed_shape64
from loadtest.__main__ import app
from tests.benchmarks.conftest import LoadOf

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_row_is_medians_and_their_ratios() -> None:
    dense_and_read = ([3.0, 2.0, 8.0], [1.0, 8.0, 4.0], [1.0, 1.5, 9.0])
    row = cpu.Timing(64, 32, 2, [1.0, 2.0, 4.0], *dense_and_read).row(
        read_bandwidth_gb_s=1e-3, peak_gflop_s=1e-3
    )
    assert (row["sparse_ms"], row["vllm_dense_ms"], row["plain_dense_ms"]) == (2.0, 3.0, 4.0)
    assert row["ratio_vllm"] == 1.5
    assert row["ratio_vllm_low"] < 1.0  # as one repetition thrice would have; three tell little
    assert row["ratio_vllm_high"] > 3.0
    assert row["ratio_plain"] == 2.0
    assert "ratio_zentorch" not in row
    assert row["gb_s"] == pytest.approx(64 * 32 * 1.125 / 2e-3 / 1e9)
    assert row["dense_equivalent_gflop_s"] == pytest.approx(2 * 64 * 32 * 2 / 2e-3 / 1e9)
    # 4,096 operations on kept weights at 1e6 a second take longer than 2,304 bytes at 1e6 a second
    assert row["roof_ms"] == pytest.approx(1e3 * 64 * 32 * 2 / 1e6)
    assert row["read_ms"] == 1.5


def test_a_row_of_int8_counts_its_own_bytes_and_has_ratios_of_its_own() -> None:
    dense = ([3.0], [4.0], [5.0])  # and a plain read
    timing = cpu.Timing(64, 32, 1, [2.0], *dense, vllm_int8_ms=[1.0], weights="int8")
    row = timing.row(read_bandwidth_gb_s=1e-3, peak_gflop_s=1.0)
    assert (row["vllm_int8_ms"], row["ratio_vllm_int8"]) == (1.0, 0.5)
    assert (row["ratio_vllm_int8_low"], row["ratio_vllm_int8_high"]) == (None, None)  # of one
    assert "ratio_zentorch_int8" not in row
    assert row["gb_s"] == pytest.approx(64 * 32 * 0.625 / 2e-3 / 1e9)
    assert row["roof_ms"] == pytest.approx(1e3 * 64 * 32 * 0.625 / 1e6)
    assert timing.best_gb_s() == pytest.approx(64 * 32 * 1 / 1e-3 / 1e9)  # the dense int8 op's
    faster = cpu.Timing(64, 32, 1, [0.1], *dense, vllm_int8_ms=[1.0], weights="int8")
    assert faster.best_gb_s() == pytest.approx(64 * 32 * 0.625 / 1e-4 / 1e9)
    reader = cpu.Timing(64, 32, 1, [2.0], [3.0], [4.0], [0.01], weights="int8")
    assert reader.best_gb_s() == pytest.approx(64 * 32 * 0.625 / 1e-5 / 1e9)


@pytest.mark.parametrize("kept", [None, 32, 40])
@pytest.mark.parametrize("weights", shapes.WEIGHTS)
def test_packed_bytes_are_those_that_are_packed(weights: str, kept: int | None) -> None:
    group = shapes.scale_group_of(weights)
    dtype = torch.int8 if weights == "int8" else torch.bfloat16
    shape = int4_packed_shape(64, 512, group) if group else packed_shape(64, 512, dtype)
    if kept is not None:
        shape = packed_shape64(64, 512, kept, torch.int8 if group else dtype, group or None)
    assert cpu.packed_bytes(weights, kept) == math.prod(shape) / (64 * 512)


def test_a_picture_that_cannot_be_drawn_costs_no_result(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(cpu, "_draw", full)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["kernels", "--shapes", "tiny", "--tokens", "1", "--out", str(out)]
    )
    assert done.exit_code == 1
    assert f"--out {out} could not be written: disk full" in done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])


def test_where_a_record_is_from_is_stamped_first(tiny: None, load_of: LoadOf) -> None:
    done: list[None] = []
    check_stamp = load_of(done)
    check_stamp(cpu.run(shapes.shapes_of("tiny"), [1], lambda: done.append(None)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """--shapes tiny, timed for as short as can be."""
    monkeypatch.setenv("CAST_CPU_TUNING", "few=3")
    monkeypatch.setitem(shapes.SHAPES, "tiny", ((64, 32), (128, 64)))
    monkeypatch.setattr(cpu, "CACHE_BYTES", 1)
    monkeypatch.setattr(cpu, "MIN_TIMED_S", 0.0)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("weights", "sparsity"),
    [("bf16", "2:4"), ("int8", "2:4"), ("int4-32", "2:4"), ("int8", "5:8")],
)
def test_every_shape_and_number_of_tokens_is_measured(
    weights: str, sparsity: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--shapes", "tiny", "--tokens", "1,20", "--weights", weights, "--out", str(out)]
    done = CliRunner().invoke(app, ["kernels", *flags, "--sparsity", sparsity])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["sparsity"] == {"5:8": "40:64"}.get(sparsity, sparsity)
    assert set(result.get("geomean_ratio_sparse24", {})) == (
        {"1", "20"} if sparsity == "5:8" else set()
    )
    measured = [(row["in_features"], row["num_tokens"]) for row in result["results"]]
    assert measured == [(64, 1), (64, 20), (128, 1), (128, 20)]
    assert set(result["geomean_ratio_vllm"]) == {"1", "20"}
    assert result["read_bandwidth_gb_s"] > 0
    assert result["peak_gflop_s"] > 0
    assert all(row["read_ms"] > 0 for row in result["results"])
    assert result["machine"]["cpu"]
    assert result["weights"] == weights
    assert result["tuning"]["few"] == 3
    has_int8 = [weights != "bf16"] * 4
    assert [row.get("vllm_int8_ms", 0) > 0 for row in result["results"]] == has_int8
    keys = {"ratio_vllm_int8", "ratio_vllm_int8_low", "ratio_vllm_int8_high"}
    assert [keys <= set(row) for row in result["results"]] == has_int8
    means = result.get("geomean_ratio_vllm_int8", {})
    assert set(means) == ({"1", "20"} if weights != "bf16" else set())
    assert ("vLLM int8/sparse" in done.stdout) == (weights != "bf16")
    assert json.loads((out / "result.json").read_text()) == result
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_every_layer_is_called_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def layer(number: int) -> ops_cpu.Linear:
        def call(x: Tensor) -> Tensor:
            calls.append(number)
            return x

        return call

    layers = {name: [lambda x: x] for name in ("vllm_dense", "plain_dense")}
    layers["sparse"] = [layer(number) for number in range(5)]
    monkeypatch.setattr(cpu, "layers_of", lambda *_: layers)
    (timing,) = cpu.measure([(64, 32)], [1])
    assert len(timing.sparse_ms) == cpu.NUM_REPETITIONS
    assert calls == [number % 5 for number in range(5 + cpu.NUM_REPETITIONS)]


@pytest.mark.usefixtures("tiny")
def test_a_setting_that_is_none_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAST_CPU_TUNING", "few=x")
    done = CliRunner().invoke(app, ["kernels", "--shapes", "tiny", "--tokens", "1"])
    assert done.exit_code == 2
    assert "CAST_CPU_TUNING=few=x: 'few=x' is not understood" in done.stderr


@pytest.mark.usefixtures("tiny")
def test_a_wrong_op_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_cpu, "MAX_ERROR", -1.0)
    flags = ["--shapes", "tiny", "--tokens", "1", "--weights", "int8"]
    done = CliRunner().invoke(app, ["kernels", *flags])
    assert done.exit_code == 1
    assert "sparse is wrong at [32, 64] and 1 token(s)" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "gpt"], "choose one of smollm2-135m, llama-1b, llama-8b"),
        (["--tokens", "1,x"], "'1,x' is not a list"),
        (["--tokens", "0"], "'0' is not a list"),
        (["--device", "tpu"], "--device tpu is unknown; choose cpu or cuda"),
        (["--weights", "int4-16"], "choose one of bf16, int8, int4, int4-64, int4-32"),
        (["--weights", "int4", "--device", "cuda"], "with --device cuda; choose one of bf16, int8"),
    ],
)
def test_wrong_use(flags: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["kernels", *flags])
    assert done.exit_code == 2
    assert message in done.stderr
