import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cast_train import attention
from cast_train.checkpoint.models import load_dense


def heads(length, dtype=torch.float64):
    """Queries of 6 heads, keys and values of 2, that want a gradient."""
    torch.manual_seed(length)
    shapes = [(2, num_heads, length, 16) for num_heads in (6, 2, 2)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
def test_output_and_gradients_are_those_of_the_fused_attention(length):
    query, key, value = inputs = heads(length)
    weight = torch.randn(2, length, 6, 16, dtype=torch.float64)
    ours = attention.causal_attention(query, key, value, 0.3)
    assert ours.shape == weight.shape
    assert ours.is_contiguous()
    fused = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, fused.transpose(1, 2))
    found = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((fused.transpose(1, 2) * weight).sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_bf16_is_as_near_to_exact_as_its_rounding():
    query, key, value = heads(300, torch.bfloat16)
    ours = attention.causal_attention(query, key, value, 0.25)
    exact = attention.causal_attention(query.double(), key.double(), value.double(), 0.25)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 0.03  # values are about 1, bf16 has 8 bits


@pytest.fixture
def asked(monkeypatch):
    """How often each way was taken."""
    calls = {"causal_attention": 0, "sdpa_attention_forward": 0}

    def count(name):
        original = getattr(attention, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(attention, name, counted)

    for name in calls:
        count(name)
    return calls


def test_a_model_has_the_same_logits(model_dir, asked):
    model = load_dense(model_dir, torch.float32).eval()
    ours = copy.deepcopy(model)
    attention.use_blocks(ours)
    tokens = torch.arange(2 * 40).view(2, 40)
    found = ours(input_ids=tokens).logits
    assert asked == {"causal_attention": 2, "sdpa_attention_forward": 0}  # two layers
    torch.testing.assert_close(found, model(input_ids=tokens).logits)


def test_padding_dropout_and_long_texts_go_to_the_fused_attention(llama_dir, asked, monkeypatch):
    model = load_dense(llama_dir, torch.float32).eval()
    ours = copy.deepcopy(model)
    attention.use_blocks(ours)
    tokens = torch.arange(2 * 40).view(2, 40)
    padding = torch.ones_like(tokens)
    padding[1, :7] = 0
    found = ours(input_ids=tokens, attention_mask=padding).logits
    expected = model(input_ids=tokens, attention_mask=padding).logits
    torch.testing.assert_close(found[padding.bool()], expected[padding.bool()])
    ours.train()
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ours(input_ids=tokens)
    ours.eval()
    monkeypatch.setattr(attention, "MAX_LENGTH", 39)
    ours(input_ids=tokens)
    assert asked == {"causal_attention": 0, "sdpa_attention_forward": 6}


def test_generating_goes_on_from_what_is_cached(llama_dir):
    model = load_dense(llama_dir, torch.float32).eval()
    ours = copy.deepcopy(model)
    attention.use_blocks(ours)
    tokens = torch.arange(10)[None]
    asked_for = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(tokens, **asked_for).equal(model.generate(tokens, **asked_for))


def test_a_model_of_another_attention_keeps_it(llama_dir, tmp_path):
    model = load_dense(llama_dir, torch.float32)
    model.set_attn_implementation("eager")
    attention.use_blocks(model)
    assert model.config._attn_implementation == "eager"


def test_a_stored_model_does_not_name_it(llama_dir, tmp_path):
    model = load_dense(llama_dir, torch.float32)
    attention.use_blocks(model)
    model.save_pretrained(tmp_path / "stored")
    assert attention.NAME not in (tmp_path / "stored" / "config.json").read_text()
