"""Prompts: reproducible, never shared, and bad input refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.send.distribution import Distribution
from loadtest.send.trace import Arrival
from loadtest.send.workload import Prompt, Ready, Workload, read_prompts, read_words

CHAT = Ready([{"role": "system", "content": "d"}, {"role": "user", "content": "e"}], 3)


def test_same_seed_same_words_but_a_new_opening_every_run() -> None:
    first, second = (Workload(Distribution("20"), seed=3) for _ in range(2))
    opening, words = str(first.prompt(5)).split("\n")
    other_opening, other_words = str(second.prompt(5)).split("\n")
    assert words == other_words
    assert opening != other_opening
    assert len(words.split()) == 20
    known = [Workload(seed=seed, run_number=7).prompt(2) for seed in (1, 1, 2)]
    assert known[0] == known[1] != known[2]
    assert str(known[0]).startswith("000000007 0000 000002\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt_words": Distribution("1-3"), "text": ("a", "b")},
            "has 2 words, fewer than one prompt of 3",
        ),
        ({"text": ("a",), "prompts": (Ready("b"),)}, "both a text and ready prompts"),
        ({"output_tokens": None}, "--output-tokens own needs --prompts FILE"),
        (
            {"output_tokens": None, "prompts": (Ready("a", 2), Ready("b"))},
            "--output-tokens own needs --prompts FILE",
        ),
        ({"prompts": (CHAT,), "turns": Distribution("1-2")}, "--turns needs prompts that are"),
        ({"prompts": (CHAT,), "prefix_words": 3}, "--shared-prefix needs prompts that are texts"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**fields)


def test_prompts_differ_from_their_opening_on() -> None:
    workload = Workload(run_number=7)
    prompts = [str(workload.prompt(index, pass_)) for index in range(50) for pass_ in (1, 2)]
    openings = {prompt.split("\n")[0] for prompt in prompts}
    assert len(openings) == 100
    assert {len(opening) for opening in openings} == {21}
    assert len({prompt.split("\n")[1] for prompt in prompts}) == 50


def test_text_is_cut_into_runs_of_its_words() -> None:
    text = tuple(str(number) for number in range(100))
    words = str(Workload(Distribution("10"), text=text).prompt(0)).split("\n")[1].split()
    start = int(words[0])
    assert words == [str(number) for number in range(start, start + 10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (b" \n", "holds no words"),
        (None, "cannot be read"),
    ],
)
def test_unusable_text_files_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_words(tmp_path / "text")


READY = (Ready("a b", 7), Ready("c", 5), CHAT)


def test_ready_prompts_come_in_a_seeded_order_and_again() -> None:
    workload = Workload(prompts=READY, run_number=7, seed=1)
    prompts = [workload.prompt(index, 3) for index in range(6)]
    assert prompts == [Workload(prompts=READY, run_number=7, seed=1).prompt(n, 3) for n in range(6)]
    texts = [p if isinstance(p, str) else p[0]["content"] for p in prompts]
    assert all(text.startswith(f"000000007 0003 {n:06d}\n") for n, text in enumerate(texts))
    said = [text.split("\n")[1] for text in texts]
    assert [len(prompt) for prompt in prompts if isinstance(prompt, list)] == [2, 2]
    assert READY[2].prompt[0] == {"role": "system", "content": "d"}
    assert sorted(said[:3]) == ["a b", "c", "d"]
    assert said[3:] == said[:3]
    orders = {
        tuple(str(Workload(prompts=READY, seed=seed).prompt(n))[-5:] for n in range(3))
        for seed in range(20)
    }
    assert len(orders) > 1


def test_prompts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A line separator inside a string is no end of a line.
    chat = '{"messages": [{"role": "user", "content": "hi\u2028there"}]}'
    (tmp_path / "own.jsonl").write_text(
        '{"prompt": "a b", "output_tokens": 9}\n' + chat + "\n", encoding="utf-8"
    )
    own = (Ready("a b", 9), Ready([{"role": "user", "content": "hi\u2028there"}]))
    assert read_prompts(str(tmp_path / "own.jsonl")) == own
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data/prompts/gsm8k.jsonl cannot be read.*scripts/data"):
        read_prompts("gsm8k")
    (tmp_path / "data/prompts").mkdir(parents=True)
    (tmp_path / "own.jsonl").rename(tmp_path / "data/prompts/gsm8k.jsonl")
    assert read_prompts("gsm8k") == own


@pytest.mark.parametrize(
    "line",
    [
        "",
        "text",
        "3",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"messages": []}',
        '{"prompt": "a", "output_tokens": 0}',
        '{"prompt": "a", "output_tokens": "9"}',
        '{"prompt": "a", "tokens": 9}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
    ],
)
def test_lines_that_are_no_prompts_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"own.jsonl, line 2: .* is neither \{\"prompt\": TEXT\}"):
        read_prompts(str(tmp_path / "own.jsonl"))


def test_about_says_what_a_record_needs() -> None:
    about = Workload(prompts=READY, output_tokens=None, source="gsm8k", run_number=7).about()
    assert about == {
        "source": "gsm8k",
        "prompt_words": None,
        "output_tokens": "own",
        "seed": 0,
        "run_number": 7,
    }
    about = Workload(
        run_number=7, turns=Distribution("1-6"), prefix_words=9, until_eos=True
    ).about()
    assert (about["prompt_words"], about["output_tokens"]) == (128, 32)
    assert (about["turns"], about["think_s"], about["until_eos"]) == ("1-6", 0, True)
    assert (about["prefix_words"], about["prefix_groups"]) == (9, 1)


def lines(prompt: Prompt) -> list[str]:
    assert isinstance(prompt, str)
    return prompt.split("\n")


def test_lengths_depend_on_seed_and_number_alone() -> None:
    first = Workload(Distribution("5-50"), Distribution("lognormal:40:0.5"), run_number=1)
    second = replace(first, run_number=2)
    for index in range(20):
        (one,), (other,) = (w.conversation(index, 3).turns for w in (first, second))
        assert one.output_tokens == other.output_tokens
        assert lines(one.prompt)[1:] == lines(other.prompt)[1:]
    asked = {first.conversation(index).turns[0].output_tokens for index in range(50)}
    assert len(asked) > 20
    sizes = {len(lines(first.prompt(index))[1].split()) for index in range(200)}
    assert (min(sizes), max(sizes)) == (5, 50)


def test_ready_prompts_have_answers_of_their_own_lengths() -> None:
    workload = Workload(prompts=READY, output_tokens=None)
    turns = [workload.conversation(index).turns[0] for index in range(3)]
    said = {str(turn.prompt)[-3:]: turn.output_tokens for turn in turns}
    assert sorted(said.values()) == [3, 5, 7]
    assert said["a b"] == 7


def test_turns_say_something_new_and_think_before_it() -> None:
    workload = Workload(
        Distribution("6"), turns=Distribution("1-4"), think_s=Distribution("1-2"), run_number=7
    )
    found = [workload.conversation(index) for index in range(40)]
    assert {len(one.turns) for one in found} == {1, 2, 3, 4}
    assert found == [workload.conversation(index) for index in range(40)]
    first, *later = next(one for one in found if len(one.turns) == 4).turns
    assert first.think_s == 0
    assert lines(first.prompt)[0].startswith("000000007 0000 ")
    assert all(1 <= turn.think_s <= 2 for turn in later)
    assert all(len(lines(turn.prompt)) == 1 for turn in later)
    assert len({turn.prompt for turn in (first, *later)}) == 4


def test_a_groups_prompts_share_their_beginning_in_every_pass() -> None:
    workload = Workload(Distribution("4"), prefix_words=30, prefix_groups=2, run_number=7)
    prefixes: dict[int, set[str]] = {}
    for index in range(6):
        for pass_number in (1, 2):
            *shared, opening, words = lines(workload.prompt(index, pass_number))
            assert opening == f"000000007 {pass_number:04d} {index:06d}"
            assert len(words.split()) == 4
            prefixes.setdefault(index % 2, set()).add("\n".join(shared))
    (first,), (second,) = prefixes.values()
    assert first != second
    assert len(first.split("\n")[1].split()) == 30
    other_run = lines(Workload(prefix_words=30, prefix_groups=2, run_number=8).prompt(0))
    assert other_run[0] != first.split("\n")[0]


def test_a_traces_requests_share_its_blocks_within_a_pass() -> None:
    workload = Workload(run_number=7)
    arrivals = [
        Arrival(0.0, 1100, 20, (1, 2, 3)),
        Arrival(0.5, 1030, 30, (1, 2)),
        Arrival(0.7, 700, 40, (1,)),
    ]
    first, second, third = (
        lines(workload.conversation(n, 1, each).turns[0].prompt) for n, each in enumerate(arrivals)
    )
    assert first[0] == second[0] == "000000007 0001"
    assert [len(found[1].split()) for found in (first, second, third)] == [1100, 1024, 512]
    assert [len(found[3].split()) for found in (first, second, third)] == [0, 6, 188]
    assert first[1].split()[:1024] == second[1].split()
    assert second[1].split()[:512] == third[1].split()
    assert lines(workload.conversation(0, 2, arrivals[0]).turns[0].prompt)[0] != first[0]
    assert workload.conversation(1, 1, arrivals[1]).turns[0].output_tokens == 30
    only_time = workload.conversation(0, 1, Arrival(0.0, None, None)).turns[0]
    assert (len(lines(only_time.prompt)[1].split()), only_time.output_tokens) == (128, 32)
