"""A flat TOML table and flags -> the settings of one run, checked, of the type of its method.

    TrainConfig         what every run has
    |- Dense
    `- Pruned           a run that ends in N:M
       |- Adams
       `- Masked        a run whose last steps compute with the exact mask
          |- Fixed
          |- Ste
          `- Gates

A setting that a method does not have is an unknown key of its type.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
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
from pydantic_core import ErrorDetails

from cast_serve.checkpoint.quantization import Quantization
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import WORD, Pattern, patterns_of
from cast_serve.sparsity.quantize import SCALE_GROUP
from cast_serve.sparsity.targets import check_expressions

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]  # some step comes after it
Temperature = Annotated[float, Field(ge=1e-4)]  # of a selection, in logits
Names = Annotated[tuple[str, ...], Strict(False)]  # also accepts a list, as TOML and JSON have it


class TrainConfig(BaseModel):
    """What every run of `cast-train run` has. Fractions are of `steps`, so the plan scales with it.

    The text below a setting is its entry in docs/settings.md.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    method: str
    """where the mask comes from. `gates`: learnt, by a gate beside every weight. `fixed`:
    `start`'s, unchanged. `ste`: magnitudes, straight through, with SR-STE decay. `adams`: dense
    forward, decay in the optimiser, pruned at the end. `dense`: no mask, plain fine-tuning"""
    include: Names = ()
    """regular expressions; if set, only linears with matching names are targets"""
    exclude: Names = ()
    """regular expressions; linears with matching names stay dense"""
    steps: PositiveInt = 64
    """optimiser steps"""
    block_size: Annotated[int, Field(ge=2)] = 512
    """tokens per training sequence"""
    batch_blocks: PositiveInt = 2
    """sequences per forward pass and process"""
    accumulation: PositiveInt = 1
    """forward passes per step"""
    is_checkpointed: bool = False
    """recompute activations in the backward pass to save memory"""
    learning_rate: NonNegativeFloat = 5e-4
    """peak learning rate of the weights"""
    warmup_fraction: Fraction = 0.05
    """when the learning rate has risen linearly to its peak; a cosine decay follows"""
    max_grad_norm: Annotated[float, Field(allow_inf_nan=True)] = 1.0
    """norm to clip gradients to"""
    distillation_weight: Fraction = 0.9
    """eta: share of the loss that is distillation from the dense model"""
    distillation_temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """temperature of both models' logits in that loss"""
    hidden_states_weight: NonNegativeFloat = 10.0
    """loss weight of the distance between hidden states of model and teacher; unused if
    `distillation_weight` is 0"""
    heldout_blocks: PositiveInt = 16
    """training sequences held out to measure quality on"""
    evaluate_every: NonNegativeInt = 0
    """steps between measurements of held-out text and gates; 0: only at the end"""
    keep_best: bool = False
    """keep the exact-mask checkpoint with the lowest loss on sequences held out of the training
    text, measured every `evaluate_every` steps"""
    train_embeddings: bool = False
    """also train embeddings and head"""
    is_sharded: bool = False
    """shard all parameters by rows over the processes (FSDP2); no process ever holds the whole
    model"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the model; `auto`: bf16 where the hardware has it"""
    checkpoint_every: NonNegativeInt = 0
    """steps between resumable checkpoints; 0: save by time"""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """minutes between resumable checkpoints if `checkpoint_every` is 0"""
    checkpoint_async: bool = False
    """with `is_sharded`: write checkpoints while training goes on, from a copy in host memory"""
    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "comet_ml", "trackio"] = "none"
    """also report every step to this tracker, whose package must be installed"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """seed of sequence order, `generator`'s initial weights and `gumbel`'s noise"""

    @model_validator(mode="after")
    def _checked(self) -> "TrainConfig":
        self.check()
        return self

    def check(self) -> None:
        """Checks settings against each other."""
        check_expressions((*self.include, *self.exclude))
        self.check_unused("distillation_temperature", bool(self.distillation_weight), "a teacher")
        self.check_unused("checkpoint_async", self.is_sharded, "is_sharded")
        if not self.keep_best:
            return
        if self.is_sharded:
            raise UsageError("is_sharded and keep_best cannot both be true; set one to false")
        if not self.evaluate_every:
            raise UsageError("keep_best needs evaluate_every > 0, which measures the checkpoints")
        if self.steps % self.evaluate_every:
            raise UsageError(
                f"keep_best needs steps {self.steps} to be a multiple of evaluate_every "
                f"{self.evaluate_every}, so that the last step is measured; change one of them"
            )
        if self.checkpoint_every not in (0, self.evaluate_every):
            raise UsageError(
                f"with keep_best, which saves what it measures, checkpoint_every "
                f"{self.checkpoint_every} must be 0 or evaluate_every's {self.evaluate_every}"
            )

    def check_unused(self, name: str, is_used: bool, needs: str) -> None:
        """Refuses a setting that was changed although another makes it irrelevant."""
        value = getattr(self, name)
        if not is_used and value != type(self).model_fields[name].default:
            raise UsageError(f"{name} {value} has no effect without {needs}; leave it out")

    def check_convertible(self) -> None:
        """Refuses settings whose result cannot be compressed (`cast-serve convert`)."""
        if self.method == "dense":
            raise UsageError(
                "method dense makes no sparse weights to compress; leave --convert out"
            )

    @property
    def pattern(self) -> Pattern:
        return Pattern(2, 4)  # of Dense: decides which linears have weight decay

    @property
    def is_solved(self) -> bool:
        """Whether the weights that a mask keeps are solved for it before they are trained."""
        return False

    @property
    def waits(self) -> bool:
        """Whether the weights stay dense and unmoved until the mask is exact."""
        return False

    @property
    def is_solved_again(self) -> bool:
        """Whether rows in which a learnt mask has changed are solved for it as it is hardened."""
        return False

    @property
    def quantization(self) -> Quantization | None:
        """What the last steps compute with."""
        return None

    @property
    def first_exact_step(self) -> int:
        """The first step that computes with the exact mask; `steps`: none does."""
        return self.steps

    @property
    def first_quantized_step(self) -> int | None:
        """The first step with a quantised forward, at the latest the last one; None: none is."""
        return None

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
            UsageError: if the file cannot be read, a key is unknown or a value is wrong.
        """
        settings = {} if path is None else read_toml(path)
        given = {key: flag for key, flag in flags.items() if flag is not None}
        return cls.from_dict(settings | given | parse_assignments(assignments))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `as_dict`: the type that `method` names, `gates` by default.

        Raises:
            UsageError: if a key is unknown or a value is wrong.
        """
        method = settings.get("method", DEFAULT_METHOD)
        try:
            return _ANY.validate_python({**settings, "method": method})
        except ValidationError as error:
            faults = [_describe(fault, str(method)) for fault in error.errors(include_url=False)]
            raise UsageError("; ".join(faults)) from None

    def as_dict(self) -> dict[str, Any]:
        """The flat table of all its settings, as JSON has them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self}


