"""Prompts: reproducible, never shared, and bad input refused."""

from pathlib import Path

import pytest

from loadtest.workload import Workload, read_words


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
    assert workload.prompt(2).startswith("000000007 000002\n")


def test_prompts_differ_from_their_opening_on() -> None:
    openings = {Workload(run_number=7).prompt(index).split("\n")[0] for index in range(50)}
    assert len(openings) == 50
    assert {len(opening) for opening in openings} == {16}


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
