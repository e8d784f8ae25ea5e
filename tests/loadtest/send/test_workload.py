"""Prompts: reproducible, never shared, and bad input refused."""

from pathlib import Path
from typing import Any

import pytest

from loadtest.send.workload import Workload, read_prompts, read_words


def test_same_seed_same_words_but_a_new_opening_every_run() -> None:
    first, second = (Workload(prompt_words=20, seed=3) for _ in range(2))
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
        ({"prompt_words": 0}, "prompt words 0"),
        ({"prompt_words": 3, "text": ("a", "b")}, "has 2 words, fewer than one prompt of 3"),
        ({"prompt_words": 1, "text": ("a",), "prompts": ("b",)}, "both a text and ready prompts"),
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
    words = str(Workload(prompt_words=10, text=text).prompt(0)).split("\n")[1].split()
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


READY = ("a b", "c", [{"role": "system", "content": "d"}, {"role": "user", "content": "e"}])


def test_ready_prompts_come_in_a_seeded_order_and_again() -> None:
    workload = Workload(prompts=READY, run_number=7, seed=1)
    prompts = [workload.prompt(index, 3) for index in range(6)]
    assert prompts == [Workload(prompts=READY, run_number=7, seed=1).prompt(n, 3) for n in range(6)]
    texts = [p if isinstance(p, str) else p[0]["content"] for p in prompts]
    assert all(text.startswith(f"000000007 0003 {n:06d}\n") for n, text in enumerate(texts))
    said = [text.split("\n")[1] for text in texts]
    assert [len(prompt) for prompt in prompts if isinstance(prompt, list)] == [2, 2]
    assert READY[2] == [{"role": "system", "content": "d"}, {"role": "user", "content": "e"}]
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
    (tmp_path / "own.jsonl").write_text('{"prompt": "a b"}\n' + chat + "\n", encoding="utf-8")
    own = ("a b", [{"role": "user", "content": "hi\u2028there"}])
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
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
    ],
)
def test_lines_that_are_no_prompts_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"own.jsonl, line 2: .* is neither \{\"prompt\": TEXT\}"):
        read_prompts(str(tmp_path / "own.jsonl"))


def test_about_says_what_a_record_needs() -> None:
    about = Workload(prompts=READY, source="gsm8k", run_number=7).about()
    assert about == {"source": "gsm8k", "prompt_words": None, "seed": 0, "run_number": 7}
    assert Workload(run_number=7).about()["prompt_words"] == 128
