"""Models that vLLM builds otherwise than Llama, in 8 bits by `convert`: the logits of `load`.

GPT-2 has q, k and v in one tensor, stored transposed; OPT and Gemma2 have no output layer that vLLM
takes in 8 bits. They are small and random.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
)

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.model import load
from cast_serve.sparsity.pattern import TWO_FOUR, hard_mask
from cast_serve.sparsity.targets import find_targets

# A fixture that is imported keeps its name in every test module that asks for it.
from tests.cast_train.conftest import llama_dir  # noqa: F401
from tests.story.conftest import FLAGS, Served, distance_to, serving, variant_infos

pytestmark = pytest.mark.server

TOLERANCE = 1e-2
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2),
    "opt": OPTConfig(
        vocab_size=256,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=64,
        init_std=0.2,
    ),
    "gemma2": Gemma2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
    ),
}
HEADS = {"gpt2": "int8", "opt": "float32", "gemma2": "float32"}
LINEARS = {"gpt2": "8", "opt": "12", "gemma2": "14"}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    llama_dir: Path,  # noqa: F811
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        model = AutoModelForCausalLM.from_config(config).eval()
        for module in find_targets(model, TWO_FOUR)[0].values():
            weight = module.weight.data
            rows = weight.T.contiguous() if name == "gpt2" else weight  # as [out, in]
            rows = rows * hard_mask(rows.abs())
            module.weight.data = rows.T.contiguous() if name == "gpt2" else rows
        model.save_pretrained(root / f"{name}-pruned")
        AutoTokenizer.from_pretrained(llama_dir).save_pretrained(root / f"{name}-pruned")
        asked = Quantization("int8", head="auto")
        convert(root / f"{name}-pruned", root / name, quantization=asked)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = [*FLAGS, "--dtype", "float32", "--logprobs-mode", "raw_logits"]
    logs = tmp_path_factory.mktemp("logs")
    cores = sorted(os.sched_getaffinity(0))  # of which there may be fewer than variants
    variants = [
        f'[variant.{name}]\ndir = "{folder}"\ncores = "{cores[place % len(cores)]}"\n'
        for place, (name, folder) in enumerate(folders.items())
    ]
    (logs / "up.toml").write_text("".join(variants))
    with serving({}, flags, logs / "up.log", logs / "up.toml") as served:
        yield served


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(
    served: Served, folders: dict[str, Path], name: str
) -> None:
    assert distance_to(served, name, load(folders[name], torch.float32)) < TOLERANCE


def test_every_linear_runs_sparse_and_heads_as_vllm_takes_them(
    served: Served, folders: dict[str, Path]
) -> None:
    infos = variant_infos(served)
    assert {name: info["num_sparse_layers"] for name, info in infos.items()} == LINEARS
    assert {info["kernel"] for info in infos.values()} == {"cast::linear24_int8"}
    assert {name: info["head"] for name, info in infos.items()} == HEADS
    for name, folder in folders.items():
        quantization = json.loads((folder / "cast.json").read_text())["quantization"]
        assert (quantization["head"] == "int8") == (HEADS[name] == "int8")
