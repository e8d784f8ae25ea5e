"""Questions that are read, and lines and files that are refused."""

from pathlib import Path

import pytest

from cast_serve.questions import Question, read_questions

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
        ('{"question": "?", "choices": "ab", "answer": 0}', "choices 'ab' are no list"),
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
    with pytest.raises(ValueError, match="empty is empty; give a line of JSON"):
        read_questions(tmp_path / "empty")
