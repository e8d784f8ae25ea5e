"""scripts/data's reading of labelled sets; the whole script runs in `make data`."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("data")


def test_options_in_one_text_become_choices(script: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"question": " Who? ", "options": "A. me\nB. you A. gain", "answer": "B. you A. gain"},
        {"question": "What?", "options": ".\nA. this \nB. that", "answer": "A. this"},
        {"question": "Cut\nA. one", "options": "\nB. two\nC. three", "answer": "C. three"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    script.write_choices(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [{"question": "What?", "choices": ["this", "that"], "answer": 0}]


def test_the_tuning_text_shares_nothing_with_training_and_held_out_text(
    script: ModuleType, tmp_path: Path
) -> None:
    def words(name: str) -> str:
        return " ".join(f"{name}{number}" for number in range(20))

    reviews, articles = tmp_path / script.TUNING_REVIEWS, tmp_path / script.TUNING_ARTICLES
    for path in (reviews, articles):
        path.parent.mkdir(parents=True)
    review = f'{words("liked")}<br /><br />And then, ""{words("trained").upper()}"".'
    reviews.write_text(f'text,label\n"{review}",1\n{words("liked")},0\n')
    articles.write_text(f"short\n{words('read')}\nBut {words('wiki')}\n{words('web')}\n")
    for name in ("train.txt", "heldout-wiki.txt", "heldout-c4.txt"):
        word = {"train.txt": "trained", "heldout-wiki.txt": "wiki", "heldout-c4.txt": "web"}[name]
        (tmp_path / name).write_text(f"Before it, {words(word)} and after it.\n")
    script.write_tuning(tmp_path, tmp_path)
    kept = (tmp_path / "tuning.txt").read_text().split("\n\n")
    assert kept == [words("liked"), words("read") + "\n"]


def conversation(sender: str, *words: str) -> dict[str, Any]:
    return {"id": "a", "conversations": [{"from": sender, "value": " ".join(words)}]}


@pytest.mark.parametrize("chunk_chars", [1, 7, 1 << 20])
def test_first_turns_of_a_list_that_is_cut_off(
    script: ModuleType, tmp_path: Path, chunk_chars: int
) -> None:
    conversations = [
        conversation("human", "a", "first", "question", "here"),
        conversation("gpt", "an", "answer", "comes", "first"),
        conversation("human", "too", "few", "words"),
        {"id": "b", "conversations": []},
        conversation("human", *["long"] * 1001),
        conversation("human", *["longest"] * 1000),
        conversation("human", "a", "second", "question", "é\u2028"),
        conversation("human", "this", "one", "is", "cut", "off"),
    ]
    text = json.dumps(conversations, indent=2, ensure_ascii=False)
    (tmp_path / "cut.json").write_text(text[: text.index("is cut off")], encoding="utf-8")
    first, longest, second = script.first_turns(tmp_path / "cut.json", 5, chunk_chars)
    assert first == "a first question here"
    assert longest.split() == ["longest"] * 1000
    assert second == "a second question é"
    assert script.first_turns(tmp_path / "cut.json", 1) == [first]


def test_prompts_say_where_they_are_from(script: ModuleType, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Question: 1 + 1?\nAnswer:"}]}
    for member, content in (
        (script.SHAREGPT, json.dumps([conversation("human", "what", "is", "this", "?")])),
        (script.GSM8K, json.dumps(chat) + "\n"),
    ):
        (tmp_path / member).parent.mkdir(parents=True)
        (tmp_path / member).write_text(content)
    script.write_prompts(tmp_path, tmp_path)
    for name, prompt in (("sharegpt", {"prompt": "what is this ?"}), ("gsm8k", chat)):
        assert json.loads((tmp_path / f"{name}.jsonl").read_text()) == prompt
        about = json.loads((tmp_path / "provenance.json").read_text())[f"{name}.jsonl"]
        assert about["num_prompts"] == 1
        assert about["source_sha256"] == script.SHA256[about["source"]]
        assert about["package"] in script.PACKAGES
