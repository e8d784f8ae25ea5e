"""Gates on tiny random models of the families that people prune."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from cast_serve.sparsity.pattern import TWO_FOUR, check_weight
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint.conv1d import to_linears
from cast_train.gates import gating
from cast_train.gates.schedules import Phase
from cast_train.pruning.scores import magnitude_scores

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
# Config, and linears of one layer.
FAMILIES = {
    "llama": (LlamaConfig(**COMMON), 7),
    "mistral": (MistralConfig(**COMMON), 7),
    "qwen2": (Qwen2Config(**COMMON), 7),
    "qwen3": (Qwen3Config(**COMMON), 7),
    "gemma": (GemmaConfig(**COMMON), 7),
    "gemma2": (Gemma2Config(**COMMON), 7),
    "gpt2": (GPT2Config(**GPT2), 4),
    "opt": (OPTConfig(**OPT), 6),
}
TOKENS = torch.arange(64).view(2, 32)
SOFT = Phase(blend=1.0, tau=0.5, penalty_weight=0.1, is_hard=False)
HARD = Phase(blend=1.0, tau=1e-3, penalty_weight=0.0, is_hard=True)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    config, linears_per_layer = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    return to_linears(model), linears_per_layer


def test_every_linear_of_every_layer_is_a_target_and_nothing_else(family):
    model, linears_per_layer = family
    targets, _ = find_targets(model, TWO_FOUR)
    assert len(targets) == 2 * linears_per_layer
    dense = (model.get_input_embeddings(), model.get_output_embeddings())
    assert not any(linear is other for linear in targets.values() for other in dense)
    only, _ = find_targets(model, TWO_FOUR, include=(r"\.0\.",), exclude=("o_proj|c_proj|fc2",))
    assert 0 < len(only) < linears_per_layer


@pytest.mark.parametrize("selector", ["soft_topk", "generator"])
def test_gates_learn_and_harden(family, selector):
    model, _ = family
    before = model(TOKENS).logits
    targets, _ = find_targets(model, TWO_FOUR)
    scores = magnitude_scores(targets)
    gate_map = gating.attach(targets, dict.fromkeys(targets, TWO_FOUR), scores, selector=selector)
    torch.testing.assert_close(model(TOKENS).logits, before)
    gating.set_phase(gate_map, SOFT)
    (model(TOKENS, labels=TOKENS).loss + gating.penalty(gate_map)).backward()
    learnt = [p for gate in gate_map.values() for p in gate.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in learnt)
    assert max(float(parameter.grad.abs().max()) for parameter in learnt) > 0
    gating.freeze(gate_map)
    gating.set_phase(gate_map, HARD)
    for name, linear in targets.items():
        check_weight(linear.weight, TWO_FOUR, name)
    assert model(TOKENS).logits.isfinite().all()
