"""Dense model + text + TrainConfig -> a gated checkpoint: the steps of a training run.

check    outputs, settings and optional packages, before anything is read or fetched
read     text -> blocks; the inputs' identity -> is this run finished, new, or to be resumed?
prepare  gates on the dense model, the teacher (prepare.py)
fit      CastTrainer's steps, checkpoints in OUT.partial/
measure  bf16 -> quality of the soft and the hard model
write    gates removed -> OUT, complete or not at all
"""

import dataclasses
import logging
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import (
    CAST_JSON,
    CheckpointError,
    check_new,
    check_writable,
    read_record,
    verify,
)
from cast_serve.sparsity.pattern import PatternError
from cast_train import sharding
from cast_train.checkpoint import identity, models, resume
from cast_train.checkpoint.models import load_tokenizer
from cast_train.config import TrainConfig
from cast_train.evaluate.perplexity import NotFiniteError, soft_and_hard
from cast_train.gates import gating, quantizing, scaling
from cast_train.gates.schedules import first_exact_step, first_quantized_step, phase_at
from cast_train.origin import origin
from cast_train.precision import autocast
from cast_train.text import TokenBlocks
from cast_train.training import progress
from cast_train.training.prepare import Blocks, Prepared, prepare, read_blocks, with_gates
from cast_train.training.stopping import Checkpoints, StoppedError
from cast_train.training.trainer import (
    CastTrainer,
    DivergedError,
    ExactMask,
    QuantizedStart,
    Watch,
    tokens_per_step,
)

