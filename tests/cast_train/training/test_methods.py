"""Every method and selector, from the dense model to compressed weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cast_serve.checkpoint.convert import convert
from cast_serve.sparsity.pattern import Pattern
from cast_train import losses
from cast_train.checkpoint import models
from cast_train.checkpoint.compressed import load_compressed
from cast_train.evaluate.perplexity import soft_and_hard
from cast_train.gates import gating
from cast_train.tokens import read_tokens, to_blocks
from cast_train.training.run import train
from tests.cast_train.settings import of_file

# Of 20 steps the gates learn in 8: as many as they need to move the mask.
LEARNS = {"tau_start": 0.5, "tau_end_fraction": 0.3, "hard_fraction": 0.4}
LEARNS |= {"gate_learning_rate": 0.1}
WAYS = [
    {"method": "fixed"},
    {"method": "fixed", "start": "sparsegpt", "scale_parts": 2},
    {"selector": "soft_topk", "start": "ones", "blend_end_fraction": 0.05, "hard_fraction": 0.4},
    {"start": "wanda", **LEARNS},
    {"selector": "gumbel", **LEARNS},
    {"selector": "penalty", "gate_learning_rate": 0.3, "hard_fraction": 0.4},
    {"selector": "generator", **LEARNS},
    {"method": "ste", "hard_fraction": 0.4},
    {"method": "ste", "hard_fraction": 0.4, "start": "magnitude", "scale_parts": 2},
    {"method": "ste", "hard_fraction": 0.4, "start": "sparsegpt"},
    {"method": "adams", "learning_rate": 0.01, "scale_parts": 2},
    {"distillation_weight": 0.5, "accumulation": 2, "is_checkpointed": True},
]
# Of the dense model's perplexity before training. Every way ends at 0.71 to 0.84 of it, with
# learning rates of 0 at 0.99 to 1.01, and with weights that stay while gates learn at 0.90 to 1.01.
LEARNT = 0.88


def config_of(settings_file, **settings):
    return of_file(settings_file, **({"steps": 20} | settings))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(str(v) for v in way.values()))
def test_from_dense_to_compressed(
    way, model_dir, text_file, heldout_file, settings_file, tmp_path, untrained_perplexity
):
    config = config_of(settings_file, **way)
    record = train(model_dir, [text_file], tmp_path / "gated", config, heldout_file=heldout_file)
    found = record["quality"]
    assert found["perplexity_hard"] < LEARNT * untrained_perplexity
    if config.method != "adams" and way.get("selector") != "penalty":  # both prune at the border
        assert found["perplexity_soft"] == pytest.approx(found["perplexity_hard"], rel=1e-2)
    if "hard_fraction" in way or config.method == "adams":
        assert record["gates"]["flipped_share"] > 0  # what ranks the weights has moved

    convert(tmp_path / "gated", tmp_path / "compressed")  # refuses what is not exactly 2:4
    model, gate_map, last = models.load_gated(tmp_path / "gated", torch.float32)
    gating.set_phase(gate_map, last)
    tokens = torch.arange(64).view(2, 32)
    compressed = load_compressed(tmp_path / "compressed", torch.float32)
    assert ("scale_parts" in way) == any(
        key.endswith(".scale") for key in load_file(tmp_path / "gated" / "model.safetensors")
    )
    # A scale is rounded with its weight to bf16 on hardening.
    tolerance = 0.05 if "scale_parts" in way else 1e-4
    torch.testing.assert_close(
        compressed(tokens).logits, model(tokens).logits, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("sparsity", ["1:4", "4:8", "8:16"])
def test_other_patterns_train_and_evaluate(
    sparsity,
    llama_dir,
    text_file,
    heldout_file,
    settings_file,
    tmp_path,
    untrained_llama_perplexity,
):
    config = config_of(settings_file, sparsity=sparsity, start="magnitude")
    record = train(llama_dir, [text_file], tmp_path / "gated", config, heldout_file=heldout_file)
    pattern = Pattern.parse(sparsity)
    assert (record["n"], record["m"]) == (pattern.n, pattern.m)
    model, gate_map, last = models.load_gated(tmp_path / "gated", torch.float32)
    tokens = read_tokens([text_file], models.load_tokenizer(llama_dir))
    soft, hard = soft_and_hard(model, gate_map, last, to_blocks(tokens, 32)[:4])
    assert soft.perplexity == pytest.approx(hard.perplexity, rel=1e-2)
    assert hard.perplexity < LEARNT * untrained_llama_perplexity
    for gate in gate_map.values():
        kept = gate.mask().unflatten(-1, (-1, pattern.m)).sum(-1)
        assert (kept == pattern.n).all()


def test_the_dense_method_is_plain_fine_tuning(
    llama_dir, text_file, heldout_file, settings_file, tmp_path, untrained_llama_perplexity
):
    config = config_of(settings_file, method="dense")
    record = train(llama_dir, [text_file], tmp_path / "out", config, heldout_file=heldout_file)
    assert record["kind"] == models.kind_of(tmp_path / "out") == "dense"
    found = record["quality"]
    assert found["perplexity_soft"] == found["perplexity_hard"]
    assert found["perplexity_hard"] < LEARNT * untrained_llama_perplexity


@pytest.mark.parametrize("method", ["adams", "ste"])
def test_a_resumed_run_of_another_method_is_the_same(
    method, llama_dir, text_file, settings_file, tmp_path, train_until, begun_at
):
    rate = 0.01 if method == "adams" else 3e-3
    config = config_of(settings_file, method=method, learning_rate=rate, scale_parts=2)
    train(llama_dir, [text_file], tmp_path / "whole", config)
    train_until(14, llama_dir, [text_file], tmp_path / "out", config)
    train(llama_dir, [text_file], tmp_path / "out", config, is_resume=True)
    assert begun_at == [None, None, "checkpoint-12"]  # from the start it would end the same
    whole, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_teacher_may_be_distilled_from(
    llama_dir, gpt2_dir, text_file, settings_file, tmp_path
):
    config = config_of(settings_file, steps=4, distillation_weight=1.0)
    own = train(llama_dir, [text_file], tmp_path / "own", config)
    same = train(llama_dir, [text_file], tmp_path / "same", config, teacher_dir=llama_dir)
    other = train(llama_dir, [text_file], tmp_path / "other", config, teacher_dir=gpt2_dir)
    assert own["sha256"] == same["sha256"] != other["sha256"]
    assert "teacher" not in own["source"]
    assert other["source"]["teacher"] == gpt2_dir.name
    with pytest.raises(ValueError, match="teacher"):  # a finished run, but of another teacher
        train(llama_dir, [text_file], tmp_path / "own", config, teacher_dir=gpt2_dir)


def test_a_teacher_of_another_vocabulary_is_refused(llama_dir, text_file, settings_file, tmp_path):
    teacher = tmp_path / "teacher"
    settings = LlamaConfig.from_pretrained(llama_dir)
    settings.vocab_size = 300
    LlamaForCausalLM(settings).save_pretrained(teacher)
    config = config_of(settings_file, steps=4)
    with pytest.raises(ValueError, match="vocabulary of 300 tokens and the model one of 256"):
        train(llama_dir, [text_file], tmp_path / "out", config, teacher_dir=teacher)
    assert not list(tmp_path.glob("out*"))


def test_the_divergence_is_zero_for_equals_and_keeps_its_gradient_with_temperature():
    torch.manual_seed(0)
    teacher = torch.randn(2, 5, 11)
    student = (teacher + 0.01 * torch.randn(2, 5, 11)).requires_grad_()
    assert losses.divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    sizes = []
    for temperature in (1.0, 4.0):
        loss = losses.divergence(student, teacher, temperature)
        (grad,) = torch.autograd.grad(loss, student)
        sizes.append(grad.norm().item())
        assert loss.item() > 0
    assert 0.3 < sizes[1] / sizes[0] < 3
    expected = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(losses.divergence(student, teacher), expected.mean())


def test_a_teacher_of_another_shape_has_no_hidden_states_to_learn_from(
    llama_dir, text_file, settings_file, tmp_path
):
    settings = LlamaConfig.from_pretrained(llama_dir)
    settings.num_hidden_layers = 3
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "teacher")
    config = config_of(settings_file, steps=4, hidden_states_weight=1.0)
    with pytest.raises(ValueError, match="has num_hidden_layers 3 and the model 2; set hidden_"):
        train(llama_dir, [text_file], tmp_path / "out", config, teacher_dir=tmp_path / "teacher")


def test_the_hidden_states_teach_alike_with_checkpointing(
    model_dir, text_file, settings_file, tmp_path
):
    """The gradient reaches every layer also where its activations are made a second time."""
    written = []
    for weight, is_checkpointed in ((0.0, False), (100.0, False), (100.0, True)):
        changes = {"hidden_states_weight": weight, "is_checkpointed": is_checkpointed}
        config = config_of(settings_file, steps=4, method="ste", precision="fp32", **changes)
        out = tmp_path / f"{weight}-{is_checkpointed}"
        train(model_dir, [text_file], out, config)
        written.append(load_file(out / "model.safetensors"))
    without, with_them, checkpointed = written
    moved = [name for name in without if "layers.0" in name or "h.0" in name]
    assert moved
    assert any(not torch.equal(without[name], with_them[name]) for name in moved)
    for name, tensor in with_them.items():
        torch.testing.assert_close(checkpointed[name], tensor, msg=name)


def test_the_distance_of_hidden_states_by_hand():
    theirs = [torch.tensor([[[3.0, 4.0], [0.0, 0.1]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])]
    assert losses.hidden_distance(theirs, theirs).item() == 0
    doubled, nothing = [2 * each for each in theirs], [0 * each for each in theirs]
    assert losses.hidden_distance(doubled, theirs).item() == pytest.approx(0.5)
    assert losses.hidden_distance(nothing, theirs).item() == pytest.approx(0.5)
    ours = [theirs[0], torch.tensor([[[1.0, 3.0], [0.0, 2.0]]])]  # of one of four tokens d is 9
    assert losses.hidden_distance(ours, theirs).item() == pytest.approx(0.9 / 4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_losses_and_their_gradient_are_those_of_the_formula(share, temperature):
    """Plain torch over all logits at once, with 40 tokens of which 32 and 8 are made in turn."""
    logits = torch.randn(2, 20, 50, requires_grad=True)
    teacher, labels = torch.randn(2, 20, 50), torch.randint(50, (2, 20))
    task = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    kl = torch.nn.functional.kl_div(
        (logits / temperature).log_softmax(-1).flatten(0, 1),
        (teacher / temperature).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    expected = (1 - share) * task + share * temperature**2 * kl
    (expected_grad,) = torch.autograd.grad(2 * expected, logits)
    found = losses.losses(logits, labels, teacher, share, temperature)
    torch.testing.assert_close(
        torch.stack(found), torch.stack((expected, task, temperature**2 * kl))
    )
    (grad,) = torch.autograd.grad(2 * found[0], logits)
    torch.testing.assert_close(grad, expected_grad)


def test_without_a_teacher_the_loss_is_that_of_the_model_itself(llama_dir):
    model = models.load_dense(llama_dir, torch.float32)
    blocks = torch.randint(model.config.vocab_size, (3, 16))
    outputs = model(input_ids=blocks, labels=blocks)
    loss, task, distance = losses.losses(outputs.logits, blocks)
    torch.testing.assert_close(loss, outputs.loss)
    assert (task.item(), distance.item()) == (loss.item(), 0)


def test_the_gradient_of_the_divergence_is_that_of_finite_differences():
    torch.manual_seed(0)
    rows = losses.ROWS + 3  # more than are taken at a time
    student = torch.randn(rows, 7, requires_grad=True)
    teacher = torch.randn(rows, 7)
    (grad,) = torch.autograd.grad(3 * losses.divergence(student, teacher, 2.0), student)
    for place in ((0, 0), (5, 3), (rows - 1, 6)):
        step = torch.zeros(rows, 7)
        step[place] = 0.05
        ends = [losses.divergence(student + sign * step, teacher, 2.0) for sign in (1, -1)]
        slope = 3 * (ends[0] - ends[1]).item() / 0.1
        assert grad[place].item() == pytest.approx(slope, rel=0.02, abs=1e-4)


NOT_LEARNT = {"hard_fraction": 0.0, "tau_end_fraction": 0.0, "blend_end_fraction": 0.0}


@pytest.mark.parametrize(
    ("settings", "effective"),
    [
        ({"method": "fixed"}, (False, True, False)),
        ({"method": "gates"}, (True, True, False)),
        ({"method": "gates", "start": "ones"}, (True, False, False)),
        ({"method": "gates", "selector": "penalty"}, (True, False, False)),
        ({"method": "gates", "start": "sparsegpt", **NOT_LEARNT}, (False, True, False)),
        ({"method": "gates", "masks_first": True, **NOT_LEARNT}, (False, True, False)),
        ({"method": "dense"}, (False, False, False)),
        ({"method": "ste", "channel_order": "auto"}, (True, True, True)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_record_says_what_the_settings_came_to(
    settings, effective, llama_dir, text_file, settings_file, tmp_path
):
    """`method` alone does not: gates that are hard from the first step on learn no mask."""
    config = of_file(settings_file, **{"steps": 2, **settings})
    record = train(llama_dir, [text_file], tmp_path / "gated", config)
    names = ("is_mask_learnt", "is_solved", "is_reordered")
    assert record["effective"] == dict(zip(names, effective, strict=True))
