"""Dense model + text + TrainConfig -> a gated checkpoint: the life of a training run.

Text -> blocks -> gates on the dense model -> steps (CastTrainer's loop, checkpoints in
OUT.partial/) -> bf16 -> quality of the soft and the hard model -> gates off -> OUT, whole.
"""

import dataclasses
import logging
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from cast_serve.sparsity.targets import find_targets
from cast_train import sharding
from cast_train.checkpoint import identity, models, resume
from cast_train.checkpoint.models import load_dense, load_tokenizer
from cast_train.config import TrainConfig
from cast_train.evaluate import quality
from cast_train.gates import gating, scaling
from cast_train.gates.schedules import phase_at
from cast_train.pruning import oneshot
from cast_train.text import TokenBlocks, read_texts, split_held_out, to_blocks, tokenize
from cast_train.training import adams
from cast_train.training.trainer import CastTrainer, Watch, tokens_per_step

logger = logging.getLogger(__name__)


def train(
    model_dir: Path,
    text_files: Sequence[Path],
    out: Path,
    config: TrainConfig,
    is_resume: bool = False,
    heldout_file: Path | None = None,
    tensorboard_dir: Path | None = None,
    teacher_dir: Path | None = None,
) -> dict[str, Any]:
    """Trains and writes a gated checkpoint.

    Args:
        model_dir: dense HF directory.
        text_files: UTF-8 training text.
        out: the checkpoint's directory; OUT.partial beside it holds resumable state until the end,
            see resume.py.
        config: all settings.
        is_resume: go on from OUT.partial if it is there; start if it is not.
        heldout_file: text to measure quality on; None: blocks kept out of the training text.
        tensorboard_dir: where TensorBoard's files go; None: none are written.
        teacher_dir: dense HF directory of the same vocabulary to distil from; None: model_dir.

    Returns:
        cast.json's content. If out is already the result of this very run, of the same settings
        and of files with the same sha256 (see identity.py), it is verified and returned, and
        nothing is trained.

    Raises:
        ValueError: for every wrong input; nothing is written then.
        CheckpointError: if out or OUT.partial is another run's; it names what differs.
        DivergedError: if the loss is not finite.
    """
    tokenizer = load_tokenizer(model_dir)
    blocks = to_blocks(tokenize(read_texts(text_files), tokenizer), config.block_size)
    blocks, heldout = split_held_out(blocks, config.heldout_blocks, config.batch_blocks)
    validation = heldout
    if heldout_file is not None:
        tokens = tokenize(
            read_texts([heldout_file]), tokenizer, config.heldout_blocks * config.block_size
        )
        heldout = to_blocks(tokens, config.block_size)
    own = {
        "config": config.as_dict(),
        "source": identity.of_inputs(model_dir, text_files, heldout_file, teacher_dir),
    }
    if out.exists():
        return _finished(out, own)
    partial = out.with_name(out.name + ".partial")
    resume_from = resume.find(partial, own, is_resume, is_first=_rank() == 0)

    model = load_dense(model_dir, torch.float32)
    targets, _ = find_targets(model, config.pattern, config.include, config.exclude)
    if config.is_sharded:
        transposed = {n: t.weight for n, t in targets.items() if gating.is_transposed(t)}
        sharding.check(config, int(os.environ.get("WORLD_SIZE", 1)), transposed)
    gate_map = _attach(model, targets, blocks, config)
    start = {name: gate.mask().bool() for name, gate in gate_map.items()}
    if not config.train_embeddings:
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embedding is not None:
                embedding.requires_grad_(False)
    teacher = None
    if config.distillation_weight:
        teacher = _load_teacher(teacher_dir or model_dir, config, model.config.vocab_size)

    if _rank() == 0:
        resume.begin(partial, own)
    trainer = CastTrainer(
        config=config,
        gate_map=gate_map,
        targets=targets,
        teacher=teacher,
        model=model,
        args=_arguments(partial, config),
        train_dataset=TokenBlocks(blocks),
        eval_dataset=TokenBlocks(validation),
    )
    if teacher is not None:
        teacher.to(trainer.args.device)
    watch = Watch(trainer, heldout, start)
    trainer.add_callback(watch)
    if tensorboard_dir is not None:
        trainer.add_callback(_tensorboard(tensorboard_dir))
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    last = phase_at(config.steps, config)
    if config.is_sharded:
        model, targets, gate_map = _gathered(trainer.model, gate_map, model_dir, config)
    _round_as_stored(model, gate_map)
    if config.method == "adams":  # the others came to rest on their way
        gating.come_to_rest(gate_map)
    record = {
        "kind": "dense" if config.method == "dense" else "gated",
        "method": config.method,
        "n": config.pattern.n,
        "m": config.pattern.m,
        "targets": list(targets),
        "selector": config.selector,
        "schedules_end": dataclasses.asdict(last),
        "steps": config.steps,
        "best_step": trainer.state.best_global_step,
        "tokens_seen": tokens_per_step(config, trainer.args.world_size) * config.steps,
        "step_s": statistics.median(watch.step_s) if watch.step_s else None,
        "curve": [
            {"tokens": int(entry["tokens"]), "perplexity": entry["heldout_perplexity"]}
            for entry in trainer.state.log_history
            if "heldout_perplexity" in entry
        ],
        "gates": dataclasses.asdict(gating.statistics(gate_map, last, start)),
        "quality": _quality(model, gate_map, heldout, config, heldout_file),
        **own,
    }
    tensors = gating.detach(targets) if gate_map else {}
    if trainer.is_world_process_zero():
        model.to(torch.bfloat16)
        record = models.write(out, model, tokenizer, record, tensors)
        shutil.rmtree(partial)
    return record


