"""Dense model + text + TrainConfig -> a gated checkpoint: the steps of a training run.

`train` is the whole of it; `Run` has its steps, in the order in which they are taken:

check    outputs, settings and optional packages, before anything is read or fetched
read     models, text -> blocks; the inputs' identity -> is this run finished, or to be trained?
begin    gates on the dense model, the teacher (prepare.py), OUT.partial/
fit      CastTrainer's steps (trainer.py), checkpoints in OUT.partial/
round    the trained weights as they will be stored
measure  quality of the soft and the hard model
write    gates removed -> OUT, complete or not at all
"""

import dataclasses
import logging
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern, PatternError
from cast_train import sharding
from cast_train.checkpoint import identity, models, resume, rows
from cast_train.checkpoint.models import load_tokenizer
from cast_train.config import Gates, Pruned, TrainConfig
from cast_train.errors import DivergedError, NotFiniteError, StoppedError
from cast_train.evaluate.perplexity import soft_and_hard
from cast_train.gates import gating, quantizing, scaling
from cast_train.gates.schedules import Phase, phase_at
from cast_train.origin import origin
from cast_train.precision import autocast
from cast_train.pruning.allocate import kept_of_64
from cast_train.training import progress
from cast_train.training.blocks import Blocks, read_blocks
from cast_train.training.prepare import Prepared, prepare
from cast_train.training.stopping import Checkpoints
from cast_train.training.trainer import CastTrainer, arguments_of, tokens_per_step

logger = logging.getLogger(__name__)
ANOTHER_OUT = "choose another --out or remove it"


