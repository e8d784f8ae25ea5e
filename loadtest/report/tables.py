"""A Markdown page with marked places, and records -> the page with the tables made of them.

A marked place names a kind of table and the records that it is made of, as paths from the
repository's root:

    <!-- table: KIND RECORD... -->
    ...
    <!-- end of table -->

KIND is one of `KINDS`. So every figure of such a table is in a file that is committed beside it.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.record import Recorded
from loadtest.report.result import result_of
from loadtest.report.words import markdown_table

MARKED = re.compile(r"(<!-- table: (\w+) (.+?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def rewritten(page: str, root: Path) -> str:
    """The page with every marked table made anew.

    Args:
        page: Markdown.
        root: what the records' paths start from.

    Raises:
        ValueError: if a kind is unknown, or a record cannot be read.
    """

    def table(found: re.Match[str]) -> str:
        begin, kind, names, _, end = found.groups()
        if kind not in KINDS:
            raise ValueError(f"table {kind!r} is not known; it may be one of {', '.join(KINDS)}")
        lines = KINDS[kind]([root / name for name in names.split()])
        return begin + "\n".join(lines) + "\n" + end

    return MARKED.sub(table, page)


def read(path: Path) -> dict[str, Any]:
    """A record that is one JSON object.

    Raises:
        ValueError: if it cannot be read or is none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"record {path} cannot be read: {error}") from error


def speedup(found: Mapping[str, float | None], digits: int = 2) -> str:
    """A ratio with its interval, as everywhere in README and docs: `1.33 (1.23 to 1.41)`."""
    if found["low"] is None or found["high"] is None:
        return f"{found['ratio']:.{digits}f}"
    return f"{found['ratio']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def _runs(paths: Sequence[Path]) -> list[str]:
    """Recorded load tests, a line each: medians of both variants, ratio of medians, interval."""
    lines = []
    for path in paths:
        result = result_of(Recorded.read(path))
        speedups = result["speedups"]
        cells = [f"{path.parent.name}/{path.name}"]
        for key, name, scale, digits in (
            ("tpot_s", "tpot_p50", 1e3, 1),
            ("ttft_s", "ttft_p50", 1e3, 0),
            ("output_tokens_per_s", "throughput", 1, 0),
        ):
            sides = [result[key][result[side]] for side in ("baseline", "candidate")]
            before, after = (
                scale * (side["median"] if isinstance(side, dict) else side) for side in sides
            )
            cells.append(f"{before:.{digits}f} -> {after:.{digits}f}, {speedup(speedups[name])}")
        lines.append(cells)
    return markdown_table(["run", "TPOT, ms", "TTFT, ms", "output tokens/s"], lines)


def _coverage(paths: Sequence[Path]) -> list[str]:
    """`cast-loadtest coverage --out`."""
    found = read(paths[0])["coverage"]
    names = list(next(iter(found.values())))
    lines = [[noise, *(f"{shares[n]:.1%}" for n in names)] for noise, shares in found.items()]
    return markdown_table(["noise", *names], lines)


def _kernels(paths: Sequence[Path]) -> list[str]:
    """`cast-loadtest kernels --out`: per number of tokens, over the shapes of one model.

    Columns for vLLM's int8 op, for each op of zentorch, and for a plain read of the packed bytes
    stand where the record has them.
    """
    result = read(paths[0])
    others = {
        "vllm_int8": "vLLM's int8 op",
        "zentorch": "zentorch's op",
        "zentorch_int8": "zentorch's int8 op",
    }
    others = {name: title for name, title in others.items() if result.get(f"geomean_ratio_{name}")}
    limits = {"roof_ms": "the roof", "read_ms": "a plain read"}
    limits = {key: title for key, title in limits.items() if key in result["results"][0]}
    lines = []
    for tokens, mean in result["geomean_ratio_vllm"].items():
        rows = [row for row in result["results"] if str(row["num_tokens"]) == tokens]
        ratios = [row["ratio_vllm"] for row in rows]
        lines.append(
            [
                tokens,
                f"{mean:.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{min(row['ratio_vllm_low'] for row in rows):.2f} to "
                f"{max(row['ratio_vllm_high'] for row in rows):.2f}",
                *(
                    _mean_and_range(
                        result[f"geomean_ratio_{name}"][tokens],
                        [row[f"ratio_{name}"] for row in rows],
                    )
                    for name in others
                ),
                *(_range_of_shares(rows, key) for key in limits),
            ]
        )
    columns = ["tokens", "over vLLM's oneDNN op: geometric mean", "shapes", "their intervals"]
    columns += [f"over {title}: geometric mean (shapes)" for title in others.values()]
    columns += [f"share of {title}" for title in limits.values()]
    return markdown_table(columns, lines)


