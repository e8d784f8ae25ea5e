"""What a run will need, against what a run has."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cast_serve.errors import UsageError
from cast_serve.sparsity.targets import find_targets
from cast_train import attention, losses
from cast_train.__main__ import app
from cast_train.checkpoint import models
from cast_train.config import Dense, Fixed, Gates
from cast_train.gates import gating
from cast_train.losses import hidden_distance
from cast_train.passes import computing
from cast_train.precision import autocast
from cast_train.training.plan import PROGRAM, plan

SMALL: dict[str, Any] = {"block_size": 32, "batch_blocks": 3, "precision": "bf16"}


def parts(found):
    return {part.name: part.num_bytes for part in found.parts}


def kept_bytes(model_dir, config):
    """What a real forward keeps for its backward, without parameters and masks."""
    model = models.load_dense(model_dir, torch.float32).train()
    attention.use_blocks(model)
    targets, _ = find_targets(model, config.pattern)
    gating.attach(targets, dict.fromkeys(targets, config.pattern), method="fixed")
    for each in (model.get_input_embeddings(), model.get_output_embeddings()):
        each.requires_grad_(False)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(config.batch_blocks, config.block_size, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    head = model.get_output_embeddings()
    terms = partial(losses.head_losses, weight=head.weight, labels=ids)
    with autocast(config.precision, "cpu"), hooks, computing(head, terms):
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        states = out.hidden_states[1:]
        loss = out.logits.sum() + hidden_distance(states, [torch.zeros_like(s) for s in states])
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_kept_is_what_a_real_forward_keeps(llama_dir, precision):
    config = Fixed(**{**SMALL, "precision": precision})
    assert parts(plan(llama_dir, config))["activations"] == kept_bytes(llama_dir, config)


def test_every_part_has_its_bytes(words_dir):
    model = models.load_dense(words_dir)
    targets, _ = find_targets(model, Gates(sparsity="32:64").pattern)
    sparse = sum(linear.weight.numel() for linear in targets.values())
    total = sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    found = plan(words_dir, Gates(sparsity="32:64", **SMALL))
    assert (found.num_weights, found.num_sparse) == (total, sparse)
    assert parts(found)["weights"] == 4 * total
    assert parts(found)["moments of AdamW"] == 8 * (total - embeddings)
    assert parts(found)["logits of the gates, and their moment"] == 8 * sparse
    assert parts(found)["dense weights, to solve again"] == 4 * sparse
    assert parts(found)["teacher"] == 2 * total
    assert found.step_bytes == sum(parts(found).values())
    fixed = plan(words_dir, Fixed(sparsity="32:64", **SMALL))
    assert parts(found)["activations"] - parts(fixed)["activations"] == 5 * sparse
    assert parts(fixed)["weights"] == 4 * (total - sparse // 2)
    assert parts(fixed)["moments of AdamW"] == 8 * (total - embeddings - sparse // 2)
    assert parts(fixed)["gradients"] == 4 * (total - embeddings - sparse // 2)
    assert parts(fixed)["masks"] == sparse // 2
    fewer = plan(words_dir, Fixed(sparsity="32:64", zeros=0.25, **SMALL))
    assert parts(fewer)["weights"] == 4 * (total - sparse // 4)
    dense = plan(words_dir, Dense(distillation_weight=0.0, **SMALL))
    assert not {"teacher", "masks"} & {name for name, size in parts(dense).items() if size}


def test_dense_weights_take_what_they_take_on_disk_or_are_the_teachers(words_dir, tmp_path):
    settings = json.loads((words_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    found = plan(tmp_path, Gates(sparsity="32:64", **{**SMALL, "precision": "fp32"}))
    assert parts(found)["dense weights, to solve again"] == 2 * found.num_sparse
    alone = plan(tmp_path, Gates(sparsity="32:64", distillation_weight=0.0, **SMALL))
    assert parts(alone)["dense weights, to solve again"] == 2 * found.num_sparse
    both = plan(tmp_path, Gates(sparsity="32:64", **SMALL))
    assert "dense weights, to solve again" not in parts(both)


def test_processes_share_what_is_sharded(words_dir):
    settings: dict[str, Any] = {"sparsity": "32:64", "is_sharded": True, **SMALL}
    one, four = (plan(words_dir, Gates(**settings), number) for number in (1, 4))
    whole = {"program", "activations", "logits and their gradient", "what is whole at a time"}
    assert set(parts(one)) > whole
    for name in set(parts(one)) - whole:
        assert parts(four)[name] == parts(one)[name] // 4, name
    assert four.start_bytes - PROGRAM == (one.start_bytes - PROGRAM) // 4
    copied = plan(words_dir, Gates(**{**settings, "is_sharded": False}), 4)
    assert parts(copied)["weights"] == parts(one)["weights"]


def test_logits_of_a_large_vocabulary_take_what_some_tokens_of_them_take(llama_dir, monkeypatch):
    config = Fixed(**SMALL)
    whole = parts(plan(llama_dir, config))["logits and their gradient"]
    assert whole == 2 * (96 * 256 * 2 + 256 * 32)  # the model's and the teacher's; the layer, cast
    monkeypatch.setattr(losses, "MOST_LOGITS", 10 * 256)
    some = parts(plan(llama_dir, config))["logits and their gradient"]
    assert some == 2 * (10 * 256 * 2 + 256 * 32)


def test_checkpointing_keeps_less_and_computes_more(words_dir):
    plain, less = (
        plan(words_dir, Gates(sparsity="32:64", is_checkpointed=value, **SMALL))
        for value in (False, True)
    )
    assert parts(less)["activations"] < parts(plain)["activations"]
    assert less.flops > plain.flops


def test_a_step_of_twice_the_tokens_takes_twice_the_operations(llama_dir):
    one = plan(llama_dir, Fixed(**SMALL))
    two = plan(llama_dir, Fixed(**{**SMALL, "batch_blocks": 6}))
    assert two.flops == 2 * one.flops
    # Forward, both backwards and the teacher's forward: 8 operations a weight and token at most.
    assert one.flops < 8 * one.num_weights * one.tokens * 1.5


def test_it_says_what_does_not_fit_and_what_would_help(llama_dir):
    flags = [f"--set={key}={value}" for key, value in SMALL.items()]
    asked = ["plan", "--model", str(llama_dir), "--memory-gb", "1", "--tflops", "2", *flags]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["is_fitting"]
    assert found["step_s"] == found["step_flops"] / 2e12
    assert sum(found["parts_bytes"].values()) == found["step_bytes"]
    done = CliRunner().invoke(app, [*asked, "--memory-gb", "0.5"])
    assert done.exit_code == 1
    assert "GB do not fit in 0.5 GB. To reduce it: " in done.stdout
    assert "is_checkpointed = true" in done.stdout


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no readable config\.json"):
        plan(tmp_path, Fixed())
