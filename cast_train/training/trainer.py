"""CastTrainer: transformers' Trainer with gates, distillation and the sparsity penalty in its loss.

Loss of a step: (1 - eta) * L_task + eta * L_distillation + lambda * L_sparsity, and a term for the
hidden states; optimizer.py has the steps. Weights and gates are fp32 throughout, since bf16 would
round small steps away.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ProgressCallback

from cast_serve.checkpoint.record import CheckpointError
from cast_train import losses, sharding
from cast_train.checkpoint import resume, rows
from cast_train.config import TrainConfig
from cast_train.errors import DivergedError
from cast_train.evaluate.perplexity import perplexity
from cast_train.gates import budget, gating
from cast_train.gates.schedules import (
    gate_rate_factor,
    learning_rate_factor,
    phase_at,
)
from cast_train.passes import computing, ends_in_head
from cast_train.precision import autocast
from cast_train.pruning.solve import solve, solve_again
from cast_train.training import optimizer
from cast_train.training.blocks import Blocks, RandomOrder
from cast_train.training.prepare import Prepared
from cast_train.training.progress import Progress, loss_in_words
from cast_train.training.quantized_start import start_quantized

WAIT_S = 24 * 3600  # of the other processes, while the first searches, solves or quantises


class CastTrainer(Trainer):
    """Trainer that sets the gates' phase before each pass and adds our terms to the loss.

    Args:
        prepared: the model with its gates, and the teacher.
        blocks: the text.
        config: all settings.
        arguments: as `arguments_of` makes them.

    Attributes:
        targets: the linears that are, or with ``dense`` would be, sparse in the end, by name.
        teacher: the dense model that is distilled from, or None.
        figures: the terms of the last pass's loss; logged beside ``loss``.
        watch: times the steps.
    """

    def __init__(
        self, prepared: Prepared, blocks: Blocks, config: TrainConfig, arguments: TrainingArguments
    ) -> None:
        super().__init__(
            model=prepared.model,
            args=arguments,
            train_dataset=blocks.train,
            eval_dataset=blocks.validation,
        )
        self.config = config
        if config.is_sharded:  # then the model averages gradients itself, and no wrapper is to
            self.accelerator.prepare_model = lambda model, **_: model
        self.gate_map = prepared.gate_map
        self.targets = prepared.targets
        self.teacher = prepared.teacher
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        with self.compute_loss_context_manager():
            pair = [each for each in (self.model, self.teacher) if each is not None]
            self.has_plain_heads = all(ends_in_head(each) for each in pair)
        # Made on the CPU, and compared with what the device has.
        prepared = dataclasses.replace(
            prepared,
            start={name: mask.to(self.args.device) for name, mask in prepared.start.items()},
            dense={name: weight.to(self.args.device) for name, weight in prepared.dense.items()},
        )
        self.figures: dict[str, float] = {}
        self.remove_callback(ProgressCallback)
        loss = loss_in_words(config, has_teacher=self.teacher is not None)
        self.add_callback(Progress(config, tokens_per_step(config, self.args.world_size), loss))
        self.add_callback(Resumed(self))
        self.watch = Watch(self, blocks.heldout, prepared.start)
        self.add_callback(self.watch)
        self.add_callback(Starts(self, prepared, blocks.calibration))
        self._written: Path | None = None  # the last checkpoint, while it is not complete
        self._writing: Future[Any] | None = None  # by a thread
        self._group = distributed.new_group(backend="gloo") if config.checkpoint_async else None
        self.add_callback(Completes(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if not model.training:  # `evaluate`, in the phase of the last step
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        step = self.state.global_step
        phase = phase_at(step, self.config)
        gating.set_phase(self.gate_map, phase)
        hidden_weight = self.config.hidden_states_weight if self.teacher is not None else 0.0
        asked = {"input_ids": inputs["input_ids"], "use_cache": False}
        asked["output_hidden_states"] = hidden_weight > 0
        passes = self._passes_to_heads if self.has_plain_heads else self._passes
        outputs, wanted, (loss, task, distillation) = passes(model, asked, inputs["labels"])
        self.figures = {"task_loss": task.item()}
        if wanted is not None:
            self.figures["distillation_loss"] = distillation.item()
        if wanted is not None and hidden_weight:
            # The first are the embeddings, before any target.
            hidden = losses.hidden_distance(outputs.hidden_states[1:], wanted.hidden_states[1:])
            loss = loss + hidden_weight * hidden
            self.figures["hidden_states_loss"] = hidden.item()
        if (sparsity := gating.penalty(self.gate_map)) is not None:
            loss = loss + phase.penalty_weight * sparsity
            self.figures["sparsity_loss"] = sparsity.item()
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss is {loss.item()} at step {step}; lower learning_rate "
                f"(now {self.config.learning_rate}) and start again"
            )
        # Where transformers counts the tokens of a step, it sums the losses of its passes.
        if kwargs.get("num_items_in_batch"):
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _passes(
        self, model: nn.Module, asked: dict[str, Any], labels: Tensor
    ) -> tuple[Any, Any, Sequence[Tensor]]:
        """The model's outputs, the teacher's, if there is one, and what `losses.losses` returns."""
        outputs, wanted = model(**asked), None
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(**asked)
        logits = None if wanted is None else wanted.logits
        return outputs, wanted, losses.losses(outputs.logits, labels, logits, *self._distillation)

    def _passes_to_heads(
        self, model: nn.Module, asked: dict[str, Any], labels: Tensor
    ) -> tuple[Any, Any, Sequence[Tensor]]:
        """As `_passes`, without all logits at a time.

        The loss is computed in place of the model's output layer, since of a sharded model only its
        forward has that layer whole.
        """
        head, wanted = self.model.get_output_embeddings(), None
        with contextlib.ExitStack() as stack:
            theirs = None, None
            if self.teacher is not None:
                teacher_head = self.teacher.get_output_embeddings()
                with torch.no_grad(), computing(teacher_head, lambda hidden: hidden):
                    wanted = self.teacher(**asked)
                stack.enter_context(sharding.with_head(self.teacher))
                theirs = wanted.logits, teacher_head.weight

            def terms(hidden: Tensor) -> Tensor:
                return losses.head_losses(hidden, head.weight, labels, *theirs, *self._distillation)

            stack.enter_context(computing(head, terms))
            outputs = model(**asked)
        return outputs, wanted, outputs.logits.unbind()

    @property
    def _distillation(self) -> tuple[float, float]:
        """Its share of the loss, and the temperature."""
        share = 0.0 if self.teacher is None else self.config.distillation_weight
        return share, self.config.distillation_temperature

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Adds our own autocast.

        Trainer's would make fp32 copies of all logits, and under FSDP cast the gate logits to bf16.
        """
        stack = super().compute_loss_context_manager()
        stack.enter_context(autocast(self.config.precision, self.args.device.type))
        return stack

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the evaluation set; infinite before mask and integers are, so never the best.

        A soft model's loss is lower than that of the same model hardened, or then quantised.
        """
        metrics = super().evaluate(*args, **kwargs)
        phase = phase_at(self.state.global_step - 1, self.config)
        is_exact = phase.is_hard and (phase.is_quantized or self.config.quantization is None)
        if not is_exact and self.gate_map:
            metrics["eval_loss"] = math.inf
        return metrics

    def _get_train_sampler(self, *_: Any) -> RandomOrder:
        return RandomOrder(len(self.train_dataset), self.args.seed)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """All of the evaluation set: only training leaves out what makes no whole batch."""
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self.figures if "loss" in logs else logs, *args, **kwargs)

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimizer.make(self.model, self.gate_map, self.targets, self.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *_: Any) -> LambdaLR:
        """Each group of the optimiser has the schedule of its role."""
        if self.lr_scheduler is None:
            assert self.optimizer is not None
            factors = [
                learning_rate_factor if group["role"] == optimizer.WEIGHTS else gate_rate_factor
                for group in self.optimizer.param_groups
            ]
            self.lr_scheduler = LambdaLR(
                self.optimizer, [partial(factor, config=self.config) for factor in factors]
            )
        return self.lr_scheduler

    def _run_epoch(self, **kwargs: Any) -> None:
        """Resumed from the checkpoint of the last step, Trainer would take one step more."""
        if self.state.global_step < self.args.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A sharded model is saved with its optimizer."""
        if not self.config.is_sharded:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.config.is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        assert self.lr_scheduler is not None
        self._writing = rows.save_state(
            Path(output_dir), self.model, self._plain_optimizer(), self._group
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.config.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.config.is_sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        assert self.lr_scheduler is not None
        rows.load_state(Path(checkpoint), self.model, self._plain_optimizer())
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint (resume.py), once the one before is complete."""
        self.complete_checkpoint()
        super()._save_checkpoint(model, trial)
        self._written = Path(self.args.output_dir) / f"{resume.PREFIX}{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        if self._writing is None:
            self.complete_checkpoint()

    def complete_checkpoint(self) -> None:
        """Waits until every process has written its part, and marks the checkpoint as complete.

        Raises:
            CheckpointError: if a process could not; the checkpoint before stays.
        """
        folder, self._written = self._written, None
        if folder is None:
            return
        if self._writing is not None:
            writing, self._writing = self._writing, None
            rows.wait_for(writing, folder)
        if self.args.should_save:
            resume.mark_complete(folder, self.state.best_model_checkpoint)

    @property
    def has_written(self) -> bool:
        """Whether a thread has written a checkpoint that is not marked yet."""
        return self._writing is not None and self._writing.done()


class Completes(TrainerCallback):
    """Marks a checkpoint that is written beside the steps, after the step in which it is done."""

    def __init__(self, trainer: CastTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.has_written:
            self.trainer.complete_checkpoint()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.complete_checkpoint()


class Watch(TrainerCallback):
    """Times the steps, and measures on the held-out text every `evaluate_every` steps.

    Attributes:
        step_s: seconds of each step of this process, without the measurements.
    """

    def __init__(self, trainer: CastTrainer, heldout: Tensor, start: Mapping[str, Tensor]) -> None:
        self.trainer = trainer
        self.heldout = heldout
        self.start = start
        self.step_s: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_s.append(time.perf_counter() - self._began)
        config, trainer = self.trainer.config, self.trainer
        if config.evaluate_every and state.global_step % config.evaluate_every == 0:
            with autocast(config.precision, args.device.type):
                found = perplexity(trainer.model, self.heldout, name="held out")
            phase = phase_at(state.global_step - 1, config)
            trainer.log(
                {
                    "heldout_perplexity": found.perplexity,
                    "tokens": float(tokens_per_step(config, args.world_size) * state.global_step),
                    **dataclasses.asdict(gating.statistics(trainer.gate_map, phase, self.start)),
                }
            )


class Starts(TrainerCallback):
    """Weights that are chosen before a step and not learnt in it: solved ones, and quantised ones.

    Before the first step under the exact mask, where gates learnt it, the kept weights are solved
    for it (`is_solved`): all of them, if they have waited for it unmoved, else in the rows where it
    changed. Before the first quantised step scales and integers are chosen. Rank 0 does it, and all
    processes take its weights; of sharded ones each process solves its rows. A run that is resumed
    at such a step has the checkpoint's weights and does it again.

    Args:
        trainer: whose weights and gates these are.
        prepared: its model as it started.
        blocks: calibration tokens, int64 [num_blocks, block_size].
    """

    def __init__(self, trainer: CastTrainer, prepared: Prepared, blocks: Tensor) -> None:
        self.trainer = trainer
        self.dense = prepared.dense
        self.before = prepared.start
        self.blocks = blocks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, config, step = self.trainer, self.trainer.config, state.global_step
        if step not in (config.first_exact_step, config.first_quantized_step):
            return
        if step == config.first_exact_step:
            budget.harden(trainer.gate_map)
        phase = dataclasses.replace(phase_at(step, config), is_quantized=False)
        gating.set_phase(trainer.gate_map, phase)
        model = trainer.accelerator.unwrap_model(trainer.model)
        has_rows = config.is_sharded or sharding.rank() == 0
        if has_rows and step == config.first_exact_step:
            masks = {name: gate.mask(sharding.local) for name, gate in trainer.gate_map.items()}
            if config.waits:
                solve(model, trainer.targets, masks, self.blocks)
            elif self.dense:
                solve_again(model, trainer.targets, self.dense, self.before, masks, self.blocks)
        if has_rows and config.quantization and step == config.first_quantized_step:
            with gating.restored(trainer.gate_map):
                start_quantized(
                    model, trainer.targets, trainer.gate_map, self.blocks, config.quantization
                )
        if not config.is_sharded:
            sharding.take_first(sharding.state_of(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.trainer.config
        if not config.waits or state.global_step >= config.first_exact_step:
            return
        assert self.trainer.optimizer is not None
        for group in self.trainer.optimizer.param_groups:
            if group["role"] == optimizer.WEIGHTS:
                for weight in group["params"]:
                    weight.grad = None  # AdamW passes by what has no gradient


class Resumed(TrainerCallback):
    """What Trainer does not restore of a run that goes on.

    Gates that were frozen at the checkpoint keep the checkpoint's logits; a gate that computes its
    logits would do so again, from weights that have changed. And of `keep_best` Trainer remembers
    the best checkpoint by its whole path, but OUT.partial may have been moved.
    """

    def __init__(self, trainer: CastTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.config.keep_best and state.best_global_step:
            best = Path(args.output_dir) / f"{resume.PREFIX}{state.best_global_step}"
            if not best.is_dir():
                raise CheckpointError(
                    f"{best}, the run's best checkpoint, is missing; start the run again"
                )
            state.best_model_checkpoint = str(best)
        if state.global_step and phase_at(state.global_step - 1, self.trainer.config).is_hard:
            gating.mark_frozen(self.trainer.gate_map)


def tokens_per_step(config: TrainConfig, num_processes: int) -> int:
    """Tokens of one optimiser step, over all processes."""
    return config.batch_blocks * config.accumulation * config.block_size * num_processes


def _steps_between_saves(config: TrainConfig) -> int:
    """0: checkpoints come by time. `keep_best` saves what it measures."""
    return config.checkpoint_every or (config.evaluate_every if config.keep_best else 0)


def arguments_of(config: TrainConfig, partial: Path) -> TrainingArguments:
    """transformers' settings; making them connects the processes, if there are several.

    Args:
        config: all settings.
        partial: OUT.partial, where checkpoints go.
    """
    is_distributed = sharding.num_processes() > 1
    arguments = TrainingArguments(
        output_dir=str(partial),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_blocks,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.is_checkpointed,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
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