def _load_teacher(directory: Path, config: TrainConfig, vocabulary: int) -> Any:
    teacher = load_dense(directory, quality.arithmetic(config.precision)).requires_grad_(False)
    if teacher.config.vocab_size != vocabulary:
        raise ValueError(
            f"the teacher {directory} has a vocabulary of {teacher.config.vocab_size} tokens and "
            f"the model one of {vocabulary}; only a teacher with the model's own tokenizer can be "
            "distilled from"
        )
    return teacher.eval()


def _tensorboard(folder: Path) -> TrainerCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard; install it with: pip install tensorboard"
        ) from error
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def _rank() -> int:
    """This process's number under torchrun, known before torch has joined the others."""
    return int(os.environ.get("RANK", 0))


def _finished(out: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that is done already."""
    record = models.verify(out)
    remedy = "choose another --out or remove it"
    identity.check(record, own, f"{out} exists and is another run", remedy)
    logger.info("%s is the finished result of this run; nothing to do", out)
    return record


def _attach(
    model: nn.Module, targets: Mapping[str, nn.Module], blocks: Tensor, config: TrainConfig
) -> dict[str, gating.Gate]:
    """Gates, and scales if asked for, on the targets."""
    if config.method == "dense":
        return {}
    scores = None
    if config.method == "adams":
        scores = oneshot.magnitude_scores(targets)
        reach, dropped = adams.check_reach(config, scores)
        if reach < 3 * dropped:
            logger.warning(
                "AdamS can move a dropped weight by %.2g and they are %.2g on average: more steps "
                "or a higher learning_rate would leave less to cut off at the end",
                reach,
                dropped,
            )
        if config.weight_decay:  # a study has one for all its ways, so it is no error
            logger.warning(
                "weight_decay %g is not applied: AdamS decays what the mask drops, by decay %g",
                config.weight_decay,
                config.decay,
            )
    elif config.first_order == "magnitude":
        scores = oneshot.magnitude_scores(targets)
    elif config.first_order == "wanda":
        scores = oneshot.wanda_scores(model, targets, blocks[: config.calibration_blocks])
    elif config.first_order == "sparsegpt":
        scores = oneshot.sparsegpt_scores(
            model, targets, blocks[: config.calibration_blocks], config.pattern
        )
    return _with_gates(targets, scores, config)


def _with_gates(
    targets: Mapping[str, nn.Module], scores: Mapping[str, Tensor] | None, config: TrainConfig
) -> dict[str, gating.Gate]:
    gate_map = gating.attach(
        targets,
        config.pattern,
        scores,
        method=config.method,
        selector=config.selector,
        decay=config.decay,
    )
    if config.scale_parts:
        transposed = {name: gate.is_transposed for name, gate in gate_map.items()}
        scaling.attach(targets, config.scale_parts, config.pattern.m, transposed)
    return gate_map


def _gathered(
    sharded: nn.Module, gate_map: Mapping[str, gating.Gate], model_dir: Path, config: TrainConfig
) -> tuple[Any, dict[str, nn.Module], dict[str, gating.Gate]]:
    """The trained model, whole again in every process, with its targets and gates."""
    state = sharding.whole_state(sharded)
    model = load_dense(model_dir, torch.float32)
    targets, _ = find_targets(model, config.pattern, config.include, config.exclude)
    whole = {} if config.method == "dense" else _with_gates(targets, None, config)
    model.load_state_dict(state)
    for name, gate in whole.items():
        gate.is_at_rest = gate_map[name].is_at_rest
    return model, targets, whole


@torch.no_grad()
def _round_as_stored(model: nn.Module, gate_map: Mapping[str, gating.Gate]) -> None:
    """Rounds all weights to bf16, so that what is measured is what is written."""
    stored_exactly = {id(p) for gate in gate_map.values() for p in gate.parameters()}
    for module in model.modules():
        if isinstance(module, scaling.ColumnScale):
            stored_exactly.add(id(module.scale))
    for parameter in model.parameters():
        if id(parameter) not in stored_exactly:
            parameter.copy_(parameter.to(torch.bfloat16))


def _quality(
    model: nn.Module,
    gate_map: Mapping[str, gating.Gate],
    heldout: Tensor,
    config: TrainConfig,
    heldout_file: Path | None,
) -> dict[str, Any]:
    """Perplexity of the soft and the hard model."""
    last = phase_at(config.steps, config)
    with quality.autocast(config.precision, next(model.parameters()).device.type):
        soft, hard = quality.soft_and_hard(model, gate_map, last, heldout)
    return {
        "text": heldout_file.name if heldout_file else "held-out split of the training text",
        "perplexity_soft": soft.perplexity,
        "perplexity_hard": hard.perplexity,
        "num_tokens": hard.num_tokens,
        "context_tokens": hard.context_tokens,
    }


def _arguments(partial: Path, config: TrainConfig) -> TrainingArguments:
    is_distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return TrainingArguments(
        output_dir=str(partial),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_blocks,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.is_checkpointed,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_fraction * config.steps),
        max_grad_norm=config.max_grad_norm,
        fsdp=config.is_sharded or None,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        per_device_eval_batch_size=config.batch_blocks,
        eval_strategy="steps" if config.keep_best else "no",
        eval_steps=config.evaluate_every or None,
        load_best_model_at_end=config.keep_best,
        metric_for_best_model="eval_loss" if config.keep_best else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if is_distributed and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=True,  # gates at rest get no gradient
    )
