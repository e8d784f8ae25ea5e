"""A TOML file and flags -> TrainConfig: every setting of a run, frozen, checked, written once."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from cast_serve.sparsity.pattern import Pattern, patterns_of
from cast_serve.sparsity.targets import check_expressions

Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=1e-4)]  # of a selection, in logits
GATES_ONLY = (
    *("selector", "gate_learning_rate", "penalty_weight", "penalty_ramp", "tau_start", "tau_end"),
    *("tau_end_fraction", "blend_end_fraction", "blend_ramp", "gumbel_noise", "hard_fraction"),
    "masks_first",
)  # settings that a mask which is never learnt has no use for
Names = Annotated[tuple[str, ...], Strict(False)]  # a list, as TOML and JSON have it, will do


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class TrainConfig:
    """One run of `cast-train run`. Fractions are of `steps`, so the whole plan scales with it.

    Attributes:
        method: where the pattern comes from; ``fixed``: it is that of `start`, kept from the first
            step to the last, its weights solved for it by least squares (solve.py) and trained;
            ``gates``: a gate beside every weight learns it; ``ste``: by the weights' sizes,
            straight through, with SR-STE decay; ``adams``: dense forward, decay in the optimiser,
            pruned at the end; ``dense``: there is none, plain fine-tuning to compare.
        selector: how gates become a soft mask; see selection.py.
        sparsity: N:M.
        start: where the gates' order comes from: ``ones`` (none), ``magnitude``, ``wanda`` or
            ``sparsegpt``, which moves the weights too and wants its mask from the start (see
            docs/method.md). For ``ste``, what ranks the weights; from ``sparsegpt`` it ranks by
            magnitude, the dropped weights starting at 0. ``adams`` ranks by magnitude always.
            ``auto``: ``sparsegpt`` for ``gates`` without `masks_first`, but for ``penalty``; else
            ``wanda``.
        channel_order: of a dense model's channels, which decides what shares a group; ``auto``: the
            order in which pruning costs least is searched for (permute.py), and the model computes
            the same in it; ``given``: as they are. ``auto`` is ``given`` for ``dense``, and where
            `cast-train permute` has been before or the model's layout does not allow it.
        include: regular expressions; if given, only linears whose names match are targets.
        exclude: regular expressions; linears whose names match stay dense.
        zeros: share of zeros over all weights of the targets: if `sparsity` has more, the linears
            whose pruning would hurt most for their size stay dense (allocate.py).
        allocation: how those are found; ``fisher``: by the second-order cost of each alone;
            ``gates``: by gates of whole linears, all learnt together.
        steps: optimiser steps.
        block_size: tokens of one training sequence.
        batch_blocks: sequences per pass and process.
        accumulation: passes per step.
        is_checkpointed: activations are computed again in backward, for less memory.
        learning_rate: of the weights, AdamW, at its peak.
        gate_learning_rate: of the gate logits, constant until the mask is exact: how far a logit
            moves in a step whose gradient is as large as its tensor's usually are (optimizer.py).
        weight_decay: AdamW's, of the weights of the linears that are targets (with ``dense``: that
            would be); norms, biases, embeddings, scales and gates have none. ``adams`` has `decay`
            in its place, and warns.
        warmup_fraction: the learning rate rises linearly this long, then falls along half a cosine.
        max_grad_norm: the gradient's norm is clipped to this.
        penalty_weight: lambda at its highest, the factor of the sparsity penalty.
        penalty_ramp: how lambda rises from 0 to there (``constant``: it is there from the start).
        tau_start: temperature of the selection at step 0, in logits.
        tau_end: temperature from `tau_end_fraction` on.
        tau_end_fraction: by then tau has fallen, geometrically, to tau_end.
        blend_end_fraction: by then the blend has risen from 0 (dense) to 1 (the soft mask).
        blend_ramp: its shape.
        gumbel_noise: of the ``gumbel`` selector at step 0, in logits; it is 0 once tau is tau_end.
        decay: ``adams``: lambda, the size of the pull beside the gradients' own; ``ste``: the share
            of a dropped weight that is added to its gradient.
        mask_every: steps between two refreshes of AdamS's mask.
        scale_parts: column groups with a learnt scale of their own per row, folded into the weights
            on hardening; 0: none.
        distillation_weight: eta, the share of the distillation loss against the dense model.
        distillation_temperature: T of both logits in it.
        hidden_states_weight: factor of the distance between the model's hidden states and the
            teacher's, added to the loss; without a distillation_weight there is no teacher, and
            this has no effect.
        hard_fraction: from then on the mask is exact, the gates are frozen and only weights learn.
        quantize: what the weights are trained for: in the last steps the targets compute with
            weights of so many bits and 8-bit activations, as they do where the model is served that
            `cast-serve convert --quantize` makes of it (quantizing.py).
        scale_group: columns of a row that share a scale in ``int4``.
        quantized_fraction: with `quantize`, from then on the forward is quantised.
        masks_first: weights stay dense and unmoved while the gates learn. Once the mask is exact,
            the kept ones are solved for it by least squares (solve.py), and only then are they
            trained; the learning rate's warm-up begins there.
        calibration_blocks: sequences that ``wanda``, ``sparsegpt``, ``fixed``, `masks_first`,
            `zeros` and the order of channels measure activations on.
        heldout_blocks: sequences taken out of the training text to measure quality on.
        evaluate_every: steps between two measurements on the held-out text, in the phase of the
            moment, with the gates' statistics; 0: only at the end.
        keep_best: the result is the checkpoint with the least loss on sequences kept out of the
            training text, out of those with the exact mask; measured every `evaluate_every` steps.
        train_embeddings: whether embeddings and head are trained too.
        is_sharded: over several processes, each keeps its rows of all parameters in place of a
            copy (FSDP2).
        precision: arithmetic of the model; ``auto``: bf16 where the machine multiplies it natively.
        checkpoint_every: steps between two resumable checkpoints; 0: they come by time.
        checkpoint_minutes: minutes between two of them, where `checkpoint_every` is 0.
        report_to: where the figures of every step go besides, through transformers' reporter of
            that name, whose package must be installed.
        seed: of the order of the sequences, and of what ``generator`` begins with and ``gumbel``
            draws.
    """

    method: Literal["fixed", "gates", "ste", "adams", "dense"] = "fixed"
    selector: Literal["soft_topk", "gumbel", "penalty", "generator"] = "soft_topk"
    sparsity: str = "2:4"
    start: Literal["auto", "ones", "magnitude", "wanda", "sparsegpt"] = "auto"
    channel_order: Literal["auto", "given"] = "auto"
    include: Names = ()
    exclude: Names = ()
    zeros: Annotated[float, Field(gt=0, le=1)] = 1.0
    allocation: Literal["fisher", "gates"] = "fisher"
    steps: PositiveInt = 64
    block_size: Annotated[int, Field(ge=2)] = 512
    batch_blocks: PositiveInt = 2
    accumulation: PositiveInt = 1
    is_checkpointed: bool = False
    learning_rate: NonNegativeFloat = 5e-4
    gate_learning_rate: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    warmup_fraction: Fraction = 0.05
    max_grad_norm: Annotated[float, Field(allow_inf_nan=True)] = 1.0
    penalty_weight: NonNegativeFloat = 0.1
    penalty_ramp: Literal["constant", "linear", "cosine"] = "linear"
    tau_start: Temperature = 0.1
    tau_end: Temperature = 1e-3
    tau_end_fraction: Fraction = 0.04
    blend_end_fraction: Fraction = 0.0
    blend_ramp: Literal["linear", "cosine"] = "linear"
    gumbel_noise: NonNegativeFloat = 0.5
    decay: NonNegativeFloat = 2e-4
    mask_every: PositiveInt = 10
    scale_parts: NonNegativeInt = 0
    distillation_weight: Fraction = 0.9
    distillation_temperature: Annotated[float, Field(ge=0.01)] = 1.0
    hidden_states_weight: NonNegativeFloat = 10.0
    hard_fraction: Fraction = 0.05
    quantize: Literal["none", "int8", "int4"] = "none"
    scale_group: Literal[128, 64, 32] = 128
    quantized_fraction: Fraction = 0.5
    masks_first: bool = False
    calibration_blocks: PositiveInt = 16
    heldout_blocks: PositiveInt = 16
    evaluate_every: NonNegativeInt = 0
    keep_best: bool = False
    train_embeddings: bool = False
    is_sharded: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: NonNegativeInt = 0
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "comet_ml", "trackio"] = "none"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _check_together(self) -> "TrainConfig":
        """What one field's own limits cannot say."""
        self.pattern.check_zeros(self.zeros)
        check_expressions((*self.include, *self.exclude))
        if self.method == "fixed":
            self._check_fixed()
        if self.selector == "gumbel" and self.method == "gates":
            patterns_of(self.pattern.n, self.pattern.m)
        if self.tau_end > self.tau_start:
            raise ValueError(
                f"tau_end {self.tau_end} is above tau_start {self.tau_start}; tau must fall"
            )
        if self.masks_first and self.method != "gates":
            raise ValueError(f"masks_first goes with method gates alone, not with {self.method}")
        if self.is_solved and self.is_sharded:
            asked = "masks_first" if self.masks_first else "method fixed"
            raise ValueError(
                f"{asked} cannot go with is_sharded, since solving needs whole weights; set "
                "is_sharded to false, or choose method gates without masks_first"
            )
        if self.keep_best:
            self._check_keep_best()
        if self.quantize != "none":
            self._check_quantize()
        if not max(self.blend_end_fraction, self.tau_end_fraction) <= self.hard_fraction < 1:
            raise ValueError(
                f"hard_fraction {self.hard_fraction} must be below 1 and not below "
                f"blend_end_fraction {self.blend_end_fraction} and "
                f"tau_end_fraction {self.tau_end_fraction}: "
                "the last steps must see the exact mask that is served"
            )
        return self

    def _check_fixed(self) -> None:
        if self.start == "ones":
            raise ValueError(
                "start ones has no order to keep a mask of; choose magnitude, wanda or sparsegpt, "
                "or method gates"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in GATES_ONLY:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name} {value} goes with method gates, which learns the mask; method fixed, "
                    f"the default, keeps that of `start`: set method to gates, or leave {name} out"
                )

    def _check_quantize(self) -> None:
        if self.method in ("adams", "dense"):
            raise ValueError(
                f"quantize {self.quantize} trains under the exact mask, which method {self.method} "
                "has in no step; choose method fixed, gates or ste, or quantize none"
            )
        if self.sparsity != "2:4":
            raise ValueError(
                f"quantize {self.quantize} needs sparsity 2:4, not {self.sparsity}: "
                "only 2:4 weights are served in integers"
            )
        for name in ("scale_parts", "is_sharded"):
            if getattr(self, name):
                raise ValueError(
                    f"quantize {self.quantize} cannot go with {name} {getattr(self, name)}; "
                    "set one of them to its default"
                )
        first = 0.0 if self.method == "fixed" else self.hard_fraction
        if not first <= self.quantized_fraction < 1:
            raise ValueError(
                f"quantized_fraction {self.quantized_fraction} must be below 1 and not below "
                f"hard_fraction {first}: scales are chosen under the exact mask"
            )

    def _check_keep_best(self) -> None:
        if self.method == "adams":
            raise ValueError("keep_best compares exact masks, but adams prunes after its last step")
        if not self.evaluate_every:
            raise ValueError("keep_best needs evaluate_every above 0: it compares what is measured")
        if self.steps % self.evaluate_every:
            raise ValueError(
                f"steps {self.steps} is no multiple of evaluate_every {self.evaluate_every}; "
                "keep_best can only keep what is measured"
            )
        if self.checkpoint_every not in (0, self.evaluate_every):
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be 0 or evaluate_every "
                f"{self.evaluate_every}: keep_best saves whatever it measures"
            )

    def check_convertible(self) -> None:
        """Refuses what `cast-serve convert` makes nothing of.

        Raises:
            ValueError: naming the setting.
        """
        if self.sparsity != "2:4" or self.method == "dense":
            name = "method" if self.method == "dense" else "sparsity"
            raise ValueError(
                f"{name} {getattr(self, name)} has no compressed weights, only 2:4 has; train it "
                "with cast-train run alone"
            )

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.sparsity)

    @property
    def is_solved(self) -> bool:
        """Whether the kept weights are solved for the mask before they are trained."""
        return self.method == "fixed" or self.masks_first

    @property
    def first_order(self) -> str:
        """`start`, and what ``auto`` stands for."""
        if self.start != "auto":
            return self.start
        is_moved = self.method == "gates" and self.selector != "penalty" and not self.masks_first
        return "sparsegpt" if is_moved else "wanda"

    @classmethod
    def from_toml(
        cls, path: Path | None, assignments: Sequence[str] = (), **flags: Any
    ) -> "TrainConfig":
        """Reads a file of ``key = value`` lines; flags that are not None win over it.

        Args:
            path: TOML file, or None for the defaults.
            assignments: of --set, see `parse_assignments`; they win over file and flags.
            flags: settings from the command line.

        Raises:
            ValueError: if the file is missing or no TOML, or a key is unknown, or a value is wrong.
        """
        settings = {} if path is None else read_toml(path)
        given = {key: flag for key, flag in flags.items() if flag is not None}
        return cls.from_dict(settings | given | parse_assignments(assignments))

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TrainConfig":
        """The inverse of `as_dict`; lists become tuples.

        Raises:
            ValueError: if a key is unknown, or a value is wrong.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            faults = [_describe(fault) for fault in error.errors(include_url=False)]
            raise ValueError("; ".join(faults)) from None

    def as_dict(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a file, unchecked.

    Raises:
        ValueError: if the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the settings {path}: {error}") from error


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts -> settings, unchecked; the last of a key counts.

    A value is read as TOML has it; what is not TOML is a string, so that names need no quotes.

    Raises:
        ValueError: if one is no KEY=VALUE.
    """
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"{text!r} is not KEY=VALUE; write for instance steps=100")
        try:
            settings[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key] = value
    return settings