class Decayed(TrainConfig):
    """A run whose optimiser is AdamW."""

    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, on the targets' weights (`dense`: would-be targets'); norms, biases, embeddings,
    scales and gates have none"""


class Dense(Decayed):
    """Plain fine-tuning."""

    method: Literal["dense"] = "dense"


class Pruned(TrainConfig):
    """A run that ends in N:M."""

    sparsity: str = "2:4"
    """pattern N:M: keep N of every M weights"""
    channel_order: Literal["auto", "given"] = "auto"
    """order of a dense model's channels, which decides what shares a group. `auto`: search for the
    order that prunes cheapest (permute.py); outputs stay the same. `given`: keep it, as `auto` does
    after `cast-train permute` or where the layout rules out a search"""
    zeros: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of zeros over all target weights, placed where they cost least (allocate.py): with
    N:64 by choosing N per linear, else by keeping some linears dense. 1: `sparsity` everywhere"""
    scale_parts: NonNegativeInt = 0
    """column groups with a learnt scale per row each, folded into the weights on hardening; 0:
    none"""
    calibration_blocks: PositiveInt = 16
    """sequences to measure activations on, for `start`, solving, `zeros` and the channel order"""

    def check(self) -> None:
        super().check()
        pattern = Pattern.parse(self.sparsity)
        pattern.check_zeros(self.zeros)
        if not pattern.zeros:
            raise UsageError(
                f"sparsity is {pattern}, which keeps every weight, so there is nothing to select; "
                f"quantise the dense model instead: cast-train quantize --sparsity {pattern}"
            )

    @property
    def pattern(self) -> Pattern:
        """Of the targets; with `zeros` in N:64 the N that they have on average."""
        return Pattern.parse(self.sparsity).with_zeros(self.zeros)