logger = logging.getLogger(__name__)
ANOTHER_OUT = "choose another --out or remove it"
WAIT_S = 24 * 3600  # of the other processes, while the first searches, solves or quantises


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
        model_dir: dense HF directory, or a pruned or compressed one to be trained further, or its
            name on a hub.
        text_files: UTF-8 training text.
        out: the checkpoint's directory; OUT.partial beside it holds resumable state until the end,
            see resume.py.
        config: all settings.
        is_resume: continue from OUT.partial if it is there; start if it is not.
        heldout_file: text to measure quality on; None: blocks kept out of the training text.
        tensorboard_dir: where TensorBoard's files go; None: OUT.tensorboard, if `report_to` asks
            for them.
        teacher_dir: dense HF directory of the same vocabulary to distil from; None: model_dir.

    Returns:
        cast.json's content. If out is already the result of this run (the same settings, and files
        with the same sha256, see identity.py), it is verified and returned, and nothing is trained.

    Raises:
        ValueError: for every wrong input; nothing is written then.
        CheckpointError: if out or OUT.partial is another run's; it names what differs.
        DivergedError: if the loss, or the trained model's output, is not finite.
        StoppedError: if the run was asked to stop, by a signal (stopping.py), and is saved.
    """
    began = origin(config.precision)
    if config.report_to == "tensorboard" and tensorboard_dir is None:
        tensorboard_dir = out.with_name(out.name + ".tensorboard")
    partial = out.with_name(out.name + ".partial")
    progress.warn_of_unused(config, teacher_dir)
    _check_outputs(out, partial, config, is_resume, tensorboard_dir)
    model_dir = hub.fetch(model_dir)
    teacher_dir = hub.fetch(teacher_dir) if teacher_dir else None
    _check_models(model_dir, teacher_dir, config)
    tokenizer = load_tokenizer(model_dir)
    blocks = read_blocks(text_files, heldout_file, tokenizer, config)
    source = identity.of_inputs(model_dir, text_files, heldout_file, teacher_dir)
    identity.check_texts(source)
    run_identity = {
        "config": config.as_dict(),
        "num_processes": sharding.num_processes(),
        "source": source,
    }
    if out.exists():
        return _finished(out, partial, run_identity)
    with resume.held(partial, is_first=sharding.rank() == 0):
        return _train(
            *(model_dir, teacher_dir, blocks, tokenizer, out, partial, config),
            run_identity=run_identity,
            is_resume=is_resume,
            tensorboard_dir=tensorboard_dir,
            began=began,
        )


def _train(
    model_dir: Path,
    teacher_dir: Path | None,
    blocks: Blocks,
    tokenizer: Any,
    out: Path,
    partial: Path,
    config: TrainConfig,
    *,
    run_identity: Mapping[str, Any],
    is_resume: bool,
    tensorboard_dir: Path | None,
    began: Mapping[str, Any],
) -> dict[str, Any]:
    """As `train`, once the inputs are read and OUT.partial is held."""
    resume_from = resume.find(partial, run_identity, is_resume, is_first=sharding.rank() == 0)
    if resume_from:
        logger.info("going on after step %d of %d", resume.step_of(resume_from), config.steps)
    choices = resume.read_choices(partial) if resume_from else None
    arguments = _arguments(partial, config)  # connects the processes, if there are several
    prepared = prepare(model_dir, teacher_dir, blocks, config, choices)
    if sharding.rank() == 0:
        resume.check_room(partial, prepared.model, prepared.gate_map, config)
        if resume_from is None:
            resume.begin(partial, run_identity, prepared.choices, began)
        else:
            resume.go_on(partial, resume.step_of(resume_from), began)
    try:
        trainer = _fit(prepared, blocks, config, arguments, resume_from, tensorboard_dir)
        trained = _as_stored(trainer, prepared, model_dir, config)
        record = _measure(trained, trainer, blocks, config)
    except (NotFiniteError, PatternError) as error:  # of the second kind here: scores hold NaN
        raise DivergedError(
            f"{error}; lower learning_rate (now {config.learning_rate}) and start again"
        ) from error
    tensors = gating.detach(trained.targets) if trained.gate_map else {}
    if trainer.is_world_process_zero():
        trained.model.to(torch.bfloat16)
        record |= {**run_identity, "origins": resume.read_origins(partial)}
        record = models.write(
            *(out, trained.model, tokenizer, record, tensors),
            source=model_dir,
            order=trained.choices.order,
        )
        shutil.rmtree(partial)
    return record


def _check_outputs(
    out: Path, partial: Path, config: TrainConfig, is_resume: bool, tensorboard_dir: Path | None
) -> None:
    """Refuses what needs neither model nor text to be seen to be wrong."""
    progress.check_reporter(config.report_to, f"report_to {config.report_to}")
    if tensorboard_dir is not None:
        for folder in (out, partial):
            if tensorboard_dir.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"--tensorboard {tensorboard_dir} lies in {folder}, which is written whole at "
                    "the end; choose a directory beside it"
                )
        progress.check_reporter("tensorboard", "--tensorboard")
        check_writable(tensorboard_dir)
    settings = {"config": config.as_dict(), "num_processes": sharding.num_processes()}
    if out.exists():
        if not (out / CAST_JSON).is_file():
            raise CheckpointError(f"{out} exists and is no run's result; {ANOTHER_OUT}")
        identity.check(read_record(out), settings, f"{out} exists and is another run", ANOTHER_OUT)
        return
    sharding.check(config)
    check_new(out)
    if sharding.rank() == 0 and partial.exists():
        resume.check(partial, settings, is_resume)


def _check_models(model_dir: Path, teacher_dir: Path | None, config: TrainConfig) -> None:
    """Refuses models that cannot be trained or distilled from, before a weight is read."""
    if teacher_dir is not None:
        models.check_dense(teacher_dir)
    if models.sparse_targets(model_dir, config.pattern) is None:
        return
    if config.zeros < config.pattern.zeros:
        raise ValueError(
            f"zeros {config.zeros} chooses among the linears of a dense model, but {model_dir} has "
            "its zeros already; leave zeros at 1, and what is dense there stays dense"
        )
    if config.distillation_weight and teacher_dir is None:
        raise ValueError(
            f"{model_dir} has its zeros already, so it is no teacher; give --teacher the dense "
            "model, or set distillation_weight to 0"
        )


def _fit(
    prepared: Prepared,
    blocks: Blocks,
    config: TrainConfig,
    arguments: TrainingArguments,
    resume_from: Path | None,
    tensorboard_dir: Path | None,
) -> CastTrainer:
    """All steps, from the checkpoint `resume_from` if there is one."""
    trainer = CastTrainer(
        config=config,
        gate_map=prepared.gate_map,
        targets=prepared.targets,
        teacher=prepared.teacher,
        model=prepared.model,
        args=arguments,
        train_dataset=TokenBlocks(blocks.train),
        eval_dataset=TokenBlocks(blocks.validation),
    )
    if prepared.teacher is not None:
        prepared.teacher.to(trainer.args.device)
    trainer.watch = Watch(trainer, blocks.heldout, prepared.start)
    trainer.add_callback(trainer.watch)
    calibration = blocks.train[: config.calibration_blocks]
    trainer.add_callback(ExactMask(trainer, calibration))
    if config.quantize != "none":
        trainer.add_callback(QuantizedStart(trainer, calibration))
    if tensorboard_dir is not None:
        trainer.add_callback(progress.tensorboard(tensorboard_dir))
    checkpoints = Checkpoints(None if config.checkpoint_every else config.checkpoint_minutes)
    trainer.add_callback(checkpoints)
    with checkpoints.listening():
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if (step := trainer.state.global_step) < config.steps:
        raise StoppedError(
            f"stopped after step {step} of {config.steps}, saved in {arguments.output_dir}; the "
            "same command with --resume goes on from there"
        )
    return trainer


def _as_stored(
    trainer: CastTrainer, prepared: Prepared, model_dir: Path, config: TrainConfig
) -> Prepared:
    """The trained model, unsharded, its weights rounded as they will be on disk."""
    trained = prepared
    if config.is_sharded:
        trained = _gathered(trainer.model, prepared, model_dir, config)
    if config.quantize != "none":
        gating.set_phase(trained.gate_map, phase_at(config.steps, config))
        quantizing.write_integers(trained.targets, trained.gate_map)
    _round_as_stored(trained.model, trained.gate_map)
    if config.method == "adams":  # the other methods froze theirs in training
        gating.freeze(trained.gate_map)
    return trained


def _measure(
    trained: Prepared, trainer: CastTrainer, blocks: Blocks, config: TrainConfig
) -> dict[str, Any]:
    """cast.json's content, without the run's identity."""
    last = phase_at(config.steps, config)
    step_s = trainer.watch.step_s
    return {
        "kind": "dense" if config.method == "dense" else "gated",
        "method": config.method,
        "n": config.pattern.n,
        "m": config.pattern.m,
        "targets": list(trained.targets),
        "kept_dense": list(trained.choices.kept_dense),
        "selector": config.selector,
        "schedules_end": dataclasses.asdict(last),
        "effective": _effective(trained, config),
        "trained_as": _trained_as(config),
        "steps": config.steps,
        "best_step": trainer.state.best_global_step,
        "tokens_seen": tokens_per_step(config, trainer.args.world_size) * config.steps,
        "step_s": statistics.median(step_s) if step_s else None,
        "curve": [
            {"tokens": int(entry["tokens"]), "perplexity": entry["heldout_perplexity"]}
            for entry in trainer.state.log_history
            if "heldout_perplexity" in entry
        ],
        "gates": {
            **dataclasses.asdict(gating.statistics(trained.gate_map, last, trained.start)),
            **(dataclasses.asdict(trained.reach) if trained.reach else {}),
        },
        "quality": _quality(trained, blocks, config),
    }


def _effective(trained: Prepared, config: TrainConfig) -> dict[str, Any]:
    """What the settings came to, which `method` and those that are ``auto`` do not say."""
    return {
        "is_mask_learnt": config.method != "dense" and first_exact_step(config) > 0,
        "is_solved": config.is_solved,
        "start": None if config.method in ("dense", "adams") else config.first_order,
        "is_reordered": trained.choices.order is not None,
    }


def _trained_as(config: TrainConfig) -> dict[str, Any] | None:
    """How the weights were quantised in the last steps: what `convert` makes the same integers of;
    None if they were not."""
    if (first := first_quantized_step(config)) is None:
        return None
    scale_group = config.scale_group if config.quantize == "int4" else None
    num_steps = config.steps - first
    return {"quantize": config.quantize, "scale_group": scale_group, "num_steps": num_steps}


def _finished(out: Path, partial: Path, run_identity: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a finished run, verified."""
    record = verify(out)
    identity.check(record, run_identity, f"{out} exists and is another run", ANOTHER_OUT)
    logger.info("%s is the finished result of this run; nothing to do", out)
    if sharding.rank() == 0 and partial.is_dir():
        with suppress(CheckpointError):  # of this run, which was killed as it removed them
            resume.check(partial, run_identity, is_resume=True)
            shutil.rmtree(partial)
    return record


