"""Records of benchmarks, soaks and fuzzers -> the tables of README and docs made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.report.words import markdown_table, speedup

Record = dict[str, Any]


def kernels(records: Sequence[Record]) -> list[str]:
    """`cast-loadtest kernels --out`: per number of tokens, over the shapes of one model.

    Columns for vLLM's int8 op, for each op of zentorch, for 2:4 beside n of 64, and for a plain
    read of the packed bytes stand where the record has them.
    """
    result = records[0]
    others = {
        "vllm_int8": "vLLM's int8 op",
        "zentorch": "zentorch's op",
        "zentorch_int8": "zentorch's int8 op",
        "sparse24": "our 2:4 op",
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
    """A limit's time over the sparse op's."""
    shares = [row[key] / row["sparse_ms"] for row in rows]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def _mean_and_range(mean: float, ratios: Sequence[float]) -> str:
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def peers(records: Sequence[Record]) -> list[str]:
    """`python -m benchmarks.peers --out`: a line a server, beside the last of our models."""
    found = records[0]
    servers = found["servers"]
    ours = servers[found["compared"]]["title"]
    # Memory, throughput and perplexity only where a run measured them.
    throughput = next((key for s in servers.values() for key in s if key.startswith("tokens_")), "")
    has_perplexity = any("perplexity" in server for server in servers.values())
    has_memory = any("memory_bytes" in server for server in servers.values())
    columns = ["server", "weights, MB"] + ["memory, MB"] * has_memory + ["TTFT, ms", "TPOT, ms"]
    columns += [f"tokens/s, {throughput.removeprefix('tokens_per_s_')} at once"] * bool(throughput)
    if has_perplexity:
        num_tokens = found["plan"]["blocks"] * (found["plan"]["block_size"] - 1)
        columns.append(f"perplexity, first {num_tokens:,} tokens")
    columns += [f"{ours} is faster: TTFT", "TPOT"] + ["tokens/s"] * bool(throughput)
    lines = []
    for name, server in servers.items():
        line = [
            server["title"],
            f"{server['weight_bytes'] / 1e6:.0f}",
            *([f"{server['memory_bytes'] / 1e6:.0f}"] if has_memory else []),
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


def carried(records: Sequence[Record]) -> list[str]:
    """`python -m benchmarks.gateway.carried --out`: a line a load, beside bare pass-throughs."""
    found = records[0]
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
        title = f"added p99 of a token at most {limit['limit_ms']:g} ms, "
        title += f"a step of all streams every {limit['step_ms']} ms: streams, tokens/s"
        cells = f"{limit['streams']}, {limit['tokens_per_s']:,.0f}"
        lines.append([title, cells, *[""] * (2 * len(ways) - 2)])
    titles = {"starlette": "Starlette + httpx"}
    names = [titles.get(way, way) for way in ways]
    over = [f"{names[0]} over {name}" for name in names[1:]]
    return markdown_table(["load", *names, *over], lines)


def decode(records: Sequence[Record]) -> list[str]:
    """`python -m benchmarks.decode --out`: a line a part, a column a model; CPU ms a token.

    Older records have no idle worker.
    """
    profiles = [profile for record in records for profile in record["profiles"]]
    sums: dict[str, float] = {}
    for profile in profiles:
        for part, part_ms in profile["parts_ms"].items():
            sums[part] = sums.get(part, 0.0) + part_ms
    parts = sorted(sums, key=sums.__getitem__, reverse=True)
    titles = [f"{p['model']} {p.get('vllm_flags', '')}".rstrip() for p in profiles]
    lines = [
        [part, *(f"{profile['parts_ms'].get(part, 0.0):.1f}" for profile in profiles)]
        for part in parts
    ]
    lines.append(["time per token", *(f"{profile['tpot_ms']:.1f}" for profile in profiles)])
    for key, title in (("idle_percent", "idle"), ("canary_percent", "asked once a second")):
        if all(key in profile for profile in profiles):
            title = f"{title}, % of a core"
            lines.append([title, *(f"{profile[key]:.1f}" for profile in profiles)])
    return markdown_table(["part", *titles], lines)


def tasks(records: Sequence[Record]) -> list[str]:
    """`cast-loadtest tasks --out`: a line a variant, beside the first of its record."""
    lines = []
    for found in records:
        for name, about in found["variants"].items():
            interval = f"{about['low']:.1%} to {about['high']:.1%}"
            passed = f"{about['num_passed']} of {found['num_problems']}"
            cells = [name, passed, f"{about['pass_at_1']:.1%} ({interval})"]
            if pair := found["pairs"].get(name):
                points = {key: 100 * value for key, value in pair["difference"].items()}
                cells.append(
                    f"{points['mean']:+.1f} ({points['low']:+.1f} to {points['high']:+.1f})"
                )
                cells.append(f"{pair['p_mcnemar']:.2g}")
            else:
                cells += ["", ""]
            lines.append(cells)
    columns = ["variant", "solved", "pass@1", "points above the first, paired", "McNemar's p"]
    return markdown_table(columns, lines)


def soak(records: Sequence[Record]) -> list[str]:
    """`python -m tests.soak`: a line a run."""
    lines = []
    for found in records:
        growth = "anonymous_bytes_per_1000_requests"
        value, error = (found[name] / 1e3 for name in (growth, f"{growth}_standard_error"))
        counts = ("num_requests", "num_faults", "num_lost", "num_wrong", "num_hung")
        cells = [f"{found[name]:,}" for name in counts]
        lines.append([found["workers"], str(found["seed"]), *cells, f"{value:.1f} +- {error:.1f}"])
    titles = ["workers", "seed", "requests", "faults", "lost", "wrong", "hung"]
    return markdown_table([*titles, "memory, kB a 1,000 requests"], lines)


def fuzz(records: Sequence[Record]) -> list[str]:
    """`python -m tests.fuzz --record`: a line a target, summed over the runs."""
    sums: dict[str, list[float]] = {}
    runs = [run for found in records for run in found["runs"]]
    for target in (target for run in runs for target in run["targets"]):
        sum_of = sums.setdefault(target["target"], [0.0, 0, 0])
        sum_of[0] += target["cpu_minutes"]
        sum_of[1] += target["num_examples_at_most"]
        sum_of[2] += len(target["findings"])
    sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    lines = [
        [name, f"{minutes:.0f}", f"{num_examples:,}", str(num_findings)]
        for name, (minutes, num_examples, num_findings) in sums.items()
    ]
    return markdown_table(["target", "CPU minutes", "examples at most", "findings"], lines)


def train_memory(records: Sequence[Record]) -> list[str]:
    """`python -m benchmarks.train_memory --out`: a line a run."""
    lines = []
    for found in records:
        settings = dict(found["settings"])
        planned = max(found["planned_step_bytes"], found["planned_start_bytes"])
        cells = [found["model"], settings.pop("method"), f"{found['num_weights'] / 1e6:,.0f}"]
        cells += [f"{size / 1e9:.2f}" for size in (planned, found["peak_bytes"])]
        others = ", ".join(f"{key}={value}" for key, value in settings.items())
        lines.append([*cells, f"{found['peak_bytes'] / planned - 1:+.0%}", others])
    columns = ["model", "method", "million weights", "planned, GB", "peak, GB", "above the plan"]
    return markdown_table([*columns, "settings"], lines)


def processes(records: Sequence[Record]) -> list[str]:
    """`python -m benchmarks.processes --out`: a line a method.

    The last loss of the first way, and how far each other way's losses are from its own at most.
    """
    (found,) = records
    names = list(next(iter(found["methods"].values())))
    lines = []
    for method, ways in found["methods"].items():
        alone = ways[names[0]]["nats"]
        line = [method, f"{alone[-1]:.4f}"]
        for name in names[1:]:
            pairs = zip(ways[name]["nats"], alone, strict=True)
            line.append(f"{max(abs(ours - theirs) for ours, theirs in pairs):.6f}")
        lines.append(line)
    return markdown_table(["method", f"nats, {names[0]}", *names[1:]], lines)


def big_text(records: Sequence[Record]) -> list[str]:
    """`python -m benchmarks.big_text --out`: a line a run."""
    lines = []
    for found in records:
        samples = found["tokenize_memory"]
        own = [sample["own_bytes"] / 1e9 for sample in samples]
        cells = [f"{found['text_bytes'] / 1e9:.2f}", f"{found['num_tokens']:,}"]
        cells.append(f"{found['tokenize_s'] / 60:.0f}")
        cells.append(", ".join(f"{own[i * (len(own) - 1) // 4]:.2f}" for i in range(1, 5)))
        cells.append(f"{max(own):.2f}")
        cells.append(f"{max(sample['file_bytes'] for sample in samples) / 1e9:.2f}")
        lines.append([*cells, f"{found['wait_share']:.2%} of {len(found['step_s'])}"])
    columns = ["text, GB", "tokens", "minutes", "own memory after each quarter, GB", "at most"]
    return markdown_table([*columns, "files mapped, GB", "steps waited for data"], lines)