class Adams(Pruned):
    """Dense forward, decay in the optimiser, pruned at the end; the mask is of the magnitudes."""

    method: Literal["adams"] = "adams"
    keep_best: Literal[False] = False  # compares exact masks, but adams prunes after its last step
    decay: NonNegativeFloat = 2e-4
    """lambda: pull of dropped weights towards 0, added to the gradients"""
    mask_every: PositiveInt = 10
    """steps between refreshes of AdamS's mask"""


class Masked(Pruned, Decayed):
    """A run whose last steps compute with the exact mask."""

    start: Literal["ones", "magnitude", "wanda", "sparsegpt"] = "wanda"
    """initial ranking: `magnitude`, `wanda` or `sparsegpt`, with weights solved for that mask by
    least squares (solve.py), or `ones` (not `fixed`; no ranking, dense weights). `ste` ranks by it
    throughout"""
    quantize: Literal["none", "int8", "int4"] = "none"
    """compute the last steps with weights of that many bits and 8-bit activations, as served after
    `cast-serve convert --quantize` (quantizing.py)"""
    scale_group: Literal[128, 64, 32] = 128
    """columns of a row that share a scale in `int4`"""
    quantized_fraction: BelowOne = 0.5
    """with `quantize`: when the quantised forward starts"""

    def check(self) -> None:
        super().check()
        self.check_unused("scale_group", self.quantize == "int4", "quantize int4")
        self.check_unused("quantized_fraction", self.quantize != "none", "quantize")
        if self.quantize == "none":
            return
        if self.scale_parts:
            raise UsageError(
                f"quantize {self.quantize} cannot be combined with scale_parts "
                f"{self.scale_parts}; leave one of them out"
            )
        if self.quantized_fraction < self.exact_fraction:
            raise UsageError(
                f"quantized_fraction {self.quantized_fraction} must not be below hard_fraction "
                f"{self.exact_fraction}: scales are chosen under the exact mask"
            )

    @property
    def exact_fraction(self) -> float:
        """From then on the mask is exact."""
        return 0.0

    @property
    def is_solved(self) -> bool:
        return self.start != "ones"

    @property
    def quantization(self) -> Quantization | None:
        if self.quantize == "none":
            return None
        return Quantization(
            self.quantize, self.scale_group if self.quantize == "int4" else SCALE_GROUP
        )

    @property
    def first_exact_step(self) -> int:
        return self._step_of(self.exact_fraction)

    @property
    def first_quantized_step(self) -> int | None:
        return None if self.quantize == "none" else self._step_of(self.quantized_fraction)

    def _step_of(self, fraction: float) -> int:
        return min(math.ceil(fraction * self.steps), self.steps - 1)


class Fixed(Masked):
    """The mask of `start`, kept; its weights are solved and then trained."""

    method: Literal["fixed"] = "fixed"
    start: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"


class Learnt(Masked):
    """A run that learns its mask until it is exact."""

    hard_fraction: BelowOne = 0.05
    """when the mask becomes exact and frozen; after that only weights learn"""

    @property
    def exact_fraction(self) -> float:
        return self.hard_fraction


class Ste(Learnt):
    """The weights' sizes rank them in every step, straight through."""

    method: Literal["ste"] = "ste"
    decay: NonNegativeFloat = 2e-4
    """share of a dropped weight that is added to its gradient"""


