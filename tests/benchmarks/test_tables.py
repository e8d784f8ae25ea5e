"""Tables in README, docs and benchmarks follow from records; a wrong kind or record is named."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.tables.pages import KINDS, MARKED, rewritten

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(path for folder in ("docs", "benchmarks") for path in (ROOT / folder).glob("*.md")),
]
CLAIM = """
[[claims]]
claim = "It is better"
figure = "{ratio sub/a-wiki.json dense-wiki.json} times, {value c.json:of.share .1%}"
records = ["d*.json"]
command = "`measure`"
threat = "one seed"
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marked_table_is_what_its_records_say(page: Path) -> None:
    text = page.read_text()
    assert rewritten(text, ROOT) == text


def test_every_kind_of_table_is_used_and_so_checked() -> None:
    found = [match[2] for page in PAGES for match in MARKED.finditer(page.read_text())]
    assert set(found) == set(KINDS)


def test_a_table_by_hand(tmp_path: Path) -> None:
    shares = {"p50": 0.951, "rate": 0.94}
    (tmp_path / "c.json").write_text(json.dumps({"coverage": {"independent": shares}}))
    page = "before\n<!-- table: coverage c.json -->\nold\n<!-- end of table -->\nafter\n"
    assert rewritten(page, tmp_path) == (
        "before\n<!-- table: coverage c.json -->\n| noise | p50 | rate |\n| --- | ---: | ---: |\n"
        "| independent | 95.1% | 94.0% |\n<!-- end of table -->\nafter\n"
    )
    assert rewritten(rewritten(page, tmp_path), tmp_path) == rewritten(page, tmp_path)


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


def test_wrong_marks_are_named(tmp_path: Path) -> None:
    for kind, message in (("coverages", "'coverages' is not known"), ("coverage", "c.json cannot")):
        page = f"<!-- table: {kind} c.json -->\n<!-- end of table -->\n"
        with pytest.raises(ValueError, match=message):
            rewritten(page, tmp_path)


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    (folder / "sub").mkdir(parents=True)
    for name, losses in (("sub/a-wiki", [3.0, 3.4]), ("dense-wiki", [2.9, 3.1, 9.0])):
        found = {"text": ["wiki.txt"], "losses": losses}
        (folder / f"{name}.json").write_text(json.dumps(found))
    (folder / "c.json").write_text(json.dumps({"of": {"share": 0.5}}))
    return tmp_path / "claims.toml"


def _table(claims: Path, text: str) -> str:
    claims.write_text(text)
    page = "<!-- table: claims claims.toml -->\n<!-- end of table -->\n"
    return rewritten(page, claims.parent)


def test_a_claim_by_hand(claims: Path) -> None:
    """Losses of 0.1 and 0.3 more, on the blocks that both records have."""
    line = "| It is better | 1.22 times, 50.0% |  | sub: a-wiki; dense-wiki, c, d\\* | `measure` |"
    assert f"{line} one seed |" in _table(claims, CLAIM)
    exact = CLAIM.replace("{ratio sub/a-wiki.json dense-wiki.json} times, {value", "half, {value")
    assert "| half, 50.0% |" in _table(claims, exact + 'follows_from = "the format"')
    assert "| the format | `measure` |" in _table(claims, exact + 'follows_from = "the format"')


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sub/a-wiki.json", "sub/b-wiki.json", "b-wiki.json cannot be read"),
        ("dense-wiki.json", "c.json", "c.json has no 'text'"),
        ("of.share", "of.part", "c.json has no 'of.part': 'part' is missing"),
        ("of.share", "of.share.more", "'more' is missing"),
        ("d*.json", "e*.json", r"no record is named e\*.json"),
        ("{ratio", "{rate", "function 'rate' is not one of value"),
        ('threat = "one seed"', "", "missing or unknown: threat"),
        ("threat", "thread", "missing or unknown: thread, threat"),
        (CLAIM[CLAIM.index("figure") : CLAIM.index("command")], 'figure = "1.2"\n', "follows_from"),
    ],
)
def test_a_claim_without_its_evidence_is_an_error(
    claims: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"claim 'It is better': .*{message}"):
        _table(claims, CLAIM.replace(old, new))
