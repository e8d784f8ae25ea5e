"""Layer shapes and token counts -> sparse against dense times, interleaved on one machine.

Every repetition times the sparse op, vLLM's own dense op (oneDNN), torch's plain dense linear and,
if AMD's zentorch is installed, the op that vLLM then takes, one after the other. Each is timed over
layers that together exceed the caches. So drift of a shared machine meets all of them. A ratio is
that of the medians over the repetitions, with a bootstrap interval over them.

The sparse op multiplies 2:4 weights, or any n of 64, beside which the 2:4 op is timed then. With
int8 and int4 weights ops for dense int8 weights are timed too. The ops are those of ops_cpu.py,
which checks their outputs before anything is timed.

Read bandwidth and multiply rate of the same run give the roof: no sparse op can be faster than
reading its bytes, or than the multiplies of its kept weights. The bandwidth is the best that any
reader reached: plain streaming reads before and after the run, and the ops in it. The multiply rate
is that of a dense product of integers for int8 and int4 weights, and of bf16 otherwise.

Layers of a few megabytes are read more slowly than one large array, by whatever reads them. So a
plain read of as many layers of the same packed size takes its turn among the ops.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.kernels.ops_cpu import Linear, layers_of
from benchmarks.kernels.shapes import scale_group_of
from cast_serve import kernels
from cast_serve.intervals import Ratio, draws, ratio_of_quantiles
from cast_serve.kernels.cpu import tuning
from cast_serve.provenance import origin
from loadtest.report.directory import new_directory

CACHE_BYTES = 320 << 20  # an op's layers of one shape together; the largest L3 seen is 260 MiB
NUM_REPETITIONS = 7
MIN_TIMED_S = 0.02  # of one measurement
TABLE_WIDTH = 170  # characters


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one shape at one number of tokens, per repetition, of each op.

    weights: of shapes.WEIGHTS. The int8 ops are None for bf16, zentorch's without it.
    kept: of 64 columns; None: 2:4, and then `sparse24_ms`, of the 2:4 op beside it, too.
    read_ms: of a plain read of as many bytes as the packed weight has.
    """

    in_features: int
    out_features: int
    num_tokens: int
    sparse_ms: list[float]
    vllm_dense_ms: list[float]
    plain_dense_ms: list[float]
    read_ms: list[float]
    zentorch_ms: list[float] | None = None
    vllm_int8_ms: list[float] | None = None
    zentorch_int8_ms: list[float] | None = None
    sparse24_ms: list[float] | None = None
    weights: str = "bf16"
    kept: int | None = None

    def best_gb_s(self) -> float:
        """How fast the fastest reader of these ops read its weight, by its median."""
        packed = packed_bytes(self.weights, self.kept)
        of_each = (
            (self.sparse_ms, packed),
            (self.read_ms, packed),
            (self.sparse24_ms, packed_bytes(self.weights)),
            (self.vllm_dense_ms, 2),
            (self.plain_dense_ms, 2),
            (self.zentorch_ms, 2),
            (self.vllm_int8_ms, 1),
            (self.zentorch_int8_ms, 1),
        )
        rates = (size / statistics.median(times) for times, size in of_each if times)
        return self.in_features * self.out_features * max(rates) / 1e6

    def row(self, read_bandwidth_gb_s: float, peak_gflop_s: float) -> dict[str, Any]:
        """The result as it is printed; ratios above 1 = sparse faster.

        Args:
            read_bandwidth_gb_s: of this machine, for the roof.
            peak_gflop_s: of dense multiplies on this machine, for the roof.
        """
        num_bytes = self.in_features * self.out_features * packed_bytes(self.weights, self.kept)
        sparse_ms = statistics.median(self.sparse_ms)
        over_vllm = _ratio(self.vllm_dense_ms, self.sparse_ms)
        flops = 2 * self.in_features * self.out_features * self.num_tokens
        kept_flops = flops * (self.kept or 32) / 64
        roof_ms = max(num_bytes / read_bandwidth_gb_s, kept_flops / peak_gflop_s) / 1e6
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
            **self._over("zentorch", self.zentorch_ms),
            **self._over("vllm_int8", self.vllm_int8_ms),
            **self._over("zentorch_int8", self.zentorch_int8_ms),
            **self._over("sparse24", self.sparse24_ms),
            "gb_s": num_bytes / sparse_ms / 1e6,
            "dense_equivalent_gflop_s": flops / sparse_ms / 1e6,
            "roof_ms": roof_ms,
            "read_ms": statistics.median(self.read_ms),
        }

    def _over(self, name: str, dense_ms: list[float] | None) -> dict[str, float | None]:
        if dense_ms is None:
            return {}
        ratio = _ratio(dense_ms, self.sparse_ms)
        return {
            f"{name}_ms": statistics.median(dense_ms),
            f"ratio_{name}": ratio.value,
            f"ratio_{name}_low": ratio.low,
            f"ratio_{name}_high": ratio.high,
        }


