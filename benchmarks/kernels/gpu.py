"""Layer shapes and token counts -> the 2:4 kernels' times on a GPU, beside cuBLAS and torch's own.

    python3 -m benchmarks.kernels.gpu [--weights bf16|int8] [--shapes llama-8b] [--tokens 1,2,4,...]
        [--out FILE.json]

Needs torch and Triton and nothing else, not even this package installed. The last line is JSON; its
`crossover` says from how many tokens on each form of bf16 weights beats the packed one.

Per shape and number of tokens every op is captured in a
CUDA graph that runs it once over copies of its weight, more bytes than the L2 cache holds; the
graphs are replayed in turn, so that drift meets all of them, and timed by CUDA events. The copy
bandwidth of the same run, bytes read plus written, is what no op that reads its weight can beat.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.shapes import parse_tokens, random_weight, shapes_of
from cast_serve.kernels.gpu import dispatch
from cast_serve.kernels.reference import pack, unpack
from cast_serve.provenance import origin
from cast_serve.sparsity.bitmask import decompress
from loadtest.report.directory import check_file, new_directory

NUM_REPETITIONS = 9
CACHES = 4  # the copies of a weight take so many times the L2 cache
COPIED_BYTES = 1 << 30
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PADDED_TOKENS = 16  # the 2:4 products take whole multiples of it
TABLE_WIDTH = 140  # characters
Linear = Callable[[Tensor], Tensor]
# Of one op: the layer many times, each with a weight of its own in memory, and a weight's bytes.
Layers = tuple[list[Linear], int]


def run(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
    weights: str = "bf16",
) -> dict[str, Any]:
    """Measures all ops that the current GPU has.

    Args:
        shapes: (in_features, out_features).
        tokens: rows of the activation.
        on_done: called after each shape and number of tokens.
        weights: of the packed 2:4 op, ``bf16`` or ``int8``. With int8 the other ops, cuBLAS and
            the packed bf16 op, have the same weights dequantised; no other 2:4 product.

    Returns:
        What `origin` says; card, torch, weights, copy_gb_s; results, a dict per shape and number
        of tokens: ms of each op, its range over the repetitions and its relative error against
        fp32 (None: NaN); crossover, from how many tokens on each form beats the packed kernel,
        empty with int8.

    Raises:
        RuntimeError: without a GPU, or with one below compute capability 8.0.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is here; run this on a machine with an NVIDIA GPU")
    card = dispatch.properties(torch.cuda.current_device())
    begun = origin()
    is_int8 = weights == "int8"
    forms = [form for form in ("cusparselt", "cutlass") if not is_int8 and has_form(form)]
    copy_gb_s = _copy_gb_s()
    rows = []
    for in_features, out_features in shapes:
        num_bytes = CACHES * card.L2_cache_size
        if is_int8:
            weight, ops = _int8_layers(in_features, out_features, num_bytes)
        else:
            weight, ops = _layers(in_features, out_features, forms, num_bytes)
        for num_tokens in tokens:
            rows.append(_measure(weight, num_tokens, ops))
            on_done()
    return {
        **begun,
        "num_launches": 1,
        "card": card.name,
        "torch": torch.__version__,
        "weights": weights,
        "copy_gb_s": copy_gb_s,
        "results": rows,
        "crossover": {} if is_int8 else _crossovers(rows, [*forms, "cublas"]),
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
    new_directory(out, result)


def has_form(form: str) -> bool:
    """Whether this torch and this card have a 2:4 product; CUTLASS's takes compute capability 8."""
    if form == "cusparselt":
        return bool(torch.backends.cusparselt.is_available())
    return bool(dispatch.properties(torch.cuda.current_device()).major == 8)


def product(x: Tensor, second: list[Tensor], form: str, bias: Tensor | None = None) -> Tensor:
    """x [num_tokens, in_features] times what `to_form` returned -> [num_tokens, out_features].

    Args:
        second: the weight in the form.
        form: cusparselt or cutlass; dense: cuBLAS.
        bias: [out_features], x's dtype, or None.
    """
    if form == "dense":
        return torch.nn.functional.linear(x, second[0], bias)
    num_tokens = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_tokens % PADDED_TOKENS))
    if form == "cusparselt":
        out = torch._cslt_sparse_mm(second[0], padded.t(), bias=bias, transpose_result=True)
    else:
        values, meta = second
        out = torch._sparse_semi_structured_mm(values, meta, padded.t()).t()
        out = out if bias is None else out + bias
    return out[:num_tokens].contiguous()