def _range_of_shares(rows: Sequence[dict[str, Any]], key: str) -> str:
    """A limit's time over the 2:4 op's."""
    shares = [row[key] / row["sparse_ms"] for row in rows]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def _mean_and_range(mean: float, ratios: Sequence[float]) -> str:
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _demo_quality(paths: Sequence[Path]) -> list[str]:
    """The last line of `make demo`: a line for each model."""
    found = read(paths[0])
    names = {
        "cast_soft": "fine-tuned under SparseGPT's mask, soft",
        "cast": "the same, hardened",
        "cast_int8": "the same in 8 bits, head too",
        "cast_fewer_zeros": "trained alike with fewer zeros",
    }
    dense = found["perplexity"]["dense"]
    flipped = dict.fromkeys(("cast_soft", "cast", "cast_int8"), found["flipped_share"])
    lines = []
    for name, value in found["perplexity"].items():
        cells = [names.get(name, name), f"{value:.1f}", f"{value / dense:.2f}"]
        for about, form in (
            (found.get("zeros", {}), ".0%"),
            (found.get("bits_per_weight", {}), ".1f"),
            (flipped, ".1%"),
        ):
            cells.append(format(about[name], form) if name in about else "")
        lines.append(cells)
    columns = ["model", f"perplexity, {found['num_eval_tokens']:,} tokens", "times dense", "zeros"]
    return markdown_table([*columns, "bits stored for a weight of the linears", "flipped"], lines)


def _demo_speed(paths: Sequence[Path]) -> list[str]:
    """The last line of `make demo`: what is served."""
    found = read(paths[0])
    lines = []
    for title, key, scale, name in (
        ("linear weights on disk, MB", "weight_bytes", 1e-6, None),
        ("TTFT, ms", "ttft_s", 1e3, "ttft_p50"),
        ("TPOT, ms", "tpot_s", 1e3, "tpot_p50"),
        ("output tokens/s", "output_tokens_per_s", 1, "throughput"),
    ):
        dense, sparse = (scale * found[key][side] for side in ("dense", "sparse"))
        gain = speedup(found["speedups"][name]) if name else f"{dense / sparse:.2f}"
        lines.append([title, f"{dense:.1f}", f"{sparse:.1f}", gain])
    sparse_name = "sparse, 8 bits" if found.get("served_as_sparse") == "cast_int8" else "sparse"
    return markdown_table(
        ["served by vLLM, one request at a time", "dense", sparse_name, "gain"], lines
    )


def _perplexities(paths: Sequence[Path]) -> list[str]:
    """`cast-train eval --reference DENSE --losses`, a line each, named by the file's stem."""
    lines = []
    for path in paths:
        found = read(path)
        above = found.get("nats_above_reference")
        lines.append(
            [
                path.stem,
                f"{found.get('perplexity', found.get('perplexity_hard')):.2f}",
                "" if above is None else f"{math.exp(above):.2f}",
                ""
                if above is None
                else f"{above:.4f} +- {found['nats_above_reference_stderr']:.4f}",
                "" if above is None else f"{found['kl_nats_per_token']:.3f}",
            ]
        )
    columns = ["model and text", "perplexity", "times dense"]
    columns += ["log perplexity above dense, paired", "KL to dense"]
    return markdown_table(columns, lines)


def _paired(paths: Sequence[Path]) -> list[str]:
    """`cast-train eval --losses` of two models on one text, and again: model, other, model, ..."""
    lines = []
    for path, other in zip(paths[::2], paths[1::2], strict=True):
        ours, theirs = read(path), read(other)
        if ours["text"] != theirs["text"]:
            raise ValueError(f"{path} and {other} are of different texts")
        pairs = zip(ours["losses"], theirs["losses"], strict=True)
        above = [own - of_other for own, of_other in pairs]
        error = statistics.stdev(above) / math.sqrt(len(above))
        lines.append(
            [
                f"{path.stem} against {other.stem}",
                *(f"{found['perplexity']:.2f}" for found in (ours, theirs)),
                f"{math.exp(statistics.fmean(above)):.3f}",
                f"{statistics.fmean(above):+.4f} +- {error:.4f}",
            ]
        )
    columns = ["models and text", "perplexity", "of the other", "ratio"]
    return markdown_table([*columns, "log perplexity above the other's, paired"], lines)