def packed_bytes(weights: str, kept: int | None = None) -> float:
    """Per weight of the dense shape: values, a bit for its position, and with 4 bits scales.

    Args:
        weights: of shapes.WEIGHTS.
        kept: of 64 columns; None: 2:4.
    """
    group = scale_group_of(weights)
    value_bytes = 2 if weights == "bf16" else 0.5 if group else 1
    return value_bytes * (kept or 32) / 64 + 1 / 8 + (2 / group if group else 0)


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
    weights: str = "bf16",
    kept: int | None = None,
) -> dict[str, Any]:
    """Measures with torch's number of threads; keys as in `Timing.row` and `geomean_ratios`.

    Args:
        shapes: (in_features, out_features).
        tokens: rows of the activation.
        on_done: called after each shape and number of tokens.
        weights: of shapes.WEIGHTS.
        kept: of 64 columns; None: 2:4.

    Raises:
        RuntimeError: if an op's output is wrong.
        ValueError: if ``CAST_CPU_TUNING`` has no such value.
    """
    begun = origin()
    kernels.load(tune=True)
    before_gb_s, peak = read_bandwidth_gb_s(), peak_gflop_s(weights)
    timings = measure(shapes, tokens, on_done, weights, kept)
    bandwidth = max(before_gb_s, read_bandwidth_gb_s(), *(t.best_gb_s() for t in timings))
    rows = [timing.row(bandwidth, peak) for timing in timings]
    result = {
        **begun,
        "num_launches": 1,
        "weights": weights,
        "sparsity": "2:4" if kept is None else f"{kept}:64",
        "isa": kernels.isa(),
        "tuning": asdict(tuning.current()),
        "threads": torch.get_num_threads(),
        "read_bandwidth_gb_s": bandwidth,
        "peak_gflop_s": peak,
        "results": rows,
        "geomean_ratio_vllm": geomean_ratios(rows, "ratio_vllm"),
        "geomean_ratio_zentorch": geomean_ratios(rows, "ratio_zentorch"),
    }
    if weights != "bf16":
        for name in ("vllm_int8", "zentorch_int8"):
            result[f"geomean_ratio_{name}"] = geomean_ratios(rows, f"ratio_{name}")
    if kept is not None:
        result["geomean_ratio_sparse24"] = geomean_ratios(rows, "ratio_sparse24")
    return result


def table_of(result: dict[str, Any]) -> Table:
    """The result for people."""
    has_int8 = result["weights"] != "bf16"
    table = Table(
        title=f"{result['sparsity']} {result['weights']} ({result['isa']}, "
        f"{result['threads']} thread(s)) against dense bf16"
        f"{' and int8' if has_int8 else ''}; this machine reads "
        f"{result['read_bandwidth_gb_s']:.1f} GB/s and multiplies dense "
        f"{'int8' if has_int8 else 'bf16'} at "
        f"{result['peak_gflop_s']:.0f} GFLOP/s",
        caption="ratio above 1: sparse faster; in brackets, the 95 % interval; "
        "GFLOP/s as if dense; roof: the time that bytes or multiplies take at least, as a share; "
        "read: the time of a plain read of the same bytes, as a share",
    )
    headings = (
        "K x N,tokens,sparse ms,vLLM ms,torch ms,vLLM/sparse,torch/sparse,GB/s,GFLOP/s,roof,read"
    )
    for heading in headings.split(","):
        table.add_column(heading, justify="right", no_wrap=True)
    has_24 = result["sparsity"] != "2:4"
    if has_int8:
        table.add_column("vLLM int8/sparse", justify="right", no_wrap=True)
    if has_24:
        table.add_column("2:4/sparse", justify="right", no_wrap=True)
    for row in result["results"]:
        table.add_row(
            f"{row['in_features']} x {row['out_features']}",
            str(row["num_tokens"]),
            *(f"{row[key]:.3f}" for key in ("sparse_ms", "vllm_dense_ms", "plain_dense_ms")),
            _with_interval(row, "ratio_vllm"),
            f"{row['ratio_plain']:.2f}",
            f"{row['gb_s']:.1f}",
            f"{row['dense_equivalent_gflop_s']:.0f}",
            f"{row['roof_ms'] / row['sparse_ms']:.0%}",
            f"{row['read_ms'] / row['sparse_ms']:.0%}",
            *([_with_interval(row, "ratio_vllm_int8")] if has_int8 else []),
            *([_with_interval(row, "ratio_sparse24")] if has_24 else []),
        )
    return table


