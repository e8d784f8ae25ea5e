"""Tiny random models of two architectures."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_llama(hidden_size: int = 32, **changes: int) -> PreTrainedModel:
    """Two layers, or what `changes` of LlamaConfig make of them."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    }
    config = LlamaConfig(**{**settings, **changes}, tie_word_embeddings=True)
    return LlamaForCausalLM(config).bfloat16()


def tiny_gpt2(hidden_size: int = 32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=hidden_size, n_layer=1, n_head=2, vocab_size=96)
    return GPT2LMHeadModel(config).bfloat16()