class Gates(Learnt):
    """A gate beside every weight."""

    method: Literal["gates"] = "gates"
    selector: Literal["soft_topk", "gumbel", "penalty", "generator"] = "soft_topk"
    """how gates become a soft mask; see selection.py"""
    gate_learning_rate: NonNegativeFloat = 1e-3
    """learning rate of the gate logits until the mask is exact, after about ten warm-up steps: a
    logit's move per step for a gradient of its tensor's usual size (optimizer.py)"""
    budget_learning_rate: NonNegativeFloat = 0.0
    """with `zeros` in N:64, until the mask is exact: usual move of a linear's N per step, up where
    one more weight lowers the loss most, down elsewhere (budget.py). 0: N stays as `zeros` chose
    it"""
    penalty_weight: NonNegativeFloat = 0.1
    """lambda: peak weight of the sparsity penalty"""
    penalty_ramp: Literal["constant", "linear", "cosine"] = "linear"
    """how lambda rises from 0 to its peak (`constant`: at once)"""
    tau_start: Temperature = 0.1
    """temperature of the selection at step 0, in logits"""
    tau_end: Temperature = 1e-3
    """temperature from `tau_end_fraction` on"""
    tau_end_fraction: Fraction = 0.04
    """when tau, falling geometrically, reaches `tau_end`"""
    blend_end_fraction: Fraction = 0.0
    """when the blend, rising from 0 (dense), reaches 1 (soft mask)"""
    blend_ramp: Literal["linear", "cosine"] = "linear"
    """shape of that rise"""
    gumbel_noise: NonNegativeFloat = 0.5
    """noise of the `gumbel` selector at step 0, in logits; 0 once tau reaches `tau_end`"""
    masks_first: bool = False
    """freeze the dense weights while the gates learn, then solve the kept ones by least squares
    (solve.py) and train them, with warm-up"""

    def check(self) -> None:
        super().check()
        self.check_unused("gumbel_noise", self.selector == "gumbel", "selector gumbel")
        if self.selector == "gumbel":
            patterns_of(self.pattern.n, self.pattern.m)
        if self.tau_end > self.tau_start:
            raise UsageError(
                f"tau_end {self.tau_end} is above tau_start {self.tau_start}; tau must fall"
            )
        if self.hard_fraction < max(self.blend_end_fraction, self.tau_end_fraction):
            raise UsageError(
                f"hard_fraction {self.hard_fraction} must not be below blend_end_fraction "
                f"{self.blend_end_fraction} or tau_end_fraction {self.tau_end_fraction}: "
                "the last steps must see the exact mask that is served"
            )
        self.check_unused("budget_learning_rate", self.hard_fraction > 0, "a hard_fraction above 0")
        if self.budget_learning_rate:
            self._check_budget()
        if self.is_sharded and self.selector == "generator":
            raise UsageError(
                "is_sharded cannot be combined with selector generator, whose network all layers "
                "share; choose soft_topk, or set is_sharded to false"
            )

    def _check_budget(self) -> None:
        if self.pattern.m != WORD or self.zeros == 1:
            raise UsageError(
                f"budget_learning_rate {self.budget_learning_rate} needs zeros below 1 in N of 64, "
                f"but sparsity is {self.sparsity} and zeros {self.zeros:g}; for example, set "
                "sparsity 32:64 and zeros 0.5"
            )
        if self.selector != "soft_topk":
            raise UsageError(
                f"budget_learning_rate does not work with selector {self.selector}; choose "
                "soft_topk"
            )
        if self.is_sharded:
            raise UsageError(
                "budget_learning_rate cannot be combined with is_sharded; leave one of them out"
            )

    @property
    def is_solved(self) -> bool:
        if self.selector == "penalty" and not self.masks_first:  # the model is dense at first
            return False
        return super().is_solved or self.masks_first

    @property
    def waits(self) -> bool:
        return self.masks_first and self.first_exact_step > 0

    @property
    def is_solved_again(self) -> bool:
        return self.is_solved and self.first_exact_step > 0 and not self.waits


