"""Dense model + text + TrainConfig -> a gated checkpoint, through transformers' Trainer.

The life of a run: text -> blocks -> gates on the dense model -> steps (Trainer's loop, checkpoints
in OUT.partial/) -> bf16 -> quality of the soft and the hard model -> gates off -> OUT, whole.

Loss of a step: L_task + lambda * L_sparsity, one AdamW with a learning rate for the weights and one
for the gate logits. Weights and gates are fp32 throughout, since bf16 would round small steps away.
"""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from cast_serve.nm import CheckpointError, find_targets
from cast_train import checkpoint, gates, oneshot, quality
from cast_train.checkpoint import load_dense, load_tokenizer
from cast_train.config import TrainConfig
from cast_train.schedules import phase_at
from cast_train.text import TokenBlocks, read_texts, split_held_out, to_blocks, tokenize

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"


class DivergedError(RuntimeError):
    """The loss is not finite; going on would only spoil the checkpoints."""


class CastTrainer(Trainer):
    """Trainer that sets the gates' phase before each step and adds the penalty to the loss."""

    def __init__(self, *, config: TrainConfig, gate_map: Mapping[str, gates.Gate], **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config
        self.gate_map = gate_map
        self.remove_callback(ProgressCallback)
        self.add_callback(LossProgress)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        step = self.state.global_step
        phase = phase_at(step, self.config)
        gates.set_phase(self.gate_map, phase)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if (sparsity := gates.penalty(self.gate_map)) is not None:
            loss = loss + phase.penalty_weight * sparsity
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss is {loss.item()} at step {step}; lower learning_rate "
                f"(now {self.config.learning_rate}) and start again"
            )
        return (loss, outputs) if return_outputs else loss

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            logits = [gate.logits for gate in self.gate_map.values()]
            are_logits = {id(parameter) for parameter in logits}
            weights = [
                parameter
                for parameter in self.model.parameters()
                if parameter.requires_grad and id(parameter) not in are_logits
            ]
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": weights,
                        "lr": self.config.learning_rate,
                        "weight_decay": self.config.weight_decay,
                    },
                    {
                        "params": logits,
                        "lr": self.config.gate_learning_rate,
                        "weight_decay": 0.0,
                    },
                ],
                fused=True,  # one pass over memory; the plain one makes ten
            )
        return self.optimizer


class LossProgress(ProgressCallback):
    """Trainer's progress bar with the loss beside it, in place of a line per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def train(
    model_dir: Path,
    text_files: Sequence[Path],
    out: Path,
    config: TrainConfig,
    is_resume: bool = False,
    heldout_file: Path | None = None,
) -> dict[str, Any]:
    """Trains and writes a gated checkpoint.

    Args:
        model_dir: dense HF directory.
        text_files: UTF-8 training text.
        out: the checkpoint's directory; OUT.partial beside it holds resumable state until the end.
        config: all settings.
        is_resume: go on from OUT.partial if it is there; start if it is not.
        heldout_file: text to measure quality on; None: blocks kept out of the training text.

    Returns:
        cast.json's content. If out is already the result of this very run, it is verified and
        returned, and nothing is trained.

    Raises:
        ValueError: for every wrong input; nothing is written then.
        DivergedError: if the loss is not finite.
    """
    files = [*text_files, *([heldout_file] if heldout_file else [])]
    tokenizer = load_tokenizer(model_dir)
    blocks = to_blocks(tokenize(read_texts(text_files), tokenizer), config.block_size)
    blocks, heldout = split_held_out(blocks, config.heldout_blocks, config.batch_blocks)
    if heldout_file is not None:
        tokens = tokenize(
            read_texts([heldout_file]), tokenizer, config.heldout_blocks * config.block_size
        )
        heldout = to_blocks(tokens, config.block_size)
    identity = {
        "config": config.as_dict(),
        "source": {
            "model": model_dir.resolve().name,
            "model_config_sha256": _sha256(model_dir / "config.json"),
            "text_sha256": {path.name: _sha256(path) for path in files},
        },
    }
    if out.exists():
        return _finished(out, identity)
    partial = out.with_name(out.name + ".partial")
    resume_from = _resumable(partial, identity, is_resume)

    model = load_dense(model_dir, torch.float32)
    targets, _ = find_targets(model, config.pattern, config.include, config.exclude)
    scores = _start_scores(model, targets, blocks, config)
    gate_map = gates.attach(targets, config.pattern, scores)
    start = {name: gate.mask().bool() for name, gate in gate_map.items()}
    if not config.train_embeddings:
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embedding is not None:
                embedding.requires_grad_(False)

    partial.mkdir(parents=True, exist_ok=True)
    (partial / RUN_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    trainer = CastTrainer(
        config=config,
        gate_map=gate_map,
        model=model,
        args=_arguments(partial, config),
        train_dataset=TokenBlocks(blocks),
    )
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    last = phase_at(config.steps, config)
    record = {
        "kind": "gated",
        "method": config.method,
        "n": config.pattern.n,
        "m": config.pattern.m,
        "targets": list(targets),
        "selector": config.selector,
        "schedules_end": dataclasses.asdict(last),
        "steps": config.steps,
        "tokens_seen": tokens_per_step(config, trainer.args.world_size) * config.steps,
        "gates": dataclasses.asdict(gates.statistics(gate_map, last.tau, start)),
        "quality": _quality(model, gate_map, heldout, config, heldout_file),
        **identity,
    }
    logits = gates.detach(targets)
    if trainer.is_world_process_zero():
        model.to(torch.bfloat16)
        record = checkpoint.write(out, model, tokenizer, record, logits)
        shutil.rmtree(partial)
    return record


def tokens_per_step(config: TrainConfig, num_processes: int = 1) -> int:
    return config.batch_blocks * config.block_size * num_processes


def _finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that is done already."""
    record = checkpoint.verify(out)
    for key, value in identity.items():
        if record.get(key) != value:
            raise CheckpointError(
                f"{out} exists and is another run (its {key} differs: "
                f"{_difference(record.get(key), value)}); choose another --out or remove it"
            )
    logger.info("%s is the finished result of this run; nothing to do", out)
    return record


