"""GPT-2 is trained with weights [out_features, in_features] and stored as transformers reads it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cast_train.checkpoint import conv1d, models
from cast_train.config import TrainConfig
from cast_train.training.run import train
from tests.cast_train.settings import changed

TOKENS = torch.arange(64).view(2, 32)


def test_linears_compute_what_transformers_does(gpt2_dir):
    theirs = AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=torch.float32)
    ours = models.load_dense(gpt2_dir, torch.float32)
    assert not any(isinstance(module, Conv1D) for module in ours.modules())
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits)
    stored = conv1d.transposed(ours, ours.state_dict())
    assert all(torch.equal(stored[name], t) for name, t in theirs.state_dict().items())


def test_tied_and_frozen_weights_stay_so():
    model = nn.ModuleDict({name: Conv1D(8, 4) for name in ("a", "b", "c")}).bfloat16().eval()
    model["b"].weight, model["d"] = model["a"].weight, model["c"]
    model["c"].requires_grad_(False)
    before, biases = model["a"].weight.detach(), [model[name].bias for name in "abc"]
    conv1d.to_linears(model)
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, before.T)
    assert model["c"] is model["d"]
    assert [model[name].weight.requires_grad for name in "abc"] == [True, True, False]
    assert all(model[name].bias is bias for name, bias in zip("abc", biases, strict=True))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "changes", [{"scale_parts": 2}, {"method": "fixed"}, {"method": "dense"}], ids=str
)
def test_a_written_directory_is_gpt2s(changes, gpt2_dir, text_file, settings_file, tmp_path):
    config = changed(TrainConfig.from_toml(settings_file, steps=2), **changes)
    train(gpt2_dir, [text_file], tmp_path / "out", config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    if config.method == "dense":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        ours = models.load_dense(tmp_path / "out")
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits)
        return
    for layer in (0, 1):  # [in_features, out_features]
        for name, shape in {"attn.c_attn": (32, 96), "mlp.c_fc": (32, 128)}.items():
            for part in ("weight", "gate"):
                assert written[f"transformer.h.{layer}.{name}.{part}"].shape == shape
            if "scale_parts" in changes:  # [out_features, scale_parts]
                assert written[f"transformer.h.{layer}.{name}.scale"].shape == (shape[1], 2)