METHODS: dict[str, type[TrainConfig]] = {
    "gates": Gates,
    "fixed": Fixed,
    "ste": Ste,
    "adams": Adams,
    "dense": Dense,
}
DEFAULT_METHOD = "gates"
RETIRED = ("allocation",)  # settings of earlier releases, in their records
_ANY: TypeAdapter[TrainConfig] = TypeAdapter(
    Annotated[Gates | Fixed | Ste | Adams | Dense, Field(discriminator="method")]
)


def of_method(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that only other methods have, or that no release has any more.

    Earlier releases recorded all settings for every method; runs to compare have some in common.
    """
    own = METHODS.get(settings.get("method", DEFAULT_METHOD), TrainConfig).model_fields
    known = {name for config in METHODS.values() for name in config.model_fields} | {*RETIRED}
    return {name: value for name, value in settings.items() if name in own or name not in known}


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a file, unchecked.

    Raises:
        UsageError: if the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings {path}: {error}") from error


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts -> settings, unchecked; the last of a key counts.

    A value is read as TOML; what is not TOML is a string, so names need no quotes.

    Raises:
        UsageError: if one is not KEY=VALUE.
    """
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UsageError(f"{text!r} is not KEY=VALUE; write, for example, steps=100")
        try:
            settings[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key] = value
    return settings


def _describe(fault: ErrorDetails, method: str) -> str:
    """One of pydantic's errors in a line: the setting, its value, the limit and the default."""
    limit = fault["msg"].replace("Input should", "must").replace("tuple", "list of strings")
    if fault["type"] == "union_tag_invalid":
        return f"method is {method!r}, but must be {either(METHODS)} (default: {DEFAULT_METHOD})"
    if len(fault["loc"]) < 2:  # of several settings together
        return str(fault["ctx"]["error"])
    name, fields = str(fault["loc"][1]), METHODS[method].model_fields
    if fault["type"] == "extra_forbidden":
        return _unknown(name, method)
    if fault["type"] == "literal_error":
        limit += f" with method {method}"
    return f"{name} is {fault['input']!r}, but {limit} (default: {fields[name].default})"


def _unknown(name: str, method: str) -> str:
    if having := [other for other, config in METHODS.items() if name in config.model_fields]:
        return (
            f"method {method} has no setting {name}, only {either(having)} has; "
            f"set method, or leave {name} out"
        )
    fields = METHODS[method].model_fields
    if not (near := difflib.get_close_matches(name, fields, 1)):
        return f"unknown setting {name}; method {method} has {', '.join(fields)}"
    if near[0] == "method":
        return f"unknown setting {name}; the nearest is method ({either(METHODS)})"
    kind = type_in_words(METHODS[method].model_json_schema()["properties"][near[0]])
    default = fields[near[0]].default
    return f"unknown setting {name}; the nearest is {near[0]} ({kind}; default: {default})"


def either(names: Iterable[object]) -> str:
    """``a, b or c``."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def type_in_words(schema: Mapping[str, Any]) -> str:
    """What a setting takes, by its JSON schema: ``integer > 0``, ``gates or ste``."""
    if "anyOf" in schema:  # a type, or none
        return type_in_words(schema["anyOf"][0])
    if "enum" in schema:
        return either(schema["enum"])
    names = {"integer": "integer", "boolean": "boolean", "array": "strings"}
    words = names.get(schema["type"], str(schema.get("format", schema["type"])))
    if "minimum" in schema and "maximum" in schema:
        return f"{words} {schema['minimum']:.10g}–{schema['maximum']:.10g}"
    for limit, text in (
        ("exclusiveMinimum", " > {:.10g}"),
        ("minimum", " ≥ {:.10g}"),
        ("maximum", ", ≤ {:.10g}"),
        ("exclusiveMaximum", ", < {:.10g}"),
    ):
        if limit in schema:
            words += text.format(schema[limit])
    return words
