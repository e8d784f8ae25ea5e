"""Dense model + text + TrainConfig -> a run's token blocks, model with gates, and teacher."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.checkpoint.declared import Structure
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets, not_by_vllm
from cast_train import attention, sharding
from cast_train.checkpoint import channel_order
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.checkpoint.models import (
    check_same_tokens,
    load_any,
    load_dense,
    sparse_targets,
)
from cast_train.checkpoint.resume import Choices
from cast_train.config import Adams, Gates, Pruned, Ste, TrainConfig
from cast_train.gates import gating, quantizing, scaling
from cast_train.gates.reach import Reach, measure_reach
from cast_train.passes import check_length
from cast_train.precision import arithmetic
from cast_train.pruning.allocate import allocate, kept_of_64
from cast_train.pruning.oneshot import prune
from cast_train.pruning.permute import permute
from cast_train.pruning.reorder import reorder, reorder_residual
from cast_train.pruning.scores import magnitude_scores, wanda_scores, weight_rows
from cast_train.pruning.sparsegpt import sparsegpt_scores
from cast_train.text import read_texts, split_held_out, to_blocks, tokenize
from cast_train.training import adams

logger = logging.getLogger(__name__)

FEW_GAPS = 3  # of which gates with less reach hardly change the mask


@dataclass(frozen=True)
class Blocks:
    """A run's text, int64 [num_blocks, block_size] each.

    Attributes:
        train: trained on.
        calibration: its beginning, which activations are measured on.
        validation: kept out of the training text; `keep_best` chooses by it.
        heldout: what quality is measured on: validation, or a text of its own.
        heldout_name: its description.
    """

    train: Tensor
    calibration: Tensor
    validation: Tensor
    heldout: Tensor
    heldout_name: str


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: fp32, its targets with gates.
        targets: the linears that are, or with ``dense`` would be, 2:4 in the end, by name.
        choices: what was chosen for it: the order of its channels, the linears that stay dense, N
            of N:64.
        gate_map: the targets' gates, by the same names; none with ``dense``.
        start: the mask that each gate starts from, bool, in the weight's layout.
        reach: how far the gates can move from there; None where no logits are to be learnt.
        teacher: the dense model that is distilled from, or None.
    """

    model: Any
    targets: Mapping[str, nn.Module]
    choices: Choices
    gate_map: Mapping[str, gating.Gate]
    start: Mapping[str, Tensor]
    reach: Reach | None
    teacher: Any


