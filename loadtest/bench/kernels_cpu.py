"""Layer shapes and token counts -> 2:4 against dense times, interleaved on one machine.

Every repetition times the 2:4 op, vLLM's own dense op (oneDNN), torch's plain dense linear and, if
AMD's zentorch is installed, the op that vLLM then takes, one after the other. Each is timed over
layers that together exceed the caches. So drift of a shared machine meets all of them. A ratio is
that of the medians over the repetitions, with a bootstrap interval over them.

Read bandwidth and multiply rate of the same run give the roof: no 2:4 op can be faster than reading
its bytes, or than half of the dense multiplies. The bandwidth is the best that any reader reached:
plain streaming reads before and after the run, and the dense ops in it.
"""

import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from cast_serve import kernels
from cast_serve.intervals import Ratio, draws, ratio_of_quantiles
from loadtest.bench.shapes import random_weight
from loadtest.provenance import machine, versions
from loadtest.report.directory import new_directory

CACHE_BYTES = 320 << 20  # the packed layers of one shape together; the largest L3 seen is 260 MiB
NUM_REPETITIONS = 7
MIN_TIMED_S = 0.02  # of one measurement
TABLE_WIDTH = 120  # characters

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one shape at one number of tokens, per repetition, of each op.

    zentorch_ms is None without zentorch.
    """

    in_features: int
    out_features: int
    num_tokens: int
    sparse_ms: list[float]
    vllm_dense_ms: list[float]
    plain_dense_ms: list[float]
    zentorch_ms: list[float] | None = None

    def dense_gb_s(self) -> float:
        """How fast the faster dense op read its weight, by its median."""
        of_each = (self.vllm_dense_ms, self.plain_dense_ms, self.zentorch_ms)
        dense_ms = min(statistics.median(times) for times in of_each if times)
        return 2 * self.in_features * self.out_features / dense_ms / 1e6

    def row(self, read_bandwidth_gb_s: float, peak_gflop_s: float) -> dict[str, Any]:
        """The result as it is printed; ratios above 1 = sparse faster.

        Args:
            read_bandwidth_gb_s: of this machine, for the roof.
            peak_gflop_s: of dense bf16 multiplies on this machine, for the roof.
        """
        packed_bytes = self.in_features * self.out_features * 1.125  # bf16 values and positions
        sparse_ms = statistics.median(self.sparse_ms)
        over_vllm = _ratio(self.vllm_dense_ms, self.sparse_ms)
        flops = 2 * self.in_features * self.out_features * self.num_tokens
        roof_ms = max(packed_bytes / read_bandwidth_gb_s, flops / 2 / peak_gflop_s) / 1e6
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "num_tokens": self.num_tokens,
            "sparse_ms": sparse_ms,
            "vllm_dense_ms": statistics.median(self.vllm_dense_ms),
            "plain_dense_ms": statistics.median(self.plain_dense_ms),
            "ratio_vllm": over_vllm.value,
            "ratio_vllm_low": over_vllm.low,
            "ratio_vllm_high": over_vllm.high,
            "ratio_plain": _ratio(self.plain_dense_ms, self.sparse_ms).value,
            **self._over_zentorch(),
            "gb_s": packed_bytes / sparse_ms / 1e6,
            "dense_equivalent_gflop_s": flops / sparse_ms / 1e6,
            "roof_ms": roof_ms,
        }

    def _over_zentorch(self) -> dict[str, float | None]:
        if self.zentorch_ms is None:
            return {}
        ratio = _ratio(self.zentorch_ms, self.sparse_ms)
        return {
            "zentorch_ms": statistics.median(self.zentorch_ms),
            "ratio_zentorch": ratio.value,
            "ratio_zentorch_low": ratio.low,
            "ratio_zentorch_high": ratio.high,
        }


def _ratio(dense_ms: Sequence[float], sparse_ms: Sequence[float]) -> Ratio:
    """The ratio of the medians; a repetition of both is one unit."""
    return ratio_of_quantiles(
        [np.array([ms]) for ms in dense_ms],
        [np.array([ms]) for ms in sparse_ms],
        draws(len(sparse_ms)),
        0.5,
    )


def run(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures with torch's number of threads; keys as in `Timing.row` and `geomean_ratios`.

    Args:
        shapes: (in_features, out_features).
        tokens: rows of the activation.
        on_done: called after each shape and number of tokens.
    """
    before_gb_s, peak = read_bandwidth_gb_s(), peak_gflop_s()
    timings = measure(shapes, tokens, on_done)
    bandwidth = max(before_gb_s, read_bandwidth_gb_s(), *(t.dense_gb_s() for t in timings))
    rows = [timing.row(bandwidth, peak) for timing in timings]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "isa": kernels.isa(),
        "threads": torch.get_num_threads(),
        "read_bandwidth_gb_s": bandwidth,
        "peak_gflop_s": peak,
        "results": rows,
        "geomean_ratio_vllm": geomean_ratios(rows, "ratio_vllm"),
        "geomean_ratio_zentorch": geomean_ratios(rows, "ratio_zentorch"),
    }