def train(
    model_dir: Path,
    texts: Sequence[Path],
    out: Path,
    config: TrainConfig,
    is_resume: bool = False,
    heldout_file: Path | None = None,
    tensorboard_dir: Path | None = None,
    teacher_dir: Path | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Trains and writes a gated checkpoint.

    Args:
        model_dir: dense HF directory, or a pruned or compressed one to be trained further, or its
            name on a hub.
        texts: training text, see documents.py; or folders of tokens, see tokens.py.
        out: the checkpoint's directory; OUT.partial beside it holds resumable state until the end,
            see resume.py.
        config: all settings.
        is_resume: continue from OUT.partial if it is there; start if it is not.
        heldout_file: text to measure quality on; None: blocks kept out of the training text.
        tensorboard_dir: where TensorBoard's files go; None: OUT.tensorboard, if `report_to` asks
            for them.
        teacher_dir: dense HF directory of the same vocabulary to distil from; None: model_dir.
        weights: each text's share of what is trained on, of any sum; None: all texts are one.

    Returns:
        cast.json's content. If out is already the result of this run (the same settings, and files
        with the same sha256, see identity.py), it is verified and returned, and nothing is trained.

    Raises:
        UsageError: for every wrong input; nothing is written then.
        CheckpointError: if out or OUT.partial is another run's; it names what differs.
        DivergedError: if the loss, or the trained model's output, is not finite.
        StoppedError: if the run was asked to stop, by a signal (stopping.py), and is saved.
    """
    run = Run(
        model_dir=model_dir,
        texts=texts,
        out=out,
        config=config,
        is_resume=is_resume,
        heldout_file=heldout_file,
        tensorboard_dir=tensorboard_dir,
        teacher_dir=teacher_dir,
        weights=weights,
    )
    run.check()
    run.read()
    if out.exists():
        return run.finished()
    with resume.held(run.partial, is_first=sharding.rank() == 0):
        run.begin()
        try:
            run.fit()
            run.round()
            record = run.measure()
        except (NotFiniteError, PatternError) as error:  # of the second kind here: scores hold NaN
            raise DivergedError(
                f"{error}; lower learning_rate (now {config.learning_rate}) and start again"
            ) from error
        return run.write(record)


@dataclass(kw_only=True)
class Run:
    """What a run is given, what it reads of that, and the steps that `train` takes.

    Attributes:
        model_dir: and all others down to weights: as `train` takes them. `read` replaces a
            model's name on a hub by the directory that it was fetched to.
        began: commit, machine and load before the run (origin.py).
        sparse: the linears that have zeros already, and their patterns; None: the model is dense.
            Set by `read`, as the next three are.
        tokenizer: the model's.
        blocks: the text.
        identity: settings, number of processes and the hashes of all files that were read.
        resume_from: the checkpoint to resume from, or None; set by `begin`, as the next two are.
        arguments: transformers' settings of the run.
        prepared: model, gates and teacher; from `round` on as they are stored.
        trainer: which took all steps; set by `fit`.
        last: what the gates do after the last step; set by `round`.
    """

    model_dir: Path
    texts: Sequence[Path]
    out: Path
    config: TrainConfig
    is_resume: bool
    heldout_file: Path | None
    tensorboard_dir: Path | None
    teacher_dir: Path | None
    weights: Sequence[float] | None
    began: Mapping[str, Any] = field(init=False)
    sparse: Mapping[str, Pattern] | None = field(init=False)
    tokenizer: Any = field(init=False)
    blocks: Blocks = field(init=False)
    identity: Mapping[str, Any] = field(init=False)
    resume_from: Path | None = field(init=False)
    arguments: TrainingArguments = field(init=False)
    prepared: Prepared = field(init=False)
    trainer: CastTrainer = field(init=False)
    last: Phase = field(init=False)

    def __post_init__(self) -> None:
        self.began = origin(self.config.precision)
        if self.config.report_to == "tensorboard" and self.tensorboard_dir is None:
            self.tensorboard_dir = self.out.with_name(self.out.name + ".tensorboard")

    @property
    def partial(self) -> Path:
        """Where the unfinished run lies."""
        return self.out.with_name(self.out.name + ".partial")

    def check(self) -> None:
        """Refuses what is wrong whatever models and text hold."""
        config, out = self.config, self.out
        if self.teacher_dir is not None and not config.distillation_weight:
            raise UsageError(
                f"--teacher {self.teacher_dir} has no effect with distillation_weight 0; "
                "leave one of them out"
            )
        progress.check_reporter(config.report_to, f"report_to {config.report_to}")
        if self.tensorboard_dir is not None:
            for folder in (out, self.partial):
                if self.tensorboard_dir.resolve().is_relative_to(folder.resolve()):
                    raise UsageError(
                        f"--tensorboard {self.tensorboard_dir} is inside {folder}, which is "
                        "written as a whole at the end; choose a directory outside it"
                    )
            progress.check_reporter("tensorboard", "--tensorboard")
            check_writable(self.tensorboard_dir)
        settings = {"config": config.as_dict(), "num_processes": sharding.num_processes()}
        if out.exists():
            if not (out / CAST_JSON).is_file():
                raise CheckpointError(f"{out} exists and is not a run's result; {ANOTHER_OUT}")
            what = f"{out} exists and is another run"
            identity.check(read_record(out), settings, what, ANOTHER_OUT)
            return
        sharding.check(config)
        check_new(out)
        if sharding.rank() == 0 and self.partial.exists():
            resume.check(self.partial, settings, self.is_resume)

    def read(self) -> None:
        """Fetches the models, reads tokenizer and text, and hashes all files."""
        self.model_dir = hub.fetch(self.model_dir)
        self.teacher_dir = hub.fetch(self.teacher_dir) if self.teacher_dir else None
        self.sparse = self._sparse_targets()
        self.tokenizer = load_tokenizer(self.model_dir)
        self.blocks = read_blocks(
            self.texts, self.heldout_file, self.tokenizer, self.config, self.weights
        )
        source = identity.of_inputs(self.model_dir, self.texts, self.heldout_file, self.teacher_dir)
        identity.check_texts(source)
        if self.weights:
            source["text_weights"] = list(self.weights)
        self.identity = {
            "config": self.config.as_dict(),
            "num_processes": sharding.num_processes(),
            "source": source,
        }

    def _sparse_targets(self) -> Mapping[str, Pattern] | None:
        """The linears that have zeros already, and their patterns; None: the model is dense.

        Raises:
            UsageError: if these models cannot be trained or distilled from; no weight is read.
        """
        if self.teacher_dir is not None:
            models.check_dense(self.teacher_dir)
        sparse = models.sparse_targets(self.model_dir, self.config.pattern)
        if sparse is None:
            return None
        if isinstance(self.config, Pruned) and self.config.zeros != 1:
            raise UsageError(
                f"zeros {self.config.zeros} chooses among the linears of a dense model, but "
                f"{self.model_dir} is already pruned; leave zeros at 1: the linears that are "
                "dense there stay dense"
            )
        if self.config.distillation_weight and self.teacher_dir is None:
            raise UsageError(
                f"{self.model_dir} is already pruned, so it cannot be the teacher; give --teacher "
                "the dense model, or set distillation_weight to 0"
            )
        return sparse

    def finished(self) -> dict[str, Any]:
        """The record of this run, which was finished before, verified."""
        record = verify(self.out)
        identity.check(record, self.identity, f"{self.out} exists and is another run", ANOTHER_OUT)
        logger.info("%s is this run's finished result; nothing to do", self.out)
        if sharding.rank() == 0 and self.partial.is_dir():
            with suppress(CheckpointError):  # of this run, which was killed as it removed them
                resume.check(self.partial, self.identity, is_resume=True)
                shutil.rmtree(self.partial)
        return record

    def begin(self) -> None:
        """Finds the checkpoint to resume from, prepares the model and records this launch."""
        partial, is_first = self.partial, sharding.rank() == 0
        self.resume_from = resume.find(partial, self.identity, self.is_resume, is_first)
        choices = None
        if self.resume_from:
            step = resume.step_of(self.resume_from)
            logger.info("resuming after step %d of %d", step, self.config.steps)
            choices = resume.read_choices(partial)
        self.arguments = arguments_of(self.config, partial)  # connects the processes
        self.prepared = prepare(
            self.model_dir, self.sparse, self.teacher_dir, self.blocks, self.config, choices
        )
        if is_first:
            resume.check_room(partial, self.prepared.model, self.prepared.gate_map, self.config)
            if self.resume_from:
                resume.go_on(partial, resume.step_of(self.resume_from), self.began)
            else:
                resume.begin(partial, self.identity, self.prepared.choices, self.began)

    def fit(self) -> None:
        """Takes all steps that are left."""
        self.trainer = trainer = CastTrainer(
            self.prepared, self.blocks, self.config, self.arguments
        )
        if self.tensorboard_dir is not None:
            trainer.add_callback(progress.tensorboard(self.tensorboard_dir))
        every_minutes = None if self.config.checkpoint_every else self.config.checkpoint_minutes
        checkpoints = Checkpoints(every_minutes)
        trainer.add_callback(checkpoints)
        with checkpoints.listening():
            trainer.train(
                resume_from_checkpoint=str(self.resume_from) if self.resume_from else None
            )
        if (step := trainer.state.global_step) < self.config.steps:
            raise StoppedError(
                f"stopped after step {step} of {self.config.steps}, saved in {self.partial}; the "
                "same command with --resume continues from there"
            )

    def round(self) -> None:
        """Makes the trained model what it will be on disk."""
        trained = self.prepared
        gating.restore(trained.gate_map)
        self.last = phase_at(self.config.steps, self.config)
        if self.config.quantization is not None:
            gating.set_phase(trained.gate_map, self.last)
            quantizing.write_integers(trained.targets, trained.gate_map)
        _round_as_stored(trained.model, trained.gate_map)
        if self.config.method == "adams":  # the other methods froze theirs in training
            gating.freeze(trained.gate_map)

    def measure(self) -> dict[str, Any]:
        """cast.json's content, without the run's identity."""
        config, trained, trainer = self.config, self.prepared, self.trainer
        step_s = trainer.watch.step_s
        return {
            "kind": "dense" if config.method == "dense" else "gated",
            "method": config.method,
            "n": config.pattern.n,
            "m": config.pattern.m,
            "targets": list(trained.targets),
            "kept_dense": list(trained.choices.kept_dense),
            "kept_of_64": kept_of_64(trained.patterns, config.pattern),
            "selector": config.selector if isinstance(config, Gates) else None,
            "schedules_end": dataclasses.asdict(self.last),
            # What the settings came to, which `method` and those that are ``auto`` do not say.
            "effective": {
                "is_mask_learnt": config.method != "dense" and config.first_exact_step > 0,
                "is_solved": config.is_solved,
                "is_reordered": trained.choices.order is not None,
            },
            "trained_as": self._trained_as(),
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
                **dataclasses.asdict(gating.statistics(trained.gate_map, self.last, trained.start)),
                **(dataclasses.asdict(trained.reach) if trained.reach else {}),
            },
            "quality": self._quality(),
        }

    def _trained_as(self) -> dict[str, Any] | None:
        """How the weights were quantised in the last steps: what `convert` makes the same integers
        of; None if they were not."""
        config = self.config
        if config.quantization is None or config.first_quantized_step is None:
            return None
        return {
            "quantize": config.quantization.values,
            "scale_group": config.quantization.group,
            "num_steps": config.steps - config.first_quantized_step,
        }

    def _quality(self) -> dict[str, Any]:
        trained = self.prepared
        device = next(trained.model.parameters()).device
        with autocast(self.config.precision, device.type):
            soft, hard = soft_and_hard(
                trained.model, trained.gate_map, self.last, self.blocks.heldout
            )
        return {
            "text": self.blocks.heldout_name,
            "perplexity_soft": soft.perplexity,
            "perplexity_hard": hard.perplexity,
            "num_tokens": hard.num_tokens,
            "context_tokens": hard.context_tokens,
        }

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Writes OUT, in the first process, and removes OUT.partial."""
        trained = self.prepared
        tensors = gating.detach(trained.targets) if trained.gate_map else {}
        if sharding.rank() != 0:
            if self.config.is_sharded:
                rows.save(None, trained.model, tensors)
            return record
        if not self.config.is_sharded:
            trained.model.to(torch.bfloat16)
        written = models.write(
            self.out,
            trained.model,
            self.tokenizer,
            {**record, **self.identity, "origins": resume.read_origins(self.partial)},
            tensors,
            source=self.model_dir,
            order=trained.choices.order,
        )
        shutil.rmtree(self.partial)
        return written


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
