"""A model's configuration + TrainConfig -> a process's bytes in a step, before weights are read.

Nothing of the model's size is allocated: the model and one forward are made of torch's fake
tensors, which have shapes and dtypes only. What the forward keeps for its backward is so what the
real one keeps. Not counted are what the C library does not hand back, and on GPUs the libraries'
own memory.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.targets import find_targets
from cast_train import attention
from cast_train.config import Adams, Fixed, Gates, Pruned, Ste, TrainConfig
from cast_train.gates.gating import FixedGate
from cast_train.losses import head_losses, hidden_distance, rows_of_head
from cast_train.passes import computing, ends_in_head
from cast_train.precision import arithmetic, autocast

PROGRAM = 600_000_000  # Python, torch and transformers, measured


@dataclass(frozen=True)
class Part:
    """Some of a process's memory.

    Attributes:
        num_bytes: in one process.
        remedy: a setting that would make it less; empty: none would.
    """

    name: str
    num_bytes: int
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    """What a step takes.

    Attributes:
        parts: held together at the peak of a step.
        start_bytes: held before the first step.
        num_weights: parameters of the model.
        num_sparse: those of them that become sparse.
        flops: of a step of one process, teacher and backward with it.
        tokens: of a step of one process.
    """

    parts: Sequence[Part]
    start_bytes: int
    num_weights: int
    num_sparse: int
    flops: int
    tokens: int

    @property
    def step_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return max(self.step_bytes, self.start_bytes)

    def remedy(self) -> str:
        """What would make it less, by the largest parts first."""
        largest = sorted(self.parts, key=lambda part: -part.num_bytes)
        return "; ".join(dict.fromkeys(part.remedy for part in largest if part.remedy))


def plan(model: str | Path, config: TrainConfig, num_processes: int = 1) -> Plan:
    """Plans a run of equal processes.

    Args:
        model: HF directory, or a name on a hub; only its config.json is read.
        config: all settings.
        num_processes: at least 1; with `is_sharded` they share all that is of the weights' size.

    Raises:
        CheckpointError: if config.json cannot be read.
        UsageError: if nothing can be a target.
    """
    try:
        settings = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no readable config.json: {error}") from error
    dtype, stored = arithmetic(config.precision), settings.dtype or torch.float32
    shape = (config.batch_blocks, config.block_size)
    tokens = shape[0] * shape[1]
    with FakeTensorMode():
        fake = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).train()
        attention.use_blocks(fake, is_fake=True)
        targets, _ = find_targets(fake, config.pattern, config.include, config.exclude)
        if not config.train_embeddings:
            for each in (fake.get_input_embeddings(), fake.get_output_embeddings()):
                each.requires_grad_(False)
        num_weights = sum(p.numel() for p in fake.parameters())
        trained = sum(p.numel() for p in fake.parameters() if p.requires_grad)
        sparse = 0
        if isinstance(config, Pruned):
            sparse = sum(each.weight.numel() for each in targets.values())
            for linear in targets.values():
                if isinstance(linear, nn.Linear):
                    mask = torch.empty(linear.weight.shape, dtype=torch.bool)
                    FixedGate(mask, config.pattern).register_on(linear)
        with autocast(config.precision, "cpu"):
            has_plain_head = ends_in_head(fake)
        kept, flops = _kept_and_flops(fake, shape, config, has_plain_head)
        if isinstance(config, Gates) and config.first_exact_step > 0:
            # p, which the penalty leaves out, and logits that are no parameters.
            computed = 4 * (config.selector == "generator")
            kept += (4 + bool(config.penalty_weight) + computed) * sparse
        if config.is_checkpointed:  # then one layer at a time is computed again, gates and all
            fake.gradient_checkpointing_enable()
            between, flops = _kept_and_flops(fake, shape, config, has_plain_head)
            kept = between + (kept - between) // settings.get_text_config().num_hidden_layers
    vocabulary = settings.get_text_config().vocab_size
    has_teacher = config.distillation_weight > 0
    share = num_processes if config.is_sharded else 1
    shard = "" if config.is_sharded else "is_sharded = true, with more processes"
    # Beside the mask that they started from, copied gates of ste keep the one of the step.
    has_two = isinstance(config, Ste) and not config.is_sharded
    masks = 2 if has_two else 1 if sparse else 0
    if has_plain_head:
        head = fake.get_output_embeddings().weight
        logits = min(tokens, rows_of_head(vocabulary)) * vocabulary * (2 if has_teacher else 1)
        logits += head.numel() if dtype != head.dtype else 0  # the copy that is multiplied with
    else:
        logits = tokens * vocabulary * (3 if has_teacher else 2)
    activations = "is_checkpointed = true, or a smaller batch_blocks"
    held = (4 + dtype.itemsize * has_teacher) * num_weights + masks * sparse
    if isinstance(config, Pruned) and not isinstance(config, Fixed):
        held += 4 * sparse * (2 if config.is_solved_again else 1)
    dropped = 0  # weights that are not there while it trains
    if isinstance(config, Fixed) and not config.is_sharded:
        dropped = round(sparse * (config.pattern.zeros if config.zeros == 1 else config.zeros))
    gradients = 4 * (trained - dropped) // share
    parts = [
        Part("program", PROGRAM),
        Part("weights", 4 * (num_weights - dropped) // share, shard),
        Part("moments of AdamW", 8 * (trained - dropped) // share, shard),
    ]
    if isinstance(config, Gates):
        parts.append(Part("logits of the gates, and their moment", 8 * sparse // share, shard))
        gradients += 4 * sparse // share
        if config.is_solved_again and not (has_teacher and dtype == stored):  # else the teacher's
            dense = stored.itemsize * sparse // share
            parts.append(Part("dense weights, to solve again", dense, "method = fixed"))
    elif isinstance(config, Ste | Adams):
        parts.append(Part("scores", 4 * sparse // share, shard))
    # Where weights are dropped, a byte for each of the others.
    parts.append(Part("masks", (masks * sparse - dropped) // share))
    if has_teacher:
        teacher = dtype.itemsize * num_weights // share
        parts.append(Part("teacher", teacher, "distillation_weight = 0"))
    if config.is_sharded:
        gates = sparse if isinstance(config, Gates) else 0
        of_teacher = dtype.itemsize if has_teacher and has_plain_head else 0
        whole = _whole_bytes(fake, num_weights, gates, of_teacher)
        parts.append(Part("what is whole at a time", whole))
    # A backward frees the one while it makes the other, but on a CPU in another thread, and so in
    # another arena of the C library, which both keep what was freed.
    parts.append(Part("activations", kept, activations))
    of_logits = logits * dtype.itemsize
    parts.append(Part("logits and their gradient", of_logits, "a smaller batch_blocks"))
    parts.append(Part("gradients", gradients, shard))
    return Plan(parts, PROGRAM + held // share, num_weights, sparse, flops, tokens)


def _whole_bytes(model: Any, num_weights: int, num_gates: int, of_teacher: int) -> int:
    """What a process has whole of a sharded model: embeddings, head and last norm, and the
    teacher's, of so many bytes each; in a backward one decoder layer, the next one, which is
    fetched meanwhile, and a layer's gradients."""
    layers = [each for each in model.modules() if type(each).__name__ in model._no_split_modules]
    parameters = [p for layer in layers for p in layer.parameters() if p.is_floating_point()]
    in_layers = sum(p.numel() for p in parameters)
    around = (4 + of_teacher) * (num_weights - in_layers)
    return around + 3 * 4 * (in_layers + num_gates) // max(len(layers), 1)