def table_of(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table(
        title=f"2:4 ({result['isa']}, {result['threads']} thread(s)) against dense bf16; this "
        f"machine reads {result['read_bandwidth_gb_s']:.1f} GB/s and multiplies dense bf16 at "
        f"{result['peak_gflop_s']:.0f} GFLOP/s",
        caption="ratio above 1: sparse faster; in brackets, the 95 % interval; "
        "GFLOP/s as if dense; roof: the time that bytes or multiplies take at least, as a share",
    )
    headings = "K x N,tokens,sparse ms,vLLM ms,torch ms,vLLM/sparse,torch/sparse,GB/s,GFLOP/s,roof"
    for heading in headings.split(","):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["results"]:
        spread = f"[{row['ratio_vllm_low']:.2f}, {row['ratio_vllm_high']:.2f}]"
        table.add_row(
            f"{row['in_features']} x {row['out_features']}",
            str(row["num_tokens"]),
            *(f"{row[key]:.3f}" for key in ("sparse_ms", "vllm_dense_ms", "plain_dense_ms")),
            f"{row['ratio_vllm']:.2f} {spread}".replace("[", r"\["),
            f"{row['ratio_plain']:.2f}",
            f"{row['gb_s']:.1f}",
            f"{row['dense_equivalent_gflop_s']:.0f}",
            f"{row['roof_ms'] / row['sparse_ms']:.0%}",
        )
    return table


def measure(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Times every shape at every number of tokens with the current number of threads.

    Args:
        shapes: (in_features, out_features).
        tokens: rows of the activation.
        on_done: called after each timing.
    """
    timings = []
    for in_features, out_features in shapes:
        ops = [_Round(layers) for layers in _layers(in_features, out_features)]
        for num_tokens in tokens:
            x = torch.randn(num_tokens, in_features).bfloat16()
            for op in ops:
                op.ms_per_call(x)  # warm-up: oneDNN builds its primitives
            rounds = [[op.ms_per_call(x) for op in ops] for _ in range(NUM_REPETITIONS)]
            of_each = (list(times) for times in zip(*rounds, strict=True))
            timings.append(Timing(in_features, out_features, num_tokens, *of_each))
            on_done()
    return timings


def read_bandwidth_gb_s() -> float:
    """Best of five streaming reads of 512 MiB with the current number of threads."""
    data = torch.ones(64 << 20, dtype=torch.int64)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best / 1e9


def peak_gflop_s() -> float:
    """Best of five dense bf16 products of 512 x 2048 x 2048 with the current number of threads."""
    x, weight = torch.randn(512, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2 * 512 * 2048 * 2048 / best / 1e9


def write_out(out: Path, result: dict[str, Any]) -> None:
    """Writes result.json and report.png, both or none."""
    with new_directory(out, result) as partial:
        _draw(partial / "report.png", result)


def geomean_ratios(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Number of tokens -> geometric mean of a ratio over the shapes; empty if no row has it."""
    by_tokens: dict[str, list[float]] = {}
    for row in rows:
        if key in row:
            by_tokens.setdefault(str(row["num_tokens"]), []).append(row[key])
    return {tokens: statistics.geometric_mean(ratios) for tokens, ratios in by_tokens.items()}


def _layers(in_features: int, out_features: int) -> list[list[Linear]]:
    """Random weights many times over in memory, behind each of the ops."""
    import vllm.platforms  # noqa: F401, loads vLLM's CPU extension
    from vllm import _custom_ops as vllm_ops

    kernels.load()
    packed = kernels.pack(*random_weight(in_features, out_features))
    dense = torch.randn(out_features, in_features).bfloat16()

    def sparse(copy: Tensor) -> Linear:
        return lambda x: torch.ops.cast.linear24(x, copy, out_features)

    def vllm_dense(copy: Tensor) -> Linear:
        handler = vllm_ops.create_onednn_mm(copy.t(), 32)
        return lambda x: vllm_ops.onednn_mm(handler, x, None)

    def plain_dense(copy: Tensor) -> Linear:
        return lambda x: torch.nn.functional.linear(x, copy)

    def zentorch_dense(copy: Tensor) -> Linear:
        prepacked = torch.ops.zentorch.zentorch_weight_prepack_for_linear(copy)
        multiply = torch.ops.zentorch.zentorch_linear_unary
        return lambda x: multiply(x, prepacked, None, is_weight_prepacked=True)

    copies = range(max(2, math.ceil(CACHE_BYTES / packed.nbytes)))
    layers = [
        [sparse(packed.clone()) for _ in copies],
        [vllm_dense(dense.clone()) for _ in copies],
        [plain_dense(dense.clone()) for _ in copies],
    ]
    if importlib.util.find_spec("zentorch") is not None:
        import zentorch  # noqa: F401, registers its ops

        layers.append([zentorch_dense(dense.clone()) for _ in copies])
    return layers


class _Round:
    """Calls one op's layers in turn, so that each call meets a weight that has left the caches."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = itertools.cycle(layers)

    def ms_per_call(self, x: Tensor) -> float:
        num_calls = 0
        began = time.perf_counter()
        while (elapsed_s := time.perf_counter() - began) < MIN_TIMED_S or not num_calls:
            next(self._layers)(x)
            num_calls += 1
        return elapsed_s / num_calls * 1e3


def _draw(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # an optional extra, needed for --out only

    by_shape: dict[str, list[dict[str, Any]]] = {}
    for row in result["results"]:
        by_shape.setdefault(f"{row['in_features']} x {row['out_features']}", []).append(row)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    ratios, speeds = figure.subplots(1, 2)
    for number, (shape, rows) in enumerate(by_shape.items()):
        tokens = [row["num_tokens"] for row in rows]
        low = [row["ratio_vllm"] - row["ratio_vllm_low"] for row in rows]
        high = [row["ratio_vllm_high"] - row["ratio_vllm"] for row in rows]
        ratios.errorbar(
            tokens,
            [row["ratio_vllm"] for row in rows],
            [low, high],
            marker="o",
            capsize=3,
            label=shape,
        )
        flops = [2 * row["in_features"] * row["out_features"] * row["num_tokens"] for row in rows]
        for key, style, name in (
            ("sparse_ms", "o-", "2:4"),
            ("roof_ms", ":", "roof of 2:4"),
            ("vllm_dense_ms", "x--", "dense, vLLM"),
        ):
            rates = [count / row[key] / 1e6 for count, row in zip(flops, rows, strict=True)]
            label = name if number == 0 else None
            speeds.plot(tokens, rates, style, color=f"C{number}", label=label)
    ratios.axhline(1, color="grey", linewidth=1)
    ratios.set(ylabel="vLLM's dense time / 2:4 time", ylim=(0, None))
    speeds.set(ylabel="GFLOP/s as if dense", yscale="log")
    for axes in (ratios, speeds):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.legend()
    figure.suptitle(
        f"{result['isa']}, {result['threads']} thread(s): in_features x out_features, ratio "
        "of medians and 95 % interval over interleaved repetitions"
    )
    figure.savefig(path, dpi=120)