def _choices(paths: Sequence[Path]) -> list[str]:
    """`cast-train eval --reference DENSE --choices FILE... --losses`: a line each set."""
    lines = []
    for path in paths:
        for name, asked in read(path).items():
            if isinstance(asked, dict) and "acc_norm" in asked:
                lines.append(
                    [
                        name,
                        f"{asked['num_questions']:,}",
                        f"{asked['chance']:.3f}",
                        f"{asked['acc_norm_reference']:.3f}",
                        f"{asked['acc_norm']:.3f}",
                        f"{asked['acc_norm_above_reference']:+.3f} +- "
                        f"{asked['acc_norm_above_reference_stderr']:.3f}",
                    ]
                )
    columns = ["questions", "number", "chance", "acc_norm, dense", "acc_norm, sparse"]
    return markdown_table([*columns, "difference, paired by question"], lines)


def _study(paths: Sequence[Path]) -> list[str]:
    """`cast-train study`'s result.json: a line each way, best first.

    *Recovered* is the share of the gap in log perplexity that one-shot SparseGPT leaves to the
    dense model. The last column is paired by seed with the first way of the study.
    """
    result = read(paths[0])
    summary = result["summary"]
    sparsegpt, dense = (math.log(summary[way]["perplexity"]) for way in ("sparsegpt", "before"))
    logs: dict[str, dict[int, float]] = {}
    for row in result["runs"]:
        if row["seed"] is not None:
            logs.setdefault(row["way"], {})[row["seed"]] = math.log(row["perplexity"])
    first = next(iter(logs))
    lines = []
    for way, found in sorted(summary.items(), key=lambda item: item[1]["perplexity"]):
        cells = [way, f"{found['perplexity']:.3f}", "", "", ""]
        if way in logs:
            recovered = (sparsegpt - math.log(found["perplexity"])) / (sparsegpt - dense)
            cells[1] += f" ({found['perplexity_min']:.3f} to {found['perplexity_max']:.3f})"
            cells[2:4] = f"{recovered:.0%}", f"{found['flipped_share']:.1%}"
        if way in logs and way != first:
            above = [logs[way][seed] - logs[first][seed] for seed in logs[first]]
            error = statistics.stdev(above) / math.sqrt(len(above))
            cells[4] = f"{statistics.fmean(above):+.4f} +- {error:.4f}"
        lines.append(cells)
    columns = ["way", "perplexity, mean (range of seeds)", "recovered", "mask flipped"]
    return markdown_table([*columns, f"log perplexity above {first}, paired by seed"], lines)


def _curve(paths: Sequence[Path]) -> list[str]:
    """cast.json of runs with `evaluate_every`: perplexity on the held-out text, a line each run."""
    curves = {path.stem: read(path)["curve"] for path in paths}
    tokens = [point["tokens"] for point in next(iter(curves.values()))]
    lines = []
    for name, curve in curves.items():
        if [point["tokens"] for point in curve] != tokens:
            raise ValueError(f"{name} was measured at other numbers of tokens than the first run")
        lines.append([name, *(f"{point['perplexity']:.2f}" for point in curve)])
    return markdown_table(["training tokens", *(f"{count:,}" for count in tokens)], lines)


