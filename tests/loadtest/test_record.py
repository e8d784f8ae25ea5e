"""A record on disk says what the one in memory says, and broken ones are refused by line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.record import Recorded
from tests.loadtest.recordings import recorded, request, two_pairs


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    run = two_pairs()
    failed = request(0, 0, "dense", None, sent_s=1.0)
    run = recorded([request(None, None, "dense", 1.0), failed, *run.requests])
    run.write(tmp_path)
    assert Recorded.read(tmp_path) == run
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "block": 0,
        "block_pair": 0,
        "variant": "dense",
        "prompt_index": 0,
        "error": "http_503",
        "prompt_tokens": None,
        "output_tokens": None,
        "intended_send_s": 1.0,
        "sent_s": 1.0,
        "token_events_s": [],
        "last_s": None,
        "ended_s": 2.0,
        "launch": 0,
        "turn": 0,
        "asked_tokens": 3,
    }


def test_blocks_and_pairs_by_hand() -> None:
    failed = request(0, 0, "dense", None, sent_s=11.0)  # ends at 12, after the last answer
    run = recorded([request(None, None, "dense", 1.0), failed, *two_pairs().requests])
    assert [(block.variant, block.block_pair) for block in run.blocks] == [
        ("dense", 0),
        ("sparse", 0),
        ("sparse", 1),
        ("dense", 1),
    ]
    assert [(a.variant, b.variant, a.block_pair) for a, b in run.pairs] == [
        ("dense", "sparse", 0),
        ("dense", "sparse", 1),
    ]
    assert len(run.warmup) == 1
    first = run.blocks[0]
    assert (first.started_s, first.wall_s, first.output_tokens) == (0.0, 12.0, 9)
    assert (run.blocks[1].started_s, run.blocks[1].wall_s) == (100.0, 3.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 13: Expecting property name"),
        ("{}", "line 13: 'token_events_s' is missing"),
        ('{"token_events_s": [], "colour": 1}', "line 13: .*unexpected keyword argument 'colour'"),
        (None, "line 13: a request has either an error or a last_s"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str | None, message: str) -> None:
    run = two_pairs()
    run.write(tmp_path)
    if line is None:
        line = json.dumps(replace(run.requests[0], error="timeout").__dict__)
    with (tmp_path / "requests.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        Recorded.read(tmp_path)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (None, r"run.json cannot be read.*`cast-loadtest run --out`"),
        (recorded([], format_version=2), "format_version 2, but only 1 is known"),
        (recorded([]), "it holds no requests"),
        (recorded([request(0, 0, "other", 1.0)]), "variant 'other' is not one of dense, sparse"),
        (recorded([request(0, 0, "dense", 1.0)]), "block pair 0 has only one block"),
        (Recorded({"format_version": 1}, ()), "'plan' is missing"),
    ],
)
def test_other_directories_are_refused(tmp_path: Path, run: Recorded | None, message: str) -> None:
    if run is not None:
        run.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        Recorded.read(tmp_path)


def test_of_a_run_that_was_stopped_whole_pairs_are_read(tmp_path: Path) -> None:
    pairs = two_pairs()
    stopped = replace(pairs, about={**pairs.about, "is_complete": False})
    stopped.write(tmp_path)
    assert Recorded.read(tmp_path) == stopped
    lines = (tmp_path / "requests.jsonl").read_text().splitlines(keepends=True)
    for left in (lines[:-1], lines[:-3], lines[:-4], [*lines[:7], lines[7][:20]]):
        (tmp_path / "requests.jsonl").write_text("".join(left))
        found = Recorded.read(tmp_path)
        assert found.requests == pairs.requests[:6]
        assert len(found.pairs) == 1
    (tmp_path / "requests.jsonl").write_text("")
    assert Recorded.read(tmp_path).requests == ()
    pairs.write(tmp_path)  # a record that is said to be complete has no such line
    (tmp_path / "requests.jsonl").write_text("".join(lines)[:-20])
    with pytest.raises(ValueError, match="line 12"):
        Recorded.read(tmp_path)


def test_a_record_without_launches_is_of_one(tmp_path: Path) -> None:
    two_pairs().write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    without = [{key: line[key] for key in line if key != "launch"} for line in lines]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    assert {block.launch for block in Recorded.read(tmp_path).blocks} == {0}


def test_tokens_until_then_by_hand() -> None:
    # Token events at 1.0, 1.5, 2.0 and at 11.0, 11.5, 12.0; a failed request has none.
    run = recorded(
        [
            request(0, 0, "dense", 1.0, 0.5),
            request(0, 0, "dense", 1.0, 0.5, sent_s=10.0),
            request(0, 0, "dense", None, sent_s=11.0),
        ]
    )
    (block,) = run.blocks
    assert (block.arrival_s, block.wall_s) == (11.0, 12.0)
    assert block.output_tokens_until(0.5) == 0
    assert block.output_tokens_until(1.5) == 2
    assert block.output_tokens_until(11.0) == 4
    assert block.output_tokens_until(99.0) == block.output_tokens == 6
