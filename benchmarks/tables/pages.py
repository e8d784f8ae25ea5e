"""A Markdown page with marked places, and records -> the page with the tables made of them.

A marked place names a kind of table and the records that it is made of, as paths from the
repository's root:

    <!-- table: KIND RECORD... -->
    ...
    <!-- end of table -->

KIND is one of `KINDS`. So every figure of such a table is in a file that is committed with it.
"""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import benches, claims
from benchmarks.tables.records import above_first, read
from cast_serve.intervals import series_stderr
from loadtest.record import Recorded
from loadtest.report.result import result_of
from loadtest.report.words import markdown_table, speedup

ROUNDING_NATS = 2e-3  # between two machines' mean losses of one model
MARKED = re.compile(r"(<!-- table: (\w+) (.+?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def rewritten(page: str, root: Path) -> str:
    """The page with every marked table recomputed.

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


def _of_records(
    table: Callable[[Sequence[dict[str, Any]]], list[str]],
) -> Callable[[Sequence[Path]], list[str]]:
    """A table of records that are one JSON object each."""
    return lambda paths: table([read(path) for path in paths])


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
    lines = [
        [noise, *(f"{shares[n]:.1%}" if n in shares else "" for n in names)]
        for noise, shares in found.items()
    ]
    return markdown_table(["noise", *names], lines)


def _capacity(paths: Sequence[Path]) -> list[str]:
    """`python -m benchmarks.capacity --out`."""
    names = ("baseline", "candidate", "ratio")
    lines = [
        [case, *(f"{found[n]['coverage']:.1%}" for n in names), f"{found['baseline']['bias']:+.1%}"]
        for case, found in read(paths[0])["cases"].items()
    ]
    return markdown_table(["server", *names, "bias"], lines)


def _perplexities(paths: Sequence[Path]) -> list[str]:
    """`cast-train eval --reference DENSE --losses`, a line each, named by the file's stem."""
    lines = []
    for path in paths:
        found = read(path)
        cells = [
            path.stem,
            f"{found['num_tokens']:,}",
            f"{found.get('perplexity', found.get('perplexity_hard')):.2f}",
        ]
        above = found.get("nats_above_reference")
        if above is None:
            cells += ["", "", ""]
        else:
            error = series_stderr(_above_dense(path, found))
            cells += [f"{math.exp(above):.2f}", f"{above:.4f} +- {error:.4f}"]
            cells.append(f"{found['kl_nats_per_token']:.3f}")
        lines.append(cells)
    columns = ["model and text", "tokens", "perplexity", "times dense"]
    columns += ["log perplexity above dense, paired", "KL to dense"]
    return markdown_table(columns, lines)


def _above_dense(path: Path, found: dict[str, Any]) -> list[float]:
    """Each block's loss above the dense model's on the same block.

    The dense model's losses are those of dense-TEXT*.json beside the record, whose text begins
    with the same blocks. Another machine may have measured them, which moves a loss by rounding.

    Raises:
        ValueError: if there is no such record.
    """
    losses = found["losses"]
    text = Path(found["text"][0]).stem.removeprefix("heldout-")
    for dense_path in sorted(path.parent.glob(f"dense-{text}*.json")):
        dense = read(dense_path)["losses"][: len(losses)]
        above = [ours - theirs for ours, theirs in zip(losses, dense, strict=False)]
        mean = statistics.fmean(above)
        if len(above) == len(losses) and abs(mean - found["nats_above_reference"]) < ROUNDING_NATS:
            return above
    raise ValueError(f"{path} has no dense-{text}.json of the same blocks beside it")


def _exact(found: Mapping[str, Any]) -> float:
    """The perplexity of the exact model, which of a gated checkpoint stands beside the soft one."""
    return float(found["perplexity_hard" if "perplexity_hard" in found else "perplexity"])


def _paired(paths: Sequence[Path]) -> list[str]:
    """`cast-train eval --losses` of two models on one text, and again: model, other, model, ..."""
    lines = []
    for path, other in zip(paths[::2], paths[1::2], strict=True):
        ours, theirs = read(path), read(other)
        if ours["text"] != theirs["text"]:
            raise ValueError(f"{path} and {other} are of different texts")
        pairs = zip(ours["losses"], theirs["losses"], strict=True)
        above = [own - of_other for own, of_other in pairs]
        error = series_stderr(above)
        lines.append(
            [
                f"{path.stem} against {other.stem}",
                f"{ours['num_tokens']:,}",
                *(f"{_exact(found):.2f}" for found in (ours, theirs)),
                f"{math.exp(statistics.fmean(above)):.3f}",
                f"{statistics.fmean(above):+.4f} +- {error:.4f}",
            ]
        )
    columns = ["models and text", "tokens", "perplexity", "of the other", "ratio"]
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
    above = above_first(result)
    first = next(iter(above))
    lines = []
    for way, found in sorted(summary.items(), key=lambda item: item[1]["perplexity"]):
        cells = [way, f"{found['perplexity']:.3f}", "", "", "", ""]
        if way in above:
            recovered = (sparsegpt - math.log(found["perplexity"])) / (sparsegpt - dense)
            cells[1] += f" ({found['perplexity_min']:.3f} to {found['perplexity_max']:.3f})"
            cells[2:4] = f"{recovered:.0%}", f"{found['flipped_share']:.1%}"
            cells[4] = f"{found['cpu_s']:,.0f}" if "cpu_s" in found else ""
        if way in above and way != first:
            mean, error = above[way]
            cells[5] = f"{mean:+.4f} +- {error:.4f}"
        lines.append(cells)
    columns = ["way", "perplexity, mean (range of seeds)", "recovered", "mask flipped"]
    columns += ["CPU s a run", f"log perplexity above {first}, paired by seed"]
    if "cpu_s" not in summary[first]:  # as in records made before there was this figure
        for cells in (columns, *lines):
            del cells[4]
    return markdown_table(columns, lines)


def _curve(paths: Sequence[Path]) -> list[str]:
    """cast.json of runs with `evaluate_every`: perplexity on the held-out text, a line each run."""
    curves = {path.stem: read(path)["curve"] for path in paths}
    tokens = [point["tokens"] for point in next(iter(curves.values()))]
    lines = []
    for name, curve in curves.items():
        if [point["tokens"] for point in curve] != tokens:
            raise ValueError(f"{name} was measured at other numbers of tokens than the first run")
        lines.append([name, *(f"{point['perplexity']:.2f}" for point in curve)])
    (num_tokens,) = {read(path)["quality"]["num_tokens"] for path in paths}
    columns = [f"training tokens: perplexity on {num_tokens:,} tokens"]
    return markdown_table([*columns, *(f"{count:,}" for count in tokens)], lines)


def _law(paths: Sequence[Path]) -> list[str]:
    """Runs of one recipe, shortest first: nats above a dense model by training tokens, and a law.

    Paths: `cast-train eval --losses` of the dense model; then cast.json and the same of each run.
    The law is nats = a * tokens ** -b by least squares of the logarithms. In brackets: the least
    and the greatest that it gives with one run left out.

    Raises:
        ValueError: if the texts differ, or there are fewer than four runs.
    """
    dense = read(paths[0])
    tokens, nats = [], []
    for run, path in zip(paths[1::2], paths[2::2], strict=True):
        found = read(path)
        if found["text"] != dense["text"] or found["num_tokens"] != dense["num_tokens"]:
            raise ValueError(f"{path} and {paths[0]} are of different texts")
        tokens.append(int(read(run)["tokens_seen"]))
        nats.append(math.log(found["perplexity"] / dense["perplexity"]))
    if len(tokens) < 4:
        raise ValueError(f"a law is fitted to four runs or more, not {len(tokens)}")

    def fit(left_out: int | None = None) -> statistics.LinearRegression:
        points = [i for i in range(len(tokens)) if i != left_out]
        logs = ([math.log(of[i]) for i in points] for of in (tokens, nats))
        return statistics.linear_regression(*logs)

    law, others = fit(), [fit(left_out) for left_out in range(len(tokens))]
    exponents = [-other.slope for other in others]
    lines = []
    for count, measured in itertools.zip_longest([*tokens, 2 * tokens[-1], 4 * tokens[-1]], nats):
        of_law, *of_others = (
            math.exp(each.intercept + each.slope * math.log(count)) for each in (law, *others)
        )
        cells = ["", ""] if measured is None else [f"{measured:.3f}", f"{math.exp(measured):.2f}"]
        fitted = f"{of_law:.3f} ({min(of_others):.3f} to {max(of_others):.3f})"
        lines.append([f"{count:,}", *cells, fitted, f"{math.exp(of_law):.2f}"])
    above = f"nats above {paths[0].stem}, {dense['num_tokens']:,} tokens"
    columns = ["training tokens", above, "times its perplexity"]
    columns.append(
        f"by the law, tokens ** -{-law.slope:.2f} ({min(exponents):.2f} to {max(exponents):.2f})"
    )
    return markdown_table([*columns, "times by the law"], lines)


KINDS: dict[str, Callable[[Sequence[Path]], list[str]]] = {
    "runs": _runs,
    "capacity": _capacity,
    "coverage": _coverage,
    "kernels": _of_records(benches.kernels),
    "perplexities": _perplexities,
    "peers": _of_records(benches.peers),
    "paired": _paired,
    "choices": _choices,
    "study": _study,
    "curve": _curve,
    "law": _law,
    "carried": _of_records(benches.carried),
    "decode": _of_records(benches.decode),
    "tasks": _of_records(benches.tasks),
    "soak": _of_records(benches.soak),
    "fuzz": _of_records(benches.fuzz),
    "train_memory": _of_records(benches.train_memory),
    "processes": _of_records(benches.processes),
    "big_text": _of_records(benches.big_text),
    "claims": claims.table,
}