def _gathered(
    sharded: nn.Module, prepared: Prepared, model_dir: Path, config: TrainConfig
) -> Prepared:
    """The trained model, unsharded in every process, with its targets and gates."""
    state = sharding.whole_state(sharded)
    model = models.load_any(model_dir, torch.float32)
    targets = {name: model.get_submodule(name) for name in prepared.targets}
    gate_map = {} if config.method == "dense" else with_gates(targets, None, config)
    model.load_state_dict(state)
    for name, gate in gate_map.items():
        gate.is_frozen = prepared.gate_map[name].is_frozen
    return dataclasses.replace(prepared, model=model, targets=targets, gate_map=gate_map)


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


def _quality(trained: Prepared, blocks: Blocks, config: TrainConfig) -> dict[str, Any]:
    last = phase_at(config.steps, config)
    device = next(trained.model.parameters()).device
    with autocast(config.precision, device.type):
        soft, hard = soft_and_hard(trained.model, trained.gate_map, last, blocks.heldout)
    return {
        "text": blocks.heldout_name,
        "perplexity_soft": soft.perplexity,
        "perplexity_hard": hard.perplexity,
        "num_tokens": hard.num_tokens,
        "context_tokens": hard.context_tokens,
    }


def _steps_between_saves(config: TrainConfig) -> int:
    """0: checkpoints come by time. `keep_best` saves what it measures."""
    return config.checkpoint_every or (config.evaluate_every if config.keep_best else 0)


def _arguments(partial: Path, config: TrainConfig) -> TrainingArguments:
    is_distributed = sharding.num_processes() > 1
    arguments = TrainingArguments(
        output_dir=str(partial),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_blocks,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.is_checkpointed,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        fsdp=config.is_sharded or None,
        save_strategy="steps" if _steps_between_saves(config) else "no",
        save_steps=_steps_between_saves(config) or 1,
        per_device_eval_batch_size=config.batch_blocks,
        eval_strategy="steps" if config.keep_best else "no",
        eval_steps=config.evaluate_every or None,
        load_best_model_at_end=config.keep_best,
        metric_for_best_model="eval_loss" if config.keep_best else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # TensorBoard's callback is our own: transformers' writes into OUT.partial.
        report_to="none" if config.report_to == "tensorboard" else config.report_to,
        run_name=partial.name.removesuffix(".partial"),
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_drop_last=True,  # a step's tokens are counted as those of whole batches
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if is_distributed and not torch.cuda.is_available() else None,
        ddp_timeout=WAIT_S,
        ddp_find_unused_parameters=True,  # frozen gates get no gradient
    )
    if arguments.n_gpu > 1:  # Trainer would cut every batch in parts, one for each GPU
        arguments._n_gpu = 1
    return arguments
