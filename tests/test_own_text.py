"""scripts/own-text: what it asks, and which answers it keeps."""

import argparse
import asyncio
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from scripts.data_files import shingles
from tests.scripts import load_script

SAID = "Return the mean of all numbers that are given, or None where there are none."
SOURCES = (
    f'def mean(numbers):\n    """{SAID}"""\n    return sum(numbers) / len(numbers)\n',
    f'def mean(again):\n    """{SAID}"""\n',
    'def short(x):\n    """Too short."""\n',
    f'def nothing():\n    """{SAID}"""\n',
    f'class A:\n    def method(self, x):\n        """{SAID}"""\n',
    f'def median(numbers):\n    """{SAID}"""\n',
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("own-text")


class Tokenizer:
    """Of a chat its contents, of a text its words."""

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "\n".join(message["content"] for message in chat)

    def __call__(self, text: str) -> Any:
        return argparse.Namespace(input_ids=text.split())


def test_it_asks_once_for_each_documented_function(script: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": source}) + "\n" for source in SOURCES))
    asked = script.questions(text)
    assert len(asked) == 2
    assert all(SAID in question for question in asked)
    assert "def m" in asked[0]
    assert "return sum" not in asked[0]
    assert "function `m" in asked[1]


def test_answers_that_were_cut_off_or_that_share_words_with_the_tasks_are_left_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = " ".join(f"word{number}" for number in range(13))
    answers = {"one": ("stop", "fine"), "two": ("length", "long"), "three": ("stop", f"a {words}")}

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        assert (asked["model"], asked["max_tokens"]) == ("dense", 64)
        reason, content = answers[asked["messages"][0]["content"]]
        choice = {"finish_reason": reason, "message": {"content": content}}
        return httpx.Response(200, json={"choices": [choice]})

    monkeypatch.setattr(script, "questions", lambda text: list(answers))
    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")
    monkeypatch.setattr(script.httpx, "AsyncClient", lambda **_: client)
    how = {"answers": 10, "max_tokens": 64, "temperature": 0.8, "concurrency": 1}
    about = {"url": "http://server", "model": "dense", "tokenizer": Path(), "text": Path()}
    file = io.StringIO()
    tally = script.Tally()
    args = argparse.Namespace(**about, **how)
    asyncio.run(script.ask(args, shingles(words), file, tally))
    assert [json.loads(line) for line in file.getvalue().splitlines()] == [{"text": "one\nfine"}]
    assert (tally.num_rows, tally.num_tokens, tally.num_cut_off, tally.num_shared) == (1, 2, 1, 1)
