"""Prompts: reproducible, never shared, and bad input refused."""

from pathlib import Path

import pytest

from loadtest.send.workload import Workload, read_prompts, read_words


def test_same_seed_same_words_but_a_new_opening_every_run() -> None:
    first, second = (Workload(prompt_words=20, seed=3) for _ in range(2))
    opening, words = first.prompt(5).split("\n")
    other_opening, other_words = second.prompt(5).split("\n")
    assert words == other_words
    assert opening != other_opening
    assert len(words.split()) == 20


def test_run_number_and_seed_fix_the_prompt() -> None:
    workload = Workload(prompt_words=4, seed=1, run_number=7)
    assert workload.prompt(2) == Workload(prompt_words=4, seed=1, run_number=7).prompt(2)
    assert workload.prompt(2) != Workload(prompt_words=4, seed=2, run_number=7).prompt(2)
    assert workload.prompt(2).startswith("000000007 0000 000002\n")


def test_prompts_differ_from_their_opening_on() -> None:
    workload = Workload(run_number=7)
    prompts = [workload.prompt(index, pass_) for index in range(50) for pass_ in (1, 2)]
    openings = {prompt.split("\n")[0] for prompt in prompts}
    assert len(openings) == 100
    assert {len(opening) for opening in openings} == {21}
    assert len({prompt.split("\n")[1] for prompt in prompts}) == 50


def test_text_is_cut_into_runs_of_its_words() -> None:
    text = tuple(str(number) for number in range(100))
    words = Workload(prompt_words=10, text=text).prompt(0).split("\n")[1].split()
    start = int(words[0])
    assert words == [str(number) for number in range(start, start + 10)]


def test_a_text_as_long_as_a_prompt_is_enough() -> None:
    assert Workload(prompt_words=2, text=("a", "b")).prompt(0).endswith("\na b")


def test_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 2 words, fewer than one prompt of 3"):
        Workload(prompt_words=3, text=("a", "b"))


def test_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt words 0"):
        Workload(prompt_words=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "cannot be read as UTF-8"), (b" \n", "holds no words")],
)
def test_unusable_text_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_words(tmp_path / "text")


def test_missing_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_words(tmp_path / "absent")


READY = ("a b", "c", [{"role": "system", "content": "d"}, {"role": "user", "content": "e"}])


def test_ready_prompts_come_in_a_seeded_order_and_again() -> None:
    workload = Workload(prompts=READY, run_number=7, seed=1)
    prompts = [workload.prompt(index, 3) for index in range(6)]
    assert prompts == [Workload(prompts=READY, run_number=7, seed=1).prompt(n, 3) for n in range(6)]
    texts = [p if isinstance(p, str) else p[0]["content"] for p in prompts]
    assert all(text.startswith(f"000000007 0003 {n:06d}\n") for n, text in enumerate(texts))
    said = [text.split("\n")[1] for text in texts]
    assert sorted(said[:3]) == ["a b", "c", "d"]
    assert said[3:] == said[:3]
    orders = {
        tuple(str(Workload(prompts=READY, seed=seed).prompt(n))[-5:] for n in range(3))
        for seed in range(20)
    }
    assert len(orders) > 1


def test_only_the_first_message_gets_the_opening() -> None:
    prompt = Workload(prompts=READY[2:], run_number=7).prompt(0)
    opened = {"role": "system", "content": "000000007 0000 000000\nd"}
    assert prompt == [opened, {"role": "user", "content": "e"}]
    assert READY[2] == [{"role": "system", "content": "d"}, {"role": "user", "content": "e"}]


def test_text_and_ready_prompts_are_refused_together() -> None:
    with pytest.raises(ValueError, match="both a text and ready prompts are given"):
        Workload(prompt_words=1, text=("a",), prompts=("b",))


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


def test_empty_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").touch()
    with pytest.raises(ValueError, match="own.jsonl is empty"):
        read_prompts(str(tmp_path / "own.jsonl"))


def test_about_says_what_a_record_needs() -> None:
    about = Workload(prompts=READY, source="gsm8k", run_number=7).about()
    assert about == {"source": "gsm8k", "prompt_words": None, "seed": 0, "run_number": 7}
    assert Workload(run_number=7).about()["prompt_words"] == 128