def _resumable(partial: Path, identity: Mapping[str, Any], is_resume: bool) -> Path | None:
    """The newest Trainer checkpoint to go on from, or None to start."""
    if not partial.exists():
        return None
    if not is_resume:
        raise CheckpointError(
            f"{partial} holds an unfinished run; go on with --resume, or remove it"
        )
    try:
        found = json.loads((partial / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{partial} is no unfinished run: {error}; remove it") from error
    for key, value in identity.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"{partial} is another run (its {key} differs: "
                f"{_difference(found.get(key), value)}); repeat that run's settings, or remove it"
            )
    newest = get_last_checkpoint(str(partial))
    return Path(newest) if newest else None


def _difference(found: Any, wanted: Any) -> str:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return f"{found!r}, not {wanted!r}"
    keys = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    return ", ".join(f"{k} is {found.get(k)!r}, not {wanted.get(k)!r}" for k in keys)


def _start_scores(
    model: nn.Module, targets: Mapping[str, nn.Module], blocks: Tensor, config: TrainConfig
) -> dict[str, Tensor] | None:
    if config.start == "ones":
        return None
    if config.start == "magnitude":
        return oneshot.magnitude_scores(targets)
    return oneshot.wanda_scores(model, targets, blocks[: config.calibration_blocks])


def _quality(
    model: nn.Module,
    gate_map: Mapping[str, gates.Gate],
    heldout: Tensor,
    config: TrainConfig,
    heldout_file: Path | None,
) -> dict[str, Any]:
    """Perplexity of the soft and the hard model, with the weights rounded as they are stored."""
    with torch.no_grad():
        logits = {id(gate.logits) for gate in gate_map.values()}
        for parameter in model.parameters():
            if id(parameter) not in logits:
                parameter.copy_(parameter.to(torch.bfloat16))
    last = phase_at(config.steps, config)
    soft, hard = quality.soft_and_hard(model, gate_map, last, heldout)
    return {
        "text": heldout_file.name if heldout_file else "held-out split of the training text",
        "perplexity_soft": soft.perplexity,
        "perplexity_hard": hard.perplexity,
        "num_tokens": hard.num_tokens,
        "context_tokens": hard.context_tokens,
    }


def _arguments(partial: Path, config: TrainConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(partial),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_blocks,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_fraction * config.steps),
        max_grad_norm=config.max_grad_norm,
        bf16=quality.arithmetic(config.precision) == torch.bfloat16,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
