"""Names of a hub behind `--`: vLLM fetches them, and of a local directory it asks nothing."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.fake_hub import FakeHub
from tests.story.conftest import complete, serving

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

NUM_WORDS = 96
FLAGS = ["--enforce-eager", "--max-model-len", "64", "--kv-cache-memory-bytes", "64M"]


def save_model(folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=NUM_WORDS,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, NUM_WORDS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def test_a_tokenizer_and_a_draft_model_on_a_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("whole", "words", "draft"):
        (tmp_path / folder).mkdir()
    save_model(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    save_model(tmp_path / "bare")  # its tokenizer is on the hub
    save_tokenizer(tmp_path / "words")
    save_model(tmp_path / "draft")
    save_tokenizer(tmp_path / "draft")
    hub.add("org/words", tmp_path / "words")
    hub.add("org/draft", tmp_path / "draft")
    for name, value in {**hub.environment, "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    drafting = {"model": "org/draft", "method": "draft_model", "num_speculative_tokens": 2}
    flags = ["--tokenizer", "org/words", "--speculative-config", json.dumps(drafting)]
    config = tmp_path / "up.toml"
    config.write_text(
        f'[variant.local]\ndir = "whole"\n[variant.hub]\ndir = "bare"\nvllm = {json.dumps(flags)}\n'
    )
    with serving({}, FLAGS, tmp_path / "up.log", config) as served:
        answers = [complete(served, name, "w2 w3", max_tokens=4) for name in ("local", "hub")]
    assert [answer["finish_reason"] for answer in answers] == ["length", "length"]
    assert {"tokenizer.json", "model.safetensors"} <= hub.fetched()
    asked = [line for line in hub.asked if "org/words" not in line and "org/draft" not in line]
    assert not [line for line in asked if "/models/" in line or "/resolve/" in line], asked
