"""A TOML file and flags -> TrainConfig: every setting of a run, frozen, checked, written once."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.sparsity.pattern import Pattern, patterns_of

METHODS = ("gates", "ste", "adams", "dense")
SELECTORS = ("soft_topk", "gumbel", "penalty", "generator")
STARTS = ("auto", "ones", "magnitude", "wanda", "sparsegpt")
RAMPS = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """One run of `cast-train run`. Fractions are of `steps`, so the whole plan scales with it.

    Attributes:
        method: how the pattern is learnt; ``gates``: a gate beside every weight; ``ste``: by the
            weights' sizes, straight through, with SR-STE decay; ``adams``: dense forward, decay in
            the optimiser, pruned at the end; ``dense``: not at all, plain fine-tuning to compare.
        selector: how gates become a soft mask; see selection.py.
        sparsity: N:M.
        start: where the gates' order comes from: ``ones`` (none), ``magnitude``, ``wanda`` or
            ``sparsegpt``, which moves the weights too and wants its mask from the start (see
            docs/method.md). For ``ste``, what ranks the weights; ``adams`` ranks by magnitude
            always. ``auto``: ``wanda`` for ``ste`` and for ``penalty``, else ``sparsegpt``.
        include: regular expressions; if given, only linears whose names match are targets.
        exclude: regular expressions; linears whose names match stay dense.
        steps: optimiser steps.
        block_size: tokens of one training sequence.
        batch_blocks: sequences per pass and process.
        accumulation: passes per step.
        is_checkpointed: activations are computed again in backward, for less memory.
        learning_rate: of the weights, AdamW, at its peak.
        gate_learning_rate: of the gate logits, AdamW, at its peak.
        weight_decay: AdamW's, of the weights of the linears that are targets (with ``dense``: that
            would be); norms, biases, embeddings, scales and gates have none. ``adams`` has `decay`
            in its place, and warns.
        warmup_fraction: the learning rates rise linearly this long, then fall along a half cosine.
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
        hard_fraction: from then on the mask is exact, the gates are frozen and only weights learn.
        calibration_blocks: sequences that ``wanda`` and ``sparsegpt`` measure activations on.
        heldout_blocks: sequences taken out of the training text to measure quality on.
        evaluate_every: steps between two measurements on the held-out text, in the phase of the
            moment, with the gates' statistics; 0: only at the end.
        keep_best: the result is the checkpoint with the least loss on sequences kept out of the
            training text, out of those with the exact mask; measured every `evaluate_every` steps.
        train_embeddings: whether embeddings and head are trained too.
        is_sharded: over several processes, each keeps its rows of all parameters in place of a
            copy (FSDP2).
        precision: arithmetic of the model; ``auto``: bf16 where the machine multiplies it natively.
        checkpoint_every: steps between two resumable checkpoints.
        seed: of the order of the sequences.
    """

    method: str = "gates"
    selector: str = "soft_topk"
    sparsity: str = "2:4"
    start: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    steps: int = 32
    block_size: int = 512
    batch_blocks: int = 4
    accumulation: int = 1
    is_checkpointed: bool = False
    learning_rate: float = 5e-4
    gate_learning_rate: float = 1e-2
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    max_grad_norm: float = 1.0
    penalty_weight: float = 0.1
    penalty_ramp: str = "linear"
    tau_start: float = 0.1
    tau_end: float = 1e-3
    tau_end_fraction: float = 0.04
    blend_end_fraction: float = 0.0
    blend_ramp: str = "linear"
    gumbel_noise: float = 0.5
    decay: float = 2e-4
    mask_every: int = 10
    scale_parts: int = 0
    distillation_weight: float = 0.9
    distillation_temperature: float = 1.0
    hard_fraction: float = 0.05
    calibration_blocks: int = 16
    heldout_blocks: int = 16
    evaluate_every: int = 0
    keep_best: bool = False
    train_embeddings: bool = False
    is_sharded: bool = False
    precision: str = "auto"
    checkpoint_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        Pattern.parse(self.sparsity)
        _check_choice("method", self.method, METHODS)
        _check_choice("selector", self.selector, SELECTORS)
        _check_choice("start", self.start, STARTS)
        _check_choice("penalty_ramp", self.penalty_ramp, RAMPS)
        _check_choice("blend_ramp", self.blend_ramp, RAMPS[1:])
        _check_choice("precision", self.precision, PRECISIONS)
        for name in (
            "steps",
            "batch_blocks",
            "accumulation",
            "mask_every",
            "calibration_blocks",
            "heldout_blocks",
            "checkpoint_every",
        ):
            _check_range(name, getattr(self, name), 1)
        _check_range("block_size", self.block_size, 2)
        for name in ("learning_rate", "gate_learning_rate", "weight_decay", "penalty_weight"):
            _check_range(name, getattr(self, name), 0)
        for name in ("gumbel_noise", "decay", "scale_parts", "evaluate_every"):
            _check_range(name, getattr(self, name), 0)
        _check_range("distillation_weight", self.distillation_weight, 0, 1)
        _check_range("distillation_temperature", self.distillation_temperature, 0.01)
        for name in ("tau_start", "tau_end"):
            _check_range(name, getattr(self, name), 1e-4)
        for name in ("warmup_fraction", "tau_end_fraction", "blend_end_fraction", "hard_fraction"):
            _check_range(name, getattr(self, name), 0, 1)
        if self.selector == "gumbel" and self.method == "gates":
            patterns_of(self.pattern.n, self.pattern.m)
        if self.start == "sparsegpt" and self.method == "ste":
            raise ValueError(
                "start sparsegpt moves the weights for a mask of its own, and method ste takes "
                "another; use start wanda, or method gates"
            )
        if self.tau_end > self.tau_start:
            raise ValueError(
                f"tau_end {self.tau_end} is above tau_start {self.tau_start}; tau must fall"
            )
        if self.keep_best:
            self._check_keep_best()
        if not max(self.blend_end_fraction, self.tau_end_fraction) <= self.hard_fraction < 1:
            raise ValueError(
                f"hard_fraction {self.hard_fraction} must be below 1 and not below "
                f"blend_end_fraction {self.blend_end_fraction} and "
                f"tau_end_fraction {self.tau_end_fraction}: "
                "the last steps must see the exact mask that is served"
            )

    def _check_keep_best(self) -> None:
        if self.method == "adams":
            raise ValueError("keep_best compares exact masks, but adams prunes after its last step")
        if not self.evaluate_every:
            raise ValueError("keep_best needs evaluate_every above 0: it compares what is measured")
        for name in ("steps", "checkpoint_every"):
            if getattr(self, name) % self.evaluate_every:
                raise ValueError(
                    f"{name} {getattr(self, name)} is no multiple of evaluate_every "
                    f"{self.evaluate_every}; keep_best can only keep what is measured and saved"
                )

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.sparsity)

    @property
    def first_order(self) -> str:
        """`start`, and what ``auto`` stands for."""
        if self.start != "auto":
            return self.start
        is_masked = self.method == "gates" and self.selector != "penalty"
        return "sparsegpt" if is_masked else "wanda"

    @classmethod
    def from_toml(cls, path: Path | None, **flags: Any) -> "TrainConfig":
        """Reads a file of ``key = value`` lines; flags that are not None win over it.

        Args:
            path: TOML file, or None for the defaults.
            flags: settings from the command line.

        Raises:
            ValueError: if the file is missing or no TOML, or a key is unknown, or a value is wrong.
        """
        settings = {} if path is None else read_toml(path)
        return cls.from_dict(
            settings | {key: flag for key, flag in flags.items() if flag is not None}
        )

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TrainConfig":
        """The inverse of `as_dict`; lists become tuples.

        Raises:
            ValueError: if a key is unknown, or a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(
                f"unknown setting {', '.join(unknown)}; the settings are {', '.join(known)}"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings.items()
        }
        return cls(**values)

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


def _check_type(name: str, value: Any, default: Any) -> None:
    want = type(default)
    right = isinstance(value, want) and (want is bool or not isinstance(value, bool))
    if want is float and isinstance(value, int) and not isinstance(value, bool):
        right = True
    if want is tuple and right:
        right = all(isinstance(item, str) for item in value)
    if not right:
        kind = "list of strings" if want is tuple else want.__name__
        raise ValueError(f"{name} is {value!r}, but must be a {kind}, for instance {default!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} does not exist; choose from {', '.join(choices)}")


def _check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high or value == float("inf"):
        limit = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise ValueError(f"{name} is {value}, but must be {limit}")
