"""Questions that are read or refused, and the arithmetic of accuracies."""

from pathlib import Path

import pytest

from cast_serve.questions import Question, paired_difference, read_questions, share

YES_OR_NO = Question("Is it?", ("yes", "no"), 1)
GOOD = '{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}'


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f'{GOOD}\n{{"question": 7, "choices": [1, 2.5], "answer": 0}}\n')
    assert read_questions(path) == [YES_OR_NO, Question("7", ("1", "2.5"), 0)]
    assert read_questions(path, limit=1) == [YES_OR_NO]
    assert YES_OR_NO.prompt == "Question: Is it?\nAnswer:"


def test_a_line_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f"{GOOD}\nbroken\n")
    assert read_questions(path, limit=1) == [YES_OR_NO]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not a question: Expecting property name"),
        ("", "is not a question: Expecting value"),
        ('{"question": "?", "choices": ["a"], "answer": 0}', "1 choices; give two or more"),
        ('{"question": "?", "choices": ["a", ""], "answer": 0}', "none empty"),
        ('{"question": "?", "choices": "ab", "answer": 0}', "choices 'ab' are not a list"),
        ('{"question": "?", "choices": ["a", "b"], "answer": 2}', "answer 2; give .* 0 to 1"),
        ('{"question": "?", "choices": ["a", "b"], "answer": -1}', "answer -1; give the right"),
        ('{"question": "?", "choices": ["a", "b"], "answer": true}', "answer True; give the right"),
        ('{"question": "?", "choices": ["a", "b"], "answer": "0"}', "answer '0'; give the right"),
        ('{"question": "?", "choices": ["a", "b"]}', "'answer' is missing"),
        ("[]", "is not a question: list indices"),
    ],
)
def test_a_broken_question_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=f"questions {path}, line 2: .*{message}"):
        read_questions(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent cannot be read: .*after running scripts/data"):
        read_questions(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="latin cannot be read: 'utf-8' codec"):
        read_questions(tmp_path / "latin")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is empty; give one line of JSON"):
        read_questions(tmp_path / "empty")


def test_the_likeliest_answer_in_sum_and_per_byte() -> None:
    # Per byte -1.0 against -0.8: "ääh" has 5 bytes. Per character it would lose.
    assert Question("?", ("no", "ääh"), 1).likeliest([-2.0, -4.0]) == (0, 1)
    assert YES_OR_NO.likeliest([-3.0, -2.0]) == (1, 0)
    assert Question("?", ("one", "two"), 0).likeliest([-3.0, -3.0]) == (0, 0)


def test_shares_and_paired_differences_by_hand() -> None:
    found, stderr = share([True, False, True])
    assert (found, stderr) == pytest.approx((2 / 3, (2 / 9 / 2) ** 0.5))
    # +1, 0, 0, +1: the mean is 0.5, and the deviation of one of them 0.577.
    ours, theirs = (True, True, False, True), (False, True, False, False)
    difference, stderr = paired_difference(ours, theirs)
    assert (difference, stderr) == pytest.approx((0.5, 0.57735 / 2), rel=1e-4)
    assert paired_difference(ours, ours) == (0, 0)
    assert share([True]) == (1, None)
    assert paired_difference([False], [True]) == (-1, None)
