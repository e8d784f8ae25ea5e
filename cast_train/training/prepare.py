"""Dense model + token blocks + TrainConfig -> a model with gates, and its teacher."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.checkpoint.declared import Structure
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern
from cast_serve.sparsity.targets import find_targets, not_by_vllm
from cast_train import attention, memory, sharding
from cast_train.checkpoint import channel_order
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.checkpoint.models import load_any
from cast_train.checkpoint.resume import Choices
from cast_train.config import Adams, Pruned, TrainConfig
from cast_train.gates import gating, scaling
from cast_train.gates.reach import Reach, measure_reach
from cast_train.passes import check_length
from cast_train.pruning.allocate import allocate, kept_of_64
from cast_train.pruning.permute import permute
from cast_train.pruning.reorder import reorder
from cast_train.pruning.scores import weight_rows
from cast_train.training import adams
from cast_train.training.blocks import Blocks
from cast_train.training.start import start_gates
from cast_train.training.teacher import load_teacher, reorder_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: fp32, its targets with gates.
        targets: the linears that are, or with ``dense`` would be, sparse in the end, by name.
        choices: what was chosen for it: the order of its channels, the linears that stay dense, N
            of N:64.
        gate_map: the targets' gates, by the same names; none with ``dense``.
        start: the mask that each gate starts from, bool; of a fixed one none.
        dense: the targets' dense weights by name, [out_features, in_features], where they are
            solved again for a mask that was learnt; else none. Where the model is sharded, of this
            process's rows, as `start` is.
        reach: how far the gates can move from there; None where no logits are to be learnt.
        teacher: the dense model that is distilled from, or None.
    """

    model: Any
    targets: Mapping[str, nn.Module]
    choices: Choices
    gate_map: Mapping[str, gating.Gate]
    start: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    reach: Reach | None
    teacher: Any

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The targets' patterns, as learnt so far; of ``dense`` none."""
        return {name: gate.pattern for name, gate in self.gate_map.items()}


def prepare(
    model_dir: Path,
    sparse: Mapping[str, Pattern] | None,
    teacher_dir: Path | None,
    blocks: Blocks,
    config: TrainConfig,
    choices: Choices | None = None,
) -> Prepared:
    """Loads the model and its teacher, reorders their channels, and puts gates on the targets.

    Args:
        model_dir: dense HF directory; or a pruned or compressed one, whose linears without zeros
            stay dense.
        sparse: of `sparse_targets`; None: it is dense.
        teacher_dir: dense one to distil from; None: model_dir.
        blocks: the text; the first training blocks calibrate the order and the gates' start.
        config: all settings.
        choices: of the run that is resumed; None: make them.

    Raises:
        UsageError: for every wrong input.
    """
    model = load_any(model_dir, torch.float32, is_sharded=config.is_sharded)
    # Fail fast: the search takes a minute or more.
    check_length(model, config.block_size, "block_size")
    _check_targets(model, sparse, config, choices)
    teacher = None
    if config.distillation_weight:
        teacher = load_teacher(teacher_dir, model_dir, model.config, config)
    calibration = blocks.calibration
    model, order = _in_order(model, model_dir, sparse, calibration, choices, config)
    attention.use_blocks(model)
    if teacher is not None and order is not None and config.hidden_states_weight:
        reorder_teacher(teacher, teacher_dir or model_dir, order)

    targets, dense = find_targets(model, config.pattern, config.include, config.exclude)
    if choices is not None:
        structure = Structure(config.pattern, choices.kept_of_64)
        patterns = {n: structure.of(n) for n in targets if n not in choices.kept_dense}
    else:
        patterns = _choose_patterns(model, targets, sparse, calibration, config)
    kept_dense = [name for name in targets if name not in patterns]
    targets = {name: targets[name] for name in patterns}
    if reason := not_by_vllm(targets, [*dense, *kept_dense]):
        logger.warning("%s: %s", model_dir, reason)

    dense_weights = {}
    if config.is_solved_again:
        dense_weights = {name: _dense(name, targets[name], teacher) for name in targets}
    is_resumed = choices is not None
    model, targets, gate_map = start_gates(
        model, targets, calibration, patterns, config, is_resumed
    )
    if not config.train_embeddings:
        _keep_embeddings(model)
    attention.use_blocks(model)
    if teacher is not None:
        attention.use_blocks(teacher)
    if not config.is_sharded:
        gating.drop(gate_map)
        memory.hand_back()
    return Prepared(
        model=model,
        targets=targets,
        choices=Choices(kept_dense, kept_of_64(patterns, config.pattern), order),
        gate_map=gate_map,
        start={
            name: gate.mask(sharding.local)
            for name, gate in gate_map.items()
            if not isinstance(gate, gating.FixedGate)
        },
        dense=dense_weights,
        reach=measure_reach(gate_map, config),
        teacher=teacher,
    )