def _kept_and_flops(
    model: Any, shape: tuple[int, int], config: TrainConfig, has_plain_head: bool
) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward, without parameters and masks; and the operations
    of a step, with the teacher's forward."""
    own = {_storage(each) for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    ids = torch.zeros(shape, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(counter)
        stack.enter_context(autocast(config.precision, "cpu"))
        has_hidden = config.distillation_weight > 0 and config.hidden_states_weight > 0
        head = model.get_output_embeddings()
        if has_plain_head:
            terms = partial(head_losses, weight=head.weight, labels=ids)
            stack.enter_context(computing(head, terms))
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(input_ids=ids, use_cache=False, output_hidden_states=has_hidden)
            loss = out.logits.sum()
            if has_hidden:
                states = out.hidden_states[1:]
                loss = loss + hidden_distance(states, [torch.empty_like(each) for each in states])
        forward = counter.get_total_flops()
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        loss.backward()
    teacher = forward if config.distillation_weight else 0
    if teacher and has_plain_head:  # whose backward is in the forward
        teacher -= 2 * ids.numel() * head.weight.numel() * (1 + head.weight.requires_grad)
    return num_bytes, counter.get_total_flops() + teacher


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor has; fake ones have no address."""
    return int(tensor.untyped_storage()._cdata)
