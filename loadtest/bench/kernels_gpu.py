"""Layer shapes and token counts -> the 2:4 kernels' times on a GPU, beside cuBLAS and torch's own.

Needs torch and Triton and nothing else. Per shape and number of tokens every op is captured in a
CUDA graph that runs it once over copies of its weight, more bytes than the L2 cache holds; the
graphs are replayed in turn, so that drift meets all of them, and timed by CUDA events. The copy
bandwidth of the same run, bytes read plus written, is what no op that reads its weight can beat.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.gpu import dispatch
from cast_serve.kernels.reference import pack
from loadtest.bench.shapes import random_weight
from loadtest.report.directory import new_directory

NUM_REPETITIONS = 9
CACHES = 4  # the copies of a weight take so many times the L2 cache
COPIED_BYTES = 1 << 30
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TABLE_WIDTH = 140  # characters
Linear = Callable[[Tensor], Tensor]


def run(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures all ops that the current GPU has.

    Args:
        shapes: (in_features, out_features).
        tokens: rows of the activation.
        on_done: called after each shape and number of tokens.

    Returns:
        card, torch, copy_gb_s; results, a dict per shape and number of tokens: ms of each op, its
        range over the repetitions and its relative error against fp32 (None: NaN); crossover, an
        entry for kernels/crossover.json.

    Raises:
        RuntimeError: without a GPU, or with one below compute capability 8.0.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is here; run this on a machine with an NVIDIA GPU")
    card = dispatch.properties(torch.cuda.current_device())
    forms = [form for form in ("cusparselt", "cutlass") if _has(form)]
    copy_gb_s = _copy_gb_s()
    rows = []
    for in_features, out_features in shapes:
        weight, ops = _layers(in_features, out_features, forms, CACHES * card.L2_cache_size)
        for num_tokens in tokens:
            rows.append(_measure(weight, num_tokens, ops))
            on_done()
    return {
        "card": card.name,
        "torch": torch.__version__,
        "copy_gb_s": copy_gb_s,
        "results": rows,
        "crossover": {card.name: _crossovers(rows, [*forms, "cublas"])},
    }


def table_of(result: dict[str, Any]) -> str:
    """The result for people: microseconds, and how many times as fast as cuBLAS; ours: packed."""
    names = list(result["results"][0]["ops"])
    head = f"{'K x N':>14} {'tokens':>6} "
    head += " ".join(f"{name + ' us':>14} {'x cuBLAS':>9}" for name in names)
    lines = [
        f"{result['card']}, torch {result['torch']}, copies {result['copy_gb_s']:.0f} GB/s",
        f"{head} {'of copy':>8} {'error':>8}",
    ]
    for row in result["results"]:
        ops, packed = row["ops"], row["ops"]["packed"]
        line = f"{row['in_features']:>6} x {row['out_features']:<5} {row['num_tokens']:>6} "
        line += " ".join(
            f"{ops[name]['ms'] * 1e3:>14.1f} {ops['cublas']['ms'] / ops[name]['ms']:>9.2f}"
            for name in names
        )
        share = packed["weight_gb_s"] / result["copy_gb_s"]
        error = packed["relative_error"]
        lines.append(f"{line} {share:>8.0%} {'NaN' if error is None else f'{error:.1e}':>8}")
    return "\n".join(lines)


def write_out(out: Path, result: dict[str, Any]) -> None:
    """Writes a new directory with result.json."""
    with new_directory(out, result):
        pass


def _has(form: str) -> bool:
    try:
        dispatch.check_form(form, torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError:
        return False
    return True


def _copy_gb_s() -> float:
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    replay = _captured(lambda: target.copy_(source))
    return 2 * COPIED_BYTES / min(_ms(replay) for _ in range(NUM_REPETITIONS)) / 1e6


def _layers(
    in_features: int, out_features: int, forms: Sequence[str], num_bytes: int
) -> tuple[Tensor, dict[str, tuple[list[Linear], int]]]:
    """A random 2:4 weight, and op -> that weight many times in memory behind it, a copy's bytes."""
    packed = pack(*(part.cuda() for part in random_weight(in_features, out_features)))
    (dense,) = dispatch.second_form(packed, out_features, in_features, torch.bfloat16, "dense")

    def sparse(weight: list[Tensor]) -> Linear:
        return lambda x: dispatch.linear24(x, weight[0], out_features)

    def second(form: str) -> Callable[[list[Tensor]], Linear]:
        return lambda weight: lambda x: dispatch.product(x, weight, form)

    made = {"packed": ([packed], sparse), "cublas": ([dense], second("dense"))}
    made |= {form: (dispatch.to_form(dense, form), second(form)) for form in forms}
    ops = {}
    for name, (weight, linear) in made.items():
        size = sum(part.nbytes for part in weight)
        copies = range(max(2, math.ceil(num_bytes / size)))
        ops[name] = ([linear([part.clone() for part in weight]) for _ in copies], size)
    return dense, ops


def _measure(
    weight: Tensor, num_tokens: int, ops: dict[str, tuple[list[Linear], int]]
) -> dict[str, Any]:
    out_features, in_features = weight.shape
    x = torch.randn(num_tokens, in_features, device=weight.device).bfloat16()
    expected = x.float() @ weight.float().T
    replays = {}
    for name, (layers, _) in ops.items():
        layers[0](x)  # compiles, and makes handles, before anything is captured
        replays[name] = _captured(_all(layers, x))
    rounds = [
        {name: _ms(replay) / len(ops[name][0]) for name, replay in replays.items()}
        for _ in range(NUM_REPETITIONS + 1)
    ][1:]
    found = {}
    for name, (layers, size) in ops.items():
        times = [one[name] for one in rounds]
        error = (layers[0](x).float() - expected).norm() / expected.norm()
        found[name] = {
            "ms": statistics.median(times),
            "ms_min": min(times),
            "ms_max": max(times),
            "weight_gb_s": size / statistics.median(times) / 1e6,
            "relative_error": None if error.isnan() else float(error),
        }
    return {
        "in_features": in_features,
        "out_features": out_features,
        "num_tokens": num_tokens,
        "ops": found,
    }


def _all(layers: Sequence[Linear], x: Tensor) -> Callable[[], object]:
    return lambda: [layer(x) for layer in layers]


def _crossovers(rows: Sequence[dict[str, Any]], forms: Sequence[str]) -> dict[str, int]:
    """Form -> the fewest tokens from which on it beats the packed kernel in every row."""
    found = {}
    for form in forms:
        counts = sorted({row["num_tokens"] for row in rows})
        slower = [
            row["num_tokens"]
            for row in rows
            if row["ops"][form]["ms"] >= row["ops"]["packed"]["ms"]
        ]
        above = [count for count in counts if count > max(slower, default=0)]
        if above:
            found["dense" if form == "cublas" else form] = above[0]
    return found


def _captured(work: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph's replay; the work has run before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _ms(replay: Callable[[], None]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))