def _dense(name: str, linear: nn.Module, teacher: Any) -> Tensor:
    """A linear's weight, which `solve_again` starts from: the teacher's own where it is the same.

    Else a copy, in bf16 where that holds it exactly, as of most models it does.
    """
    weight = weight_rows(linear)
    if teacher is not None:
        with contextlib.suppress(AttributeError):  # a teacher of another shape
            theirs = sharding.local(teacher.get_submodule(name).weight.detach())
            if torch.equal(theirs.float(), weight):
                return theirs
    rounded = weight.to(torch.bfloat16)
    return rounded if torch.equal(rounded.float(), weight) else weight.clone()


def _check_targets(
    model: Any, sparse: Mapping[str, Pattern] | None, config: TrainConfig, choices: Choices | None
) -> None:
    """Refuses targets that cannot be trained as the settings say.

    Those that are yet to be chosen to stay dense, for `zeros`, are looked at too.

    Raises:
        UsageError: naming the first.
    """
    targets, _ = find_targets(model, config.pattern, config.include, config.exclude)
    head = model.get_output_embeddings()
    if heads := [name for name, linear in targets.items() if linear is head]:
        raise UsageError(
            f"include names {heads[0]}, the output layer, which cannot be trained to a pattern "
            "here; leave it out"
        )
    if left_out := sorted(set(sparse or ()) - set(targets)):
        raise UsageError(
            f"include and exclude leave out {left_out[0]}, which has zeros already that training "
            "would fill; let them cover all linears that have zeros"
        )
    kept_dense = choices.kept_dense if choices is not None else ()
    rows_of = {
        name: weight_rows(linear).detach()
        for name, linear in targets.items()
        if name not in kept_dense and (sparse is None or name in sparse)
    }
    if isinstance(config, Pruned) and config.scale_parts:
        scaling.check_parts(rows_of, config.scale_parts, config.pattern.m)
    if isinstance(config, Adams):
        adams.check_reach(config, rows_of)


def _in_order(
    model: Any,
    model_dir: Path,
    sparse: Mapping[str, Pattern] | None,
    calibration: Tensor,
    choices: Choices | None,
    config: TrainConfig,
) -> tuple[Any, ChannelOrder | None]:
    """The model with its channels as they are to be trained, and their order.

    An order that is searched for is applied in the first process alone; the others take its weights
    once all have gates.

    Returns:
        the model, and the order seen from the dense model; None: the channels are as they were.
    """
    given = channel_order.read(model_dir)
    is_auto = isinstance(config, Pruned) and config.channel_order == "auto"
    if given is not None and is_auto:
        logger.info("channel_order auto: %s was already reordered; keeping its order", model_dir)
    if given is not None or sparse is not None:  # zeros stay where they are
        return model, given
    if choices is not None:
        if choices.order is not None:
            reorder(model, choices.order)
        return model, choices.order
    order = None
    if is_auto and config.is_sharded:
        logger.warning(
            "channel_order auto: keeping the given channel order: the search needs an unsharded "
            "model; run cast-train permute first"
        )
        return model, None
    if is_auto and sharding.rank() == 0:
        model, order = _reordered(model, model_dir, calibration, config)
    return model, sharding.in_first(lambda: order)


def _reordered(
    model: Any, model_dir: Path, calibration: Tensor, config: TrainConfig
) -> tuple[Any, ChannelOrder | None]:
    """A dense model in the order in which pruning costs least, and that order.

    None: no other order could be found, and the channels are as they were.
    """
    try:
        order, shares = permute(
            model, calibration, config.pattern, include=config.include, exclude=config.exclude
        )
    except UsageError as reason:
        logger.warning("channel_order auto: keeping the given channel order: %s", reason)
        return load_any(model_dir, torch.float32), None  # it may have been changed
    kept = ", ".join(f"{kind} {old:.3f}, now {new:.3f}" for kind, (old, new) in shares.items())
    logger.info(
        "channels reordered; share of the squared scores that %s keeps: %s", config.pattern, kept
    )
    return model, order


def _choose_patterns(
    model: Any,
    targets: Mapping[str, nn.Module],
    sparse: Mapping[str, Pattern] | None,
    calibration: Tensor,
    config: TrainConfig,
) -> dict[str, Pattern]:
    """The targets' patterns; what could be a target and stays dense is left out."""
    if not isinstance(config, Pruned):
        return dict.fromkeys(targets, config.pattern)
    if sparse is not None:  # what has zeros keeps its own
        return {name: sparse[name] for name in targets if name in sparse}

    def choose() -> dict[str, Pattern]:
        return allocate(model, targets, config.pattern, calibration, config.zeros, config.precision)

    if not config.is_sharded:
        return sharding.in_first(choose)
    chosen = choose()  # which takes every process
    return sharding.in_first(lambda: chosen)


def _keep_embeddings(model: Any) -> None:
    """Leaves embeddings and output layer as they are."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            module.requires_grad_(False)
