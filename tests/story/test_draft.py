"""A sparse model drafts and the dense one decides: answers are the dense one's own."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cast_serve.checkpoint.convert import convert
from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets
from tests.story.conftest import FLAGS, Served, complete, serving, variant_infos
from tests.story.test_hub import NUM_WORDS, save_tokenizer

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

pytestmark = pytest.mark.server

NUM_DRAFT_TOKENS = 3
PATTERN = Pattern(48, 64)
NUM_SAMPLES = 4096


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random, in fp32, where checking several tokens at once hardly ever rounds differently."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=NUM_WORDS,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def served(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("draft")
    dense, pruned, sparse = (root / name for name in ("dense", "pruned", "sparse"))
    model.save_pretrained(dense)
    twin = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for module in find_targets(twin, PATTERN)[0].values():
        module.weight.data *= hard_mask(module.weight.data.abs(), PATTERN)
    twin.save_pretrained(pruned)
    for folder in (dense, pruned):
        save_tokenizer(folder)
    convert(pruned, sparse, pattern=PATTERN)
    variants = {"dense": dense, "lossless": Path(f"{dense}+{sparse}")}
    flags = [*FLAGS, "--dtype", "float32", "--kv-cache-memory-bytes", "64M"]
    with serving(variants, flags, root / "up.log") as served:
        yield served


def acceptance(served: Served) -> float:
    text = httpx.get(f"{served.url}/metrics").text
    (ratio,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        if family.name == "cast_draft_acceptance_ratio"
        for sample in family.samples
        if sample.labels["variant"] == "lossless"
    )
    return float(ratio)


def test_what_drafts_is_told(served: Served) -> None:
    infos = variant_infos(served)
    assert (infos["dense"]["draft"], infos["lossless"]["draft"]) == ("", "48:64")
    assert infos["lossless"]["pattern"] == "dense"


def test_greedy_answers_are_the_dense_models(served: Served) -> None:
    def tokens(name: str, place: int) -> list[str]:
        prompt = [(7 * place + 13 * each) % NUM_WORDS for each in range(4 + place % 5)]
        more = {"max_tokens": 24, "logprobs": 0}
        return list(complete(served, name, prompt, **more)["logprobs"]["tokens"])

    for place in range(50):
        assert tokens("lossless", place) == tokens("dense", place), place
    assert 0.05 < acceptance(served) < 0.95  # so some were kept, and some were not
