"""A sparse model drafts and the dense one decides: answers are the dense one's own."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cast_serve.checkpoint.convert import convert
from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets
from tests.story.conftest import FLAGS, Served, serving, variant_infos
from tests.story.test_hub import NUM_WORDS, save_tokenizer

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

pytestmark = pytest.mark.server

PATTERN = Pattern(48, 64)
PROMPT = [3, 14, 15, 9, 2, 6]
TEMPERATURE = 0.7
NUM_REQUESTS, NUM_CHOICES = 64, 64


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
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
    common = f'dir = "{dense}"\ncores = "{cores}"\n'
    config = root / "serve.toml"
    config.write_text(
        f"[variant.dense]\n{common}"
        f'[variant.lossless]\n{common}draft = "{sparse}"\ndraft_requests = {NUM_CHOICES}\n'
        f'[variant.resting]\n{common}draft = "{dense}"\n'
    )
    flags = [*FLAGS, "--dtype", "float32", "--kv-cache-memory-bytes", "64M"]
    flags += ["--max-num-seqs", "64", "--max-num-batched-tokens", "256"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAST_MAX_CHOICES", str(NUM_CHOICES))
        with serving({}, flags, root / "up.log", config) as served:
            yield served


def answers(served: Served, name: str, **more: Any) -> list[list[int]]:
    """The token ids of every choice."""
    body = {"model": name, "ignore_eos": True, "return_token_ids": True, **more}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return [choice["token_ids"] for choice in response.json()["choices"]]


def acceptance(served: Served, name: str) -> float:
    """What the metrics say; NaN before the first proposal."""
    (ratio,) = (
        sample.value
        for family in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
        if family.name == "cast_draft_acceptance_ratio"
        for sample in family.samples
        if sample.labels["variant"] == name
    )
    return float(ratio)


def test_what_drafts_is_told(served: Served) -> None:
    infos = variant_infos(served)
    assert (infos["dense"]["draft"], infos["lossless"]["draft"]) == ("", "48:64")
    assert infos["lossless"]["pattern"] == "dense"


def test_greedy_answers_are_the_dense_models(served: Served) -> None:
    prompts = [
        [(7 * place + 13 * each) % NUM_WORDS for each in range(4 + place % 5)]
        for place in range(50)
    ]
    for some in (prompts[:25], prompts[25:]):
        dense, lossless = (
            answers(served, name, prompt=some, max_tokens=24, temperature=0)
            for name in ("dense", "lossless")
        )
        assert len(dense) == 25
        assert lossless == dense
    assert 0.05 < acceptance(served, "lossless") < 0.95  # so some were kept, and some were not


def test_a_draft_that_rested_reads_what_it_missed(served: Served) -> None:
    """One answer outlasts 24 others; its draft, dense too, then guesses all that follows."""
    many = [[place, 2, 6] for place in range(24)]
    found = {}
    for name in ("dense", "resting"):
        with ThreadPoolExecutor() as pool:
            long = pool.submit(answers, served, name, prompt=PROMPT, max_tokens=96, temperature=0)
            some = answers(served, name, prompt=many, max_tokens=24, temperature=0)
            found[name] = [*long.result(), *some]
    assert found["resting"] == found["dense"]
    assert acceptance(served, "resting") > 0.9


def test_sampled_answers_have_the_dense_models_distribution(
    served: Served, model: LlamaForCausalLM
) -> None:
    """Of the second and third token, the first two that are proposed, against the exact one."""
    observed = torch.zeros(NUM_WORDS, NUM_WORDS)
    for place in range(NUM_REQUESTS):  # in turn, so that the seeds decide; a choice adds one
        more = {"n": NUM_CHOICES, "max_tokens": 4, "seed": NUM_CHOICES * place}
        for tokens in answers(served, "lossless", prompt=PROMPT, temperature=TEMPERATURE, **more):
            observed[tokens[1], tokens[2]] += 1
    expected = observed.sum() * exact(model)
    is_frequent = expected >= 5
    observed, expected = (
        torch.cat([counts[is_frequent], counts[~is_frequent].sum()[None]])
        for counts in (observed, expected)
    )
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 50
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["dense", "lossless"])
def test_a_seeded_prompt_may_be_longer_than_a_step(served: Served, name: str) -> None:
    """vLLM alone dies of it on CPUs. The seed decides, whatever else was read before."""
    prompt = [place % NUM_WORDS for place in range(600)]
    first, second = (
        answers(served, name, prompt=prompt, max_tokens=8, temperature=1, seed=5) for _ in range(2)
    )
    assert first == second


def exact(model: LlamaForCausalLM) -> Tensor:
    """Probabilities of second and third token behind PROMPT, [NUM_WORDS, NUM_WORDS]."""
    words = torch.arange(NUM_WORDS)
    none = torch.tensor([PROMPT])
    one = torch.cat([none.expand(NUM_WORDS, -1), words[:, None]], 1)
    two = torch.cat([one.repeat_interleave(NUM_WORDS, 0), words.repeat(NUM_WORDS)[:, None]], 1)
    with torch.no_grad():
        first, second, third = (
            (model(tokens).logits[:, -1] / TEMPERATURE).softmax(-1) for tokens in (none, one, two)
        )
    both = first.T * second
    return torch.einsum("ab,abc->bc", both, third.view(NUM_WORDS, NUM_WORDS, NUM_WORDS))