def _with_interval(row: dict[str, Any], key: str) -> str:
    return rf"{row[key]:.2f} \[{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"


def measure(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
    weights: str = "bf16",
    kept: int | None = None,
) -> list[Timing]:
    """Times every shape at every number of tokens with the current number of threads.

    Args:
        shapes: (in_features, out_features).
        tokens: rows of the activation.
        on_done: called after each timing.
        weights: of shapes.WEIGHTS.
        kept: of 64 columns; None: 2:4.

    Raises:
        RuntimeError: if an op's output is wrong.
    """
    timings = []
    for in_features, out_features in shapes:
        layers = layers_of(in_features, out_features, weights, CACHE_BYTES, kept)
        num_bytes = int(in_features * out_features * packed_bytes(weights, kept))
        readers = [_reader(num_bytes) for _ in layers["sparse"]]
        ops = {name: _Round(of_op) for name, of_op in (layers | {"read": readers}).items()}
        for num_tokens in tokens:
            x = torch.randn(num_tokens, in_features).bfloat16()
            for op in ops.values():
                op.warm_up(x)
            times: dict[str, list[float]] = {f"{name}_ms": [] for name in ops}
            for _ in range(NUM_REPETITIONS):
                for name, op in ops.items():
                    times[f"{name}_ms"].append(op.ms_per_call(x))
            timings.append(
                Timing(in_features, out_features, num_tokens, **times, weights=weights, kept=kept)
            )
            on_done()
    return timings


def _reader(num_bytes: int) -> Linear:
    """A layer that reads its bytes, ignores its activation and returns a sum."""
    data = torch.ones(max(1, num_bytes // 8), dtype=torch.int64)
    return lambda _: data.sum()


def read_bandwidth_gb_s() -> float:
    """Best of five streaming reads of 512 MiB with the current number of threads."""
    data = torch.ones(64 << 20, dtype=torch.int64)
    return data.nbytes / _best_s(data.sum) / 1e9


def peak_gflop_s(weights: str = "bf16") -> float:
    """Best of five dense products of 512 x 2048 x 2048 with the current number of threads.

    Args:
        weights: of shapes.WEIGHTS; but for bf16 the product is of integers, and none is quantised.
    """
    if weights != "bf16":
        x, weight = (torch.randint(-127, 128, (n, 2048), dtype=torch.int8) for n in (512, 2048))
        multiply = torch._int_mm
    else:
        x, weight = torch.randn(512, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
        multiply = torch.mm
    return 2 * 512 * 2048 * 2048 / _best_s(lambda: multiply(x, weight.t())) / 1e9


def _best_s(work: Callable[[], object]) -> float:
    """The shortest of five."""
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def write_out(out: Path, result: dict[str, Any]) -> None:
    """Writes a new directory with result.json, then report.png."""
    new_directory(out, result)
    _draw(out / "report.png", result)


def geomean_ratios(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Number of tokens -> geometric mean of a ratio over the shapes; empty if no row has it."""
    by_tokens: dict[str, list[float]] = {}
    for row in rows:
        if key in row:
            by_tokens.setdefault(str(row["num_tokens"]), []).append(row[key])
    return {tokens: statistics.geometric_mean(ratios) for tokens, ratios in by_tokens.items()}


class _Round:
    """Calls one op's layers in turn, so that each call meets a weight that has left the caches."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._all = layers
        self._layers = itertools.cycle(layers)

    def warm_up(self, x: Tensor) -> None:
        """Calls every layer once: oneDNN builds a primitive then, zentorch lays out its weight."""
        for layer in self._all:
            layer(x)

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
            ("sparse_ms", "o-", result["sparsity"]),
            ("roof_ms", ":", f"roof of {result['sparsity']}"),
            ("vllm_dense_ms", "x--", "dense bf16, vLLM"),
            ("vllm_int8_ms", "+-.", "dense int8, vLLM"),
        ):
            if key not in rows[0]:
                continue
            rates = [count / row[key] / 1e6 for count, row in zip(flops, rows, strict=True)]
            label = name if number == 0 else None
            speeds.plot(tokens, rates, style, color=f"C{number}", label=label)
    ratios.axhline(1, color="grey", linewidth=1)
    ratios.set(ylabel="vLLM's dense time / sparse time", ylim=(0, None))
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
