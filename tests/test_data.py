"""scripts/data's reading of labelled sets; the whole script runs in `make data`."""

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/data"


@pytest.fixture(scope="module")
def script():
    loader = SourceFileLoader("data_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("data_script", loader))
    loader.exec_module(module)
    return module


def test_options_in_one_text_become_choices(script, tmp_path):
    rows = [
        {"question": " Who? ", "options": "A. me\nB. you A. gain", "answer": "B. you A. gain"},
        {"question": "What?", "options": ".\nA. this \nB. that", "answer": "A. this"},
        {"question": "Cut\nA. one", "options": "\nB. two\nC. three", "answer": "C. three"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    script.write_choices(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [{"question": "What?", "choices": ["this", "that"], "answer": 0}]