def _describe(fault: ErrorDetails) -> str:
    """One of pydantic's errors in a line: the setting, its value, the limit and the default."""
    if not fault["loc"]:  # of several settings together
        return str(fault["ctx"]["error"])
    name = str(fault["loc"][0])
    if fault["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        if not (near := difflib.get_close_matches(name, known, 1)):
            return f"unknown setting {name}; the settings are {', '.join(known)}"
        kind = type_in_words(TypeAdapter(TrainConfig).json_schema()["properties"][near[0]])
        default = getattr(TrainConfig, near[0])
        return f"unknown setting {name}; the nearest is {near[0]} ({kind}; default: {default})"
    limit = fault["msg"].replace("Input should", "must").replace("tuple", "list of strings")
    return f"{name} is {fault['input']!r}, but {limit} (default: {getattr(TrainConfig, name)})"


def type_in_words(schema: Mapping[str, Any]) -> str:
    """What a setting takes, by its JSON schema: ``whole number above 0``, ``gates or ste``."""
    if "anyOf" in schema:  # a type, or none
        return type_in_words(schema["anyOf"][0])
    if "enum" in schema:
        *others, last = map(str, schema["enum"])
        return f"{', '.join(others)} or {last}"
    names = {"integer": "whole number", "boolean": "true or false", "array": "list of strings"}
    words = names.get(schema["type"], str(schema.get("format", schema["type"])))
    if "minimum" in schema and "maximum" in schema:
        return f"{words} from {schema['minimum']:g} to {schema['maximum']:g}"
    if "exclusiveMinimum" in schema:
        words += f" above {schema['exclusiveMinimum']:g}"
    if "minimum" in schema:
        words += f", {schema['minimum']:g} or more"
    if "maximum" in schema:
        words += f", at most {schema['maximum']:g}"
    return words