def read_blocks(
    text_files: Sequence[Path], heldout_file: Path | None, tokenizer: Any, config: TrainConfig
) -> Blocks:
    """Reads and cuts the texts.

    Raises:
        UsageError: if a file cannot be read or a text is too short.
    """
    heldout_text = read_texts([heldout_file]) if heldout_file else ""
    blocks = to_blocks(tokenize(read_texts(text_files), tokenizer), config.block_size)
    step = config.batch_blocks * config.accumulation * sharding.num_processes()
    train, validation = split_held_out(blocks, config.heldout_blocks, step)
    if config.accumulation > 1:  # else the last step of an epoch would be one of fewer batches
        train = train[: len(train) // step * step]
    calibration = train[: config.calibration_blocks] if isinstance(config, Pruned) else train[:0]
    heldout, name = validation, "held-out split of the training text"
    if heldout_file is not None:
        tokens = tokenize(heldout_text, tokenizer, config.heldout_blocks * config.block_size)
        heldout, name = to_blocks(tokens, config.block_size), heldout_file.name
    return Blocks(train, calibration, validation, heldout, name)


def prepare(
    model_dir: Path,
    teacher_dir: Path | None,
    blocks: Blocks,
    config: TrainConfig,
    choices: Choices | None = None,
) -> Prepared:
    """Loads the model and its teacher, reorders their channels, and puts gates on the targets.

    Args:
        model_dir: dense HF directory; or a pruned or compressed one, whose linears without zeros
            stay dense.
        teacher_dir: dense one to distil from; None: model_dir.
        blocks: the text; the first training blocks calibrate the order and the gates' start.
        config: all settings.
        choices: of the run that is resumed; None: make them.

    Raises:
        UsageError: for every wrong input.
    """
    model = load_any(model_dir, torch.float32)
    # Fail fast: the search takes a minute or more.
    check_length(model, config.block_size, "block_size")
    sparse = sparse_targets(model_dir, config.pattern)
    _check_targets(model, sparse, config, choices)
    order = channel_order.read(model_dir)
    is_auto = isinstance(config, Pruned) and config.channel_order == "auto"
    if order is not None and is_auto:
        logger.info("channel_order auto: %s was reordered before; its order stays", model_dir)
    teacher = teacher_order = None
    if config.distillation_weight:
        teacher_order = channel_order.read(teacher_dir or model_dir)
        if teacher_dir is not None:
            check_same_tokens(teacher_dir, model_dir)
        teacher = _load_teacher(teacher_dir or model_dir, config, model.config)
        if config.hidden_states_weight and teacher_order not in (None, order):
            raise UsageError(
                f"the channel order of the teacher {teacher_dir} differs from that of {model_dir}, "
                "so hidden states cannot be compared; give the dense model that both were made "
                "of, or set hidden_states_weight to 0"
            )

    calibration = blocks.calibration
    if order is None and sparse is None:  # else its channels stay where they are
        if choices is None:
            if is_auto and sharding.rank() == 0:  # the others take its weights below
                model, order = _reordered(model, model_dir, calibration, config)
            order = sharding.in_first(lambda: order)
        elif choices.order is not None:
            order = choices.order
            reorder(model, order)

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
    transposed = {name: t.weight for name, t in targets.items() if gating.is_transposed(t)}
    sharding.check_groups(config, transposed)

    torch.manual_seed(config.seed)  # of the first weights of `generator`
    scores = None
    if sharding.rank() == 0:
        scores = _scores(model, targets, calibration, patterns, config)
    gate_map = with_gates(targets, patterns, scores, config) if isinstance(config, Pruned) else {}
    sharding.take_first(sharding.state_of(model))
    start = {name: gate.mask() for name, gate in gate_map.items()}
    reach = _reach(gate_map, config)
    if not config.train_embeddings:
        _keep_embeddings(model)

    attention.use_blocks(model)
    if teacher is not None:
        if order is not None and teacher_order is None and config.hidden_states_weight:
            _reorder_teacher(teacher, order)
        attention.use_blocks(teacher)
    return Prepared(
        model=model,
        targets=targets,
        choices=Choices(kept_dense, kept_of_64(patterns, config.pattern), order),
        gate_map=gate_map,
        start=start,
        reach=reach,
        teacher=teacher,
    )


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
            "would fill; let them take all linears that have zeros"
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
    return sharding.in_first(
        lambda: allocate(model, targets, config.pattern, calibration, config.zeros)
    )


def _keep_embeddings(model: Any) -> None:
    """Leaves embeddings and output layer as they are."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            module.requires_grad_(False)


def _reach(gate_map: Mapping[str, gating.Gate], config: TrainConfig) -> Reach | None:
    """Measures the gates' reach, and warns where the mask can hardly change."""
    if not isinstance(config, Gates) or config.selector == "generator":
        return None
    if config.first_exact_step == 0:
        return None
    found = measure_reach(gate_map, config)
    if found.reach < FEW_GAPS * found.mean_gap:
        logger.warning(
            "a gate logit moves by %.2g or so in all, and in a group the last kept one is %.2g "
            "above the first dropped one on average: about %.1f%% of the groups can change, so "
            "this trains weights under the start's mask (%s); more steps, a higher hard_fraction "
            "or a higher gate_learning_rate let the mask move",
            found.reach,
            found.mean_gap,
            100 * found.changeable_share,
            config.first_order,
        )
    return found


def with_gates(
    targets: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    scores: Mapping[str, Tensor] | None,
    config: Pruned,
) -> dict[str, gating.Gate]:
    """Gates, and scales or quantisers if asked for; all but config as for `gating.attach`."""
    gate_map = gating.attach(
        targets,
        patterns,
        scores,
        method=config.method,
        selector=config.selector if isinstance(config, Gates) else "soft_topk",
        # The gradients of a step's passes are summed.
        decay=config.decay / config.accumulation if isinstance(config, Ste) else 0.0,
    )
    if config.scale_parts:
        transposed = {name: gate.is_transposed for name, gate in gate_map.items()}
        scaling.attach(targets, config.scale_parts, config.pattern.m, transposed)
    if config.quantization is not None:
        quantizing.attach(targets, gate_map, config.quantization.group)
    return gate_map


def _scores(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    calibration: Tensor,
    patterns: Mapping[str, Pattern],
    config: TrainConfig,
) -> Mapping[str, Tensor] | None:
    """What the gates start from, as `gating.attach` takes it; SparseGPT may move the weights."""
    scores = None
    if isinstance(config, Adams):
        scores = magnitude_scores(targets)
        reach, dropped = adams.check_reach(config, scores)
        if reach < 3 * dropped:
            logger.warning(
                "AdamS can move a dropped weight by %.2g and they are %.2g on average: more steps "
                "or a higher learning_rate would leave less to cut off at the end",
                reach,
                dropped,
            )
    elif config.first_order == "magnitude":
        scores = magnitude_scores(targets)
    elif config.first_order == "wanda":
        scores = wanda_scores(model, targets, calibration)
    elif config.first_order == "sparsegpt":
        dense = {}
        if config.is_solved:
            dense = {name: linear.weight.detach().clone() for name, linear in targets.items()}
        scores = sparsegpt_scores(model, targets, calibration, patterns)
        _restore(targets, dense)  # what is solved takes the order alone
        if isinstance(config, Ste):  # ranks by |W|: what SparseGPT drops starts at 0
            prune(targets, {n: hard_mask(found, patterns[n]) for n, found in scores.items()})
            scores = None
    return scores


@torch.no_grad()
def _restore(targets: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        targets[name].weight.copy_(weight)


def _load_teacher(directory: Path, config: TrainConfig, student: Any) -> Any:
    teacher = load_dense(directory, arithmetic(config.precision)).requires_grad_(False)
    if teacher.config.vocab_size != student.vocab_size:
        raise UsageError(
            f"the teacher {directory} has a vocabulary of {teacher.config.vocab_size} tokens and "
            f"the model one of {student.vocab_size}; only a teacher with the model's own tokenizer "
            "can be distilled from"
        )
    for name in ("num_hidden_layers", "hidden_size"):
        found, wanted = getattr(teacher.config, name), getattr(student, name)
        if config.hidden_states_weight and found != wanted:
            raise UsageError(
                f"the teacher {directory} has {name} {found} and the model {wanted}; set "
                "hidden_states_weight to 0 for a teacher of another shape"
            )
    return teacher.eval()


def _reorder_teacher(teacher: Any, order: ChannelOrder) -> None:
    """Reorders its hidden states as the model's are, so that they can be compared."""
    try:
        reorder_residual(teacher, order)
    except UsageError as error:
        raise UsageError(
            f"the teacher cannot be reordered as the model was: {error}; set channel_order to "
            "given, or hidden_states_weight to 0"
        ) from error