def to_form(weight: Tensor, form: str) -> list[Tensor]:
    """A dense 2:4 weight [out_features, in_features], bf16 or fp16, on a GPU -> torch's form of it.

    Returns:
        cusparselt: one tensor of torch's own layout; cutlass: the kept values and their metadata;
        dense: the weight itself.
    """
    if form == "cusparselt":
        return [torch._cslt_compress(weight)]
    if form == "cutlass":
        from torch.sparse import _semi_structured_conversions as conversions

        return list(conversions.sparse_semi_structured_from_dense_cutlass(weight))
    return [weight]


def _copy_gb_s() -> float:
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    replay = _captured(lambda: target.copy_(source))
    return 2 * COPIED_BYTES / min(_ms(replay) for _ in range(NUM_REPETITIONS)) / 1e6


def _layers(
    in_features: int, out_features: int, forms: Sequence[str], num_bytes: int
) -> tuple[Tensor, dict[str, Layers]]:
    """A random 2:4 weight, bf16 [out_features, in_features], and the layers of each op."""
    values, bitmask, _ = random_weight(in_features, out_features)
    packed = pack(values.cuda(), bitmask.cuda())
    values, bitmask = unpack(packed, out_features, in_features, torch.bfloat16)
    dense = decompress(values, bitmask, in_features)
    made = {"packed": ([packed], _bf16_op(out_features)), "cublas": ([dense], _second_op("dense"))}
    made |= {form: (to_form(dense, form), _second_op(form)) for form in forms}
    return dense, {name: _copies(*parts, num_bytes) for name, parts in made.items()}


def _int8_layers(
    in_features: int, out_features: int, num_bytes: int
) -> tuple[Tensor, dict[str, Layers]]:
    """As `_layers` for int8 values; the weight is fp32, dequantised."""
    parts = random_weight(in_features, out_features, "int8")
    values, bitmask, scale = (part.cuda() for part in parts if part is not None)
    dequantized = values.float() * scale[:, None]
    packed_bf16 = pack(dequantized.bfloat16(), bitmask)
    weight = decompress(dequantized, bitmask, in_features)

    def int8_op(parts: list[Tensor]) -> Linear:
        return lambda x: dispatch.linear24_int8(x, parts[0], parts[1], out_features)

    made = {
        "packed": ([pack(values, bitmask), scale], int8_op),
        "packed_bf16": ([packed_bf16], _bf16_op(out_features)),
        "cublas": ([weight.bfloat16()], _second_op("dense")),
    }
    return weight, {name: _copies(*parts, num_bytes) for name, parts in made.items()}


def _bf16_op(out_features: int) -> Callable[[list[Tensor]], Linear]:
    return lambda parts: lambda x: dispatch.linear24(x, parts[0], out_features)


def _second_op(form: str) -> Callable[[list[Tensor]], Linear]:
    return lambda parts: lambda x: product(x, parts, form)


def _copies(
    parts: list[Tensor], linear: Callable[[list[Tensor]], Linear], num_bytes: int
) -> Layers:
    """Layers of the same weight, each with a copy of it, that together exceed `num_bytes`."""
    size = sum(part.nbytes for part in parts)
    count = max(2, math.ceil(num_bytes / size))
    return [linear([part.clone() for part in parts]) for _ in range(count)], size


def _measure(weight: Tensor, num_tokens: int, ops: dict[str, Layers]) -> dict[str, Any]:
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
            found[form] = above[0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", choices=["bf16", "int8"], default="bf16")
    parser.add_argument("--shapes", default="llama-8b")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args()
    try:
        if args.out:
            check_file("--out", args.out)
        shapes, tokens = shapes_of(args.shapes), parse_tokens(args.tokens)
    except ValueError as error:
        sys.exit(f"benchmarks.kernels.gpu: {error}")
    done = iter(range(1, len(shapes) * len(tokens) + 1))

    def progress() -> None:
        print(f"\r{next(done)} of {len(shapes) * len(tokens)}", end="", file=sys.stderr)

    try:
        result = run(shapes, tokens, progress, args.weights)
    except RuntimeError as error:
        sys.exit(f"benchmarks.kernels.gpu: {error}")
    print(file=sys.stderr)
    print(table_of(result))
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
