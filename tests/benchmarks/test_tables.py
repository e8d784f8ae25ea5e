"""Tables in README and docs follow from their records; a wrong kind or record is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables.pages import MARKED, rewritten
from loadtest.report.words import speedup

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marked_table_is_what_its_records_say(page: Path) -> None:
    text = page.read_text()
    assert rewritten(text, ROOT) == text


def test_there_are_marked_tables() -> None:
    found = [match[2] for page in PAGES for match in MARKED.finditer(page.read_text())]
    assert {"runs", "coverage", "kernels", "demo_quality", "demo_speed"} <= set(found)


def test_a_table_by_hand(tmp_path: Path) -> None:
    shares = {"p50": 0.951, "rate": 0.94}
    (tmp_path / "c.json").write_text(json.dumps({"coverage": {"independent": shares}}))
    page = "before\n<!-- table: coverage c.json -->\nold\n<!-- end of table -->\nafter\n"
    assert rewritten(page, tmp_path) == (
        "before\n<!-- table: coverage c.json -->\n| noise | p50 | rate |\n| --- | ---: | ---: |\n"
        "| independent | 95.1% | 94.0% |\n<!-- end of table -->\nafter\n"
    )
    assert rewritten(rewritten(page, tmp_path), tmp_path) == rewritten(page, tmp_path)


@pytest.mark.parametrize("read", [{}, {"read_ms": 1.8}])
@pytest.mark.parametrize("others", [(), ("vllm_int8",), ("vllm_int8", "zentorch")])
def test_kernels_have_a_column_for_each_op_of_the_record(
    others: tuple[str, ...], read: dict[str, float], tmp_path: Path
) -> None:
    def row(ratio: float) -> dict[str, float]:
        found = {"num_tokens": 1, "sparse_ms": 2.0, "roof_ms": 1.0, "ratio_vllm": ratio} | read
        found |= {"ratio_vllm_low": ratio - 0.1, "ratio_vllm_high": ratio + 0.1}
        return found | {f"ratio_{name}": ratio / 2 for name in others}

    record: dict[str, Any] = {"weights": "int8", "results": [row(2.0), row(4.5)]}
    record |= {"geomean_ratio_vllm": {"1": 3.0}, "geomean_ratio_zentorch": {}}
    record |= {f"geomean_ratio_{name}": {"1": 1.5} for name in others}
    (tmp_path / "k.json").write_text(json.dumps(record))
    page = "<!-- table: kernels k.json -->\n<!-- end of table -->\n"
    titles = {"vllm_int8": "vLLM's int8 op", "zentorch": "zentorch's op"}
    headings = "".join(f" over {titles[name]}: geometric mean (shapes) |" for name in others)
    assert rewritten(page, tmp_path).splitlines()[1:-1] == [
        "| tokens | over vLLM's oneDNN op: geometric mean | shapes | their intervals |"
        f"{headings} share of the roof |" + " share of a plain read |" * len(read),
        "| --- | ---: | ---: | ---: |" + " ---: |" * (len(others) + 1 + len(read)),
        "| 1 | 3.00 | 2.00 to 4.50 | 1.90 to 4.60 |"
        + " 1.50 (1.00 to 2.25) |" * len(others)
        + " 50% to 50% |"
        + " 90% to 90% |" * len(read),
    ]


def test_a_study_by_hand(tmp_path: Path) -> None:
    def trained(way: str, seed: int | None, perplexity: float) -> dict[str, object]:
        return {"way": way, "seed": seed, "perplexity": perplexity}

    runs = [trained("before", None, 4.0), trained("sparsegpt", None, 4.4)]
    runs += [trained("a", 1, 4.1), trained("a", 2, 4.1), trained("b", 1, 4.2), trained("b", 2, 4.3)]
    many = {"perplexity_min": 4.0, "perplexity_max": 4.3, "flipped_share": 0.012}
    summary = {
        "before": {"perplexity": 4.0},
        "sparsegpt": {"perplexity": 4.4},
        "a": {"perplexity": 4.1, **many},
        "b": {"perplexity": 4.25, **many},
    }
    (tmp_path / "s.json").write_text(json.dumps({"runs": runs, "summary": summary}))
    page = "<!-- table: study s.json -->\n<!-- end of table -->\n"
    lines = rewritten(page, tmp_path).splitlines()[3:-1]
    assert lines == [
        "| before | 4.000 |  |  |  |",
        "| a | 4.100 (4.000 to 4.300) | 74% | 1.2% |  |",
        "| b | 4.250 (4.000 to 4.300) | 36% | 1.2% | +0.0359 +- 0.0118 |",
        "| sparsegpt | 4.400 |  |  |  |",
    ]
    summary["a"]["cpu_s"], summary["b"]["cpu_s"] = 90.4, 1200.0
    (tmp_path / "s.json").write_text(json.dumps({"runs": runs, "summary": summary}))
    lines = rewritten(page, tmp_path).splitlines()[3:-1]
    assert lines[0] == "| before | 4.000 |  |  |  |  |"
    assert lines[2] == "| b | 4.250 (4.000 to 4.300) | 36% | 1.2% | 1,200 | +0.0359 +- 0.0118 |"


def test_paired_losses_by_hand(tmp_path: Path) -> None:
    for name, losses in (("a-wiki", [3.0, 3.4]), ("b-wiki", [2.9, 3.1])):
        found = {"text": ["wiki.txt"], "perplexity": 24.5, "losses": losses, "num_tokens": 1022}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    page = "<!-- table: paired a-wiki.json b-wiki.json -->\n<!-- end of table -->\n"
    line = "| a-wiki against b-wiki | 1,022 | 24.50 | 24.50 | 1.221 | +0.2000 +- 0.1736 |"
    assert line in rewritten(page, tmp_path)
    (tmp_path / "b-wiki.json").write_text(json.dumps({"text": ["c4.txt"], "losses": []}))
    with pytest.raises(ValueError, match="are of different texts"):
        rewritten(page, tmp_path)


def test_the_demos_models_have_a_line_each(tmp_path: Path) -> None:
    demo: dict[str, Any] = {"num_eval_tokens": 16352, "flipped_share": 0.001}
    demo["perplexity"] = {"dense": 20.0, "wanda": 100.0, "fixed": 50.0, "cast": 60.0}
    demo["bits_per_weight"] = {"dense": 16.0, "fixed": 9.0}
    (tmp_path / "d.json").write_text(json.dumps(demo | {"zeros": {"fixed": 0.5, "cast": 0.5}}))
    page = "<!-- table: demo_quality d.json -->\n<!-- end of table -->\n"
    assert rewritten(page, tmp_path).splitlines()[3:-1] == [
        "| dense | 20.0 | 1.00 |  | 16.0 |  |",
        "| wanda | 100.0 | 5.00 |  |  |  |",
        "| Wanda's mask, fixed, its weights solved and trained | 50.0 | 2.50 | 50% | 9.0 |  |",
        "| the same, hardened | 60.0 | 3.00 | 50% |  | 0.1% |",
    ]


def test_perplexities_by_hand(tmp_path: Path) -> None:
    text = {"text": ["data/heldout-wiki.txt"]}
    dense = {"perplexity": 20.0, "num_tokens": 1533, "losses": [3.0, 2.9, 3.1], **text}
    gated = {"perplexity_hard": 33.0, "num_tokens": 1022, "losses": [3.4, 3.5], **text}
    gated |= {"nats_above_reference": 0.5, "kl_nats_per_token": 0.25}
    # A shorter record of the dense model has not all of the blocks.
    short = {**dense, "losses": [3.0], "num_tokens": 511}
    records = {"dense-wiki": short, "dense-wiki-all": dense, "gated-wiki": gated}

    def written() -> str:
        for name, found in records.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(found))
        names = "dense-wiki-all.json gated-wiki.json"
        return rewritten(f"<!-- table: perplexities {names} -->\n<!-- end of table -->\n", tmp_path)

    assert "| dense-wiki-all | 1,533 | 20.00 |  |  |  |" in written()
    # Above the dense model's blocks by 0.4 and 0.6.
    assert "| gated-wiki | 1,022 | 33.00 | 1.65 | 0.5000 +- 0.1736 | 0.250 |" in written()
    gated["nats_above_reference"] = 0.51  # so it was another dense model
    with pytest.raises(ValueError, match="gated-wiki.json has no dense-wiki.json of the same"):
        written()


def test_choices_by_hand(tmp_path: Path) -> None:
    asked = {"num_questions": 1500, "chance": 0.5, "acc_norm": 0.55, "acc_norm_reference": 0.6}
    asked |= {"acc_norm_above_reference": -0.05, "acc_norm_above_reference_stderr": 0.0123}
    (tmp_path / "c.json").write_text(json.dumps({"kind": "compressed", "piqa": asked}))
    page = "<!-- table: choices c.json -->\n<!-- end of table -->\n"
    assert "| piqa | 1,500 | 0.500 | 0.600 | 0.550 | -0.050 +- 0.012 |" in rewritten(page, tmp_path)


def test_curves_by_hand(tmp_path: Path) -> None:
    curves = {"a": [[2048, 30.5], [4096, 28.25]], "b": [[2048, 31.0], [4096, 29.0]]}
    for name, points in curves.items():
        curve = [{"tokens": tokens, "perplexity": value} for tokens, value in points]
        found = {"curve": curve, "quality": {"num_tokens": 8176}}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    page = "<!-- table: curve a.json b.json -->\n<!-- end of table -->\n"
    table = rewritten(page, tmp_path)
    assert "| training tokens: perplexity on 8,176 tokens | 2,048 | 4,096 |" in table
    assert "| a | 30.50 | 28.25 |\n| b | 31.00 | 29.00 |" in table
    (tmp_path / "b.json").write_text(json.dumps({"curve": []}))
    with pytest.raises(ValueError, match="b was measured at other numbers of tokens"):
        rewritten(page, tmp_path)


def test_a_law_by_hand(tmp_path: Path) -> None:
    """Runs that follow 0.4 * (tokens / 1 million) ** -0.5 exactly, then one that does not."""
    measured = {"text": ["wiki.txt"], "num_tokens": 16352}
    (tmp_path / "dense.json").write_text(json.dumps({"perplexity": 20.0, **measured}))

    def write(run: int, tokens: int, nats: float) -> None:
        (tmp_path / f"cast-{run}.json").write_text(json.dumps({"tokens_seen": tokens}))
        found = {"perplexity": 20 * math.exp(nats), **measured}
        (tmp_path / f"run-{run}.json").write_text(json.dumps(found))

    for run, (tokens, nats) in enumerate([(62500, 1.6), (250000, 0.8), (1000000, 0.4)]):
        write(run, tokens, nats)
    names = " ".join(f"cast-{run}.json run-{run}.json" for run in range(4))
    page = f"<!-- table: law dense.json {names} -->\n<!-- end of table -->\n"
    write(3, 4000000, 0.2)
    head, _, first, *_, last = rewritten(page, tmp_path).splitlines()[1:-1]
    assert "| nats above dense, 16,352 tokens | times its perplexity |" in head
    assert "by the law, tokens ** -0.50 (0.50 to 0.50)" in head
    assert first == "| 62,500 | 1.600 | 4.95 | 1.600 (1.600 to 1.600) | 4.95 |"
    assert last == "| 16,000,000 |  |  | 0.100 (0.100 to 0.100) | 1.11 |"
    write(3, 4000000, 0.3)
    head, *_, last = rewritten(page, tmp_path).splitlines()[1:-1]
    assert "(0.35 to 0.50)" in head
    assert "(0.100 to 0.172)" in last
    (tmp_path / "run-3.json").write_text(json.dumps({**measured, "text": ["c4.txt"]}))
    with pytest.raises(ValueError, match="are of different texts"):
        rewritten(page, tmp_path)
    page = page.replace(" cast-3.json run-3.json", "")
    with pytest.raises(ValueError, match="four runs or more, not 3"):
        rewritten(page, tmp_path)


def test_peers_stand_beside_the_last_of_our_models(tmp_path: Path) -> None:
    def server(title: str, weight_bytes: int, ttft_ms: float, ratio: float) -> dict[str, Any]:
        speedups = {
            "ttft_speedup": {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1},
            "tpot_speedup": {"ratio": ratio / 2, "low": None, "high": None},
        }
        about = {"title": title, "weight_bytes": weight_bytes, "ttft_ms": ttft_ms}
        return {**about, "tpot_ms": ttft_ms / 10, **speedups}

    servers: dict[str, dict[str, Any]] = {
        "dense": server("vLLM, dense", 269_060_000, 90.0, 1.125),
        "sparse": server("vLLM, sparse", 175_600_000, 80.0, 1.0),
        "q4_0:native+fa": server("llama.cpp's decode, q4_0", 91_700_000, 160.4, 2.0),
    }
    (tmp_path / "p.json").write_text(json.dumps({"compared": "sparse", "servers": servers}))
    page = "<!-- table: peers p.json -->\n<!-- end of table -->\n"
    assert rewritten(page, tmp_path).splitlines()[1:-1] == [
        "| server | weights, MB | TTFT, ms | TPOT, ms | vLLM, sparse is faster: TTFT | TPOT |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| vLLM, dense | 269 | 90 | 9.0 | 1.12 (1.02 to 1.23) | 0.56 |",
        "| vLLM, sparse | 176 | 80 | 8.0 |  |  |",
        "| llama.cpp's decode, q4_0 | 92 | 160 | 16.0 | 2.00 (1.90 to 2.10) | 1.00 |",
    ]
    servers["dense"] |= {"tokens_per_s_8": 40.4, "perplexity": 21.8}
    servers["dense"]["throughput_speedup"] = {"ratio": 1.5, "low": 1.4, "high": 1.6}
    servers["sparse"] |= {"tokens_per_s_8": 60.6, "perplexity": 30.5}
    plan = {"blocks": 16, "block_size": 512}
    record = {"compared": "sparse", "plan": plan, "servers": servers}
    (tmp_path / "p.json").write_text(json.dumps(record))
    assert rewritten(page, tmp_path).splitlines()[1:-1] == [
        "| server | weights, MB | TTFT, ms | TPOT, ms | tokens/s, 8 at once "
        "| perplexity, first 8,176 tokens "
        "| vLLM, sparse is faster: TTFT | TPOT | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| vLLM, dense | 269 | 90 | 9.0 | 40 | 21.80 | 1.12 (1.02 to 1.23) | 0.56 "
        "| 1.50 (1.40 to 1.60) |",
        "| vLLM, sparse | 176 | 80 | 8.0 | 61 | 30.50 |  |  |  |",
        "| llama.cpp's decode, q4_0 | 92 | 160 | 16.0 |  |  | 2.00 (1.90 to 2.10) | 1.00 |  |",
    ]


def test_a_profile_by_hand(tmp_path: Path) -> None:
    profile = {"model": "m", "tpot_ms": 3.04, "parts_ms": {"head": 0.5, "linears": 2.5}}
    (tmp_path / "d.json").write_text(json.dumps({"profiles": [profile]}))
    page = "<!-- table: decode d.json -->\n<!-- end of table -->\n"
    lines = ["| linears | 2.5 |", "| head | 0.5 |", "| time per token | 3.0 |"]
    assert rewritten(page, tmp_path).splitlines()[3:-1] == lines
    profile |= {"idle_percent": 0.62, "canary_percent": 1.49}
    (tmp_path / "d.json").write_text(json.dumps({"profiles": [profile]}))
    lines += ["| idle, % of a core | 0.6 |", "| asked once a second, % of a core | 1.5 |"]
    assert rewritten(page, tmp_path).splitlines()[3:-1] == lines


def test_what_a_gateway_carries_by_hand(tmp_path: Path) -> None:
    def each(gateway: float, starlette: float) -> dict[str, dict[str, float]]:
        return {"gateway": {"median": gateway}, "starlette": {"median": starlette}}

    ratio = {"starlette": {"median": 0.5, "low": 0.45, "high": 0.6}}
    record = {
        "loads": [
            {"streams": 1, "step_ms": 2, "cpu_us_per_token": each(30, 60.04), "cpu_ratio": ratio},
            {"streams": 64, "step_ms": 20, "cpu_us_per_token": each(20, 40), "cpu_ratio": ratio},
        ],
        "cpu_us_per_request": each(900.4, 1800),
        "cpu_ratio_per_request": ratio,
        "flood": {"streams": 64, "offered_tokens_per_s": 64e3, "tokens_per_s": each(2e4, 1e4)},
    }
    (tmp_path / "g.json").write_text(json.dumps(record))
    page = "<!-- table: carried g.json -->\n<!-- end of table -->\n"
    assert rewritten(page, tmp_path).splitlines()[1:-1] == [
        "| load | gateway | Starlette + httpx | gateway over Starlette + httpx |",
        "| --- | ---: | ---: | ---: |",
        "| 1 stream, 500 tokens/s: us a token | 30.0 | 60.0 | 0.50 (0.45 to 0.60) |",
        "| 64 streams, 3,200 tokens/s: us a token | 20.0 | 40.0 | 0.50 (0.45 to 0.60) |",
        "| a request of two tokens: us | 900 | 1,800 | 0.50 (0.45 to 0.60) |",
        "| 64 streams, 64,000 tokens/s offered: tokens/s | 20,000 | 10,000 |  |",
    ]
    record["limit"] = {"limit_ms": 1.0, "step_ms": 20, "streams": 32, "tokens_per_s": 1600.0}
    (tmp_path / "g.json").write_text(json.dumps(record))
    assert rewritten(page, tmp_path).splitlines()[-2] == (
        "| added p99 of a token at most 1 ms, a step of all streams every 20 ms: streams, tokens/s "
        "| 32, 1,600 |  |  |"
    )


def test_a_soak_by_hand(tmp_path: Path) -> None:
    record = {"workers": "fake", "seed": 1, "num_requests": 100143, "num_faults": 100}
    record |= {"num_lost": 0, "num_wrong": 2, "num_hung": 3}
    growth = "anonymous_bytes_per_1000_requests"
    record |= {growth: -6055.06, f"{growth}_standard_error": 2984.3}
    (tmp_path / "s.json").write_text(json.dumps(record))
    page = "<!-- table: soak s.json -->\n<!-- end of table -->\n"
    assert rewritten(page, tmp_path).splitlines()[3] == (
        "| fake | 1 | 100,143 | 100 | 0 | 2 | 3 | -6.1 +- 3.0 |"
    )


def test_the_fuzzers_cpu_minutes_by_hand(tmp_path: Path) -> None:
    def of(name: str, minutes: float, findings: list[str]) -> dict[str, object]:
        found = {"target": name, "cpu_minutes": minutes, "num_examples_at_most": 1200}
        return {**found, "findings": findings}

    for name, targets in (
        ("a", [of("sse", 2.25, []), of("bodies", 4.0, ["E at x:1", "E at y:2"])]),
        ("b", [of("sse", 4.5, [])]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"runs": [{"targets": targets}] * 2}))
    page = "<!-- table: fuzz a.json b.json -->\n<!-- end of table -->\n"
    assert rewritten(page, tmp_path).splitlines()[3:6] == [
        "| sse | 14 | 4,800 | 0 |",
        "| bodies | 8 | 2,400 | 4 |",
        "| all | 22 | 7,200 | 4 |",
    ]


def test_wrong_marks_are_named(tmp_path: Path) -> None:
    for kind, message in (("coverages", "'coverages' is not known"), ("coverage", "c.json cannot")):
        page = f"<!-- table: {kind} c.json -->\n<!-- end of table -->\n"
        with pytest.raises(ValueError, match=message):
            rewritten(page, tmp_path)


def test_a_speedup_without_interval_is_the_ratio_alone() -> None:
    assert speedup({"ratio": 1.234, "low": None, "high": None}) == "1.23"
    assert speedup({"ratio": 1.234, "low": 1.1, "high": 1.3}) == "1.23 (1.10 to 1.30)"