def _peers(paths: Sequence[Path]) -> list[str]:
    """`scripts/compare-peers --out`: a line a server, beside the last of our models."""
    found = read(paths[0])
    servers = found["servers"]
    ours = servers[found["compared"]]["title"]
    # Throughput and perplexity only where a run measured them.
    throughput = next((key for s in servers.values() for key in s if key.startswith("tokens_")), "")
    has_perplexity = any("perplexity" in server for server in servers.values())
    columns = ["server", "weights, MB", "TTFT, ms", "TPOT, ms"]
    columns += [f"tokens/s, {throughput.removeprefix('tokens_per_s_')} at once"] * bool(throughput)
    columns += ["perplexity"] * has_perplexity
    columns += [f"{ours} is faster: TTFT", "TPOT"] + ["tokens/s"] * bool(throughput)
    lines = []
    for name, server in servers.items():
        line = [
            server["title"],
            f"{server['weight_bytes'] / 1e6:.0f}",
            f"{server['ttft_ms']:.0f}",
            f"{server['tpot_ms']:.1f}",
        ]
        line += [f"{server[throughput]:.0f}" if throughput in server else ""] * bool(throughput)
        line += [f"{server['perplexity']:.2f}" if "perplexity" in server else ""] * has_perplexity
        ratios = ["ttft_speedup", "tpot_speedup"] + ["throughput_speedup"] * bool(throughput)
        for ratio in ratios:
            is_there = ratio in server and name != found["compared"]
            line.append(speedup(server[ratio]) if is_there else "")
        lines.append(line)
    return markdown_table(columns, lines)


def _carried(paths: Sequence[Path]) -> list[str]:
    """`scripts/measure-gateway-cpu --out`: a line a load, beside bare pass-throughs."""
    found = read(paths[0])
    ways = list(found["cpu_us_per_request"])
    lines = []

    def add(title: str, values: Mapping[str, Any], ratios: Mapping[str, Any], digits: int) -> None:
        cells = [f"{values[way]['median']:,.{digits}f}" for way in ways]
        spreads = [ratios[way] for way in ways if way in ratios]
        cells += [f"{s['median']:.2f} ({s['low']:.2f} to {s['high']:.2f})" for s in spreads]
        lines.append([title, *cells, *[""] * (2 * len(ways) - 1 - len(cells))])

    for load in found["loads"]:
        name = f"{load['streams']} stream{'s' if load['streams'] > 1 else ''}"
        rate = 1e3 * load["streams"] / load["step_ms"]
        add(
            f"{name}, {rate:,.0f} tokens/s: us a token",
            load["cpu_us_per_token"],
            load["cpu_ratio"],
            1,
        )
    add(
        "a request of two tokens: us",
        found["cpu_us_per_request"],
        found["cpu_ratio_per_request"],
        0,
    )
    flood = found["flood"]
    offered = f"{flood['streams']} streams, {flood['offered_tokens_per_s']:,.0f} tokens/s offered"
    add(f"{offered}: tokens/s", flood["tokens_per_s"], {}, 0)
    if limit := found.get("limit"):
        title = (
            f"added p99 of a token at most {limit['limit_ms']:g} ms, a step of all streams every "
        )
        title += f"{limit['step_ms']} ms: streams, tokens/s"
        cells = f"{limit['streams']}, {limit['tokens_per_s']:,.0f}"
        lines.append([title, cells, *[""] * (2 * len(ways) - 2)])
    titles = {"starlette": "Starlette + httpx"}
    names = [titles.get(way, way) for way in ways]
    over = [f"{names[0]} over {name}" for name in names[1:]]
    return markdown_table(["load", *names, *over], lines)


def _soak(paths: Sequence[Path]) -> list[str]:
    """`python -m tests.soak`: a line a run."""
    lines = []
    for found in map(read, paths):
        growth = "anonymous_bytes_per_1000_requests"
        value, error = (found[name] / 1e3 for name in (growth, f"{growth}_standard_error"))
        counts = ("num_requests", "num_faults", "num_lost", "num_wrong", "num_hung")
        cells = [f"{found[name]:,}" for name in counts]
        lines.append([found["workers"], str(found["seed"]), *cells, f"{value:.1f} +- {error:.1f}"])
    titles = ["workers", "seed", "requests", "faults", "lost", "wrong", "hung"]
    return markdown_table([*titles, "memory, kB a 1,000 requests"], lines)


KINDS: dict[str, Callable[[Sequence[Path]], list[str]]] = {
    "runs": _runs,
    "coverage": _coverage,
    "kernels": _kernels,
    "demo_quality": _demo_quality,
    "demo_speed": _demo_speed,
    "perplexities": _perplexities,
    "peers": _peers,
    "paired": _paired,
    "choices": _choices,
    "study": _study,
    "curve": _curve,
    "carried": _carried,
    "soak": _soak,
}
