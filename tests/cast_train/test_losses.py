"""The loss that multiplies by the output layer itself, some tokens at a time."""

import math

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from cast_train import losses
from cast_train.passes import ends_in_head
from cast_train.training.run import train
from cast_train.training.trainer import CastTrainer
from tests.cast_train.settings import of_file

VOCABULARY = 50


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made within."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return found


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_some_tokens_at_a_time_are_all_at_once(rows, share, temperature, monkeypatch):
    """With 7 rows of 40 the last part is short, and no part ends where a block does."""
    monkeypatch.setattr(losses, "MOST_LOGITS", rows * VOCABULARY + 1)
    hidden, weight = Parameter(drawn(2, 20, 6)), Parameter(drawn(VOCABULARY, 6))
    their_hidden, their_weight = drawn(2, 20, 9), drawn(VOCABULARY, 9)
    labels = torch.randint(VOCABULARY, (2, 20))
    teacher = {"teacher_hidden": their_hidden, "teacher_weight": their_weight} if share else {}
    logits = hidden @ weight.t()
    their_logits = their_hidden @ their_weight.t() if share else None
    expected = torch.stack(losses.losses(logits, labels, their_logits, share, temperature))
    found = losses.head_losses(
        hidden, weight, labels, share=share, temperature=temperature, **teacher
    )
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found[0], (hidden, weight)),
        torch.autograd.grad(3 * expected[0], (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_more_logits_exist_at_a_time_than_the_limit(monkeypatch):
    monkeypatch.setattr(losses, "MOST_LOGITS", 8 * VOCABULARY)
    arguments = (drawn(2, 20, 6).requires_grad_(), drawn(VOCABULARY, 6))
    labels = torch.randint(VOCABULARY, (2, 20))
    with Largest() as largest:
        losses.head_losses(*arguments, labels, *arguments, 0.5)[0].backward()
    assert largest.numel == 8 * VOCABULARY
    assert losses.rows_of_head(10 * losses.MOST_LOGITS) == 1


def test_in_bf16_products_are_rounded_as_those_of_the_output_layer():
    hidden, weight = Parameter(drawn(2, 20, 6)), drawn(VOCABULARY, 6)
    labels = torch.randint(VOCABULARY, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        expected = losses.losses(torch.nn.functional.linear(hidden, weight), labels)[0]
        found = losses.head_losses(hidden, weight, labels)[0]
    assert found == expected
    ours, theirs = (torch.autograd.grad(each, hidden)[0] for each in (found, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "expected"), [(LlamaConfig, True), (Gemma2Config, False)], ids=["llama", "gemma2"]
)
def test_logits_that_are_changed_after_the_output_layer_are_known(settings, expected):
    small = settings(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    assert ends_in_head(AutoModelForCausalLM.from_config(small)) is expected


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_a_run_learns_the_same_with_few_logits_at_a_time(
    train_embeddings, model_dir, text_file, settings_file, tmp_path, monkeypatch
):
    """As with logits of the model's own forward, and with all at a time."""
    config = of_file(
        settings_file,
        method="fixed",
        steps=3,
        precision="fp32",
        hidden_states_weight=1.0,
        train_embeddings=train_embeddings,
    )
    told = []
    monkeypatch.setattr(
        CastTrainer, "log", lambda self, logs, *more: told.append({**logs, **self.figures})
    )
    ways = {"whole": losses.MOST_LOGITS, "parts": 5 * 256, "logits": None}
    for name, most in ways.items():
        with monkeypatch.context() as patch:
            if most is None:
                patch.setattr("cast_train.training.trainer.ends_in_head", lambda model: False)
            else:
                patch.setattr(losses, "MOST_LOGITS", most)
            train(model_dir, [text_file], tmp_path / name, config)
    steps = [entry for entry in told if "loss" in entry]
    assert len(steps) == 9
    keys = ("loss", "task_loss", "distillation_loss", "hidden_states_loss", "grad_norm")
    for whole, parts, logits in zip(steps[:3], steps[3:6], steps[6:], strict=True):
        for key in keys:
            assert math.isfinite(whole[key])
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
            assert logits[key] == whole[key], key
