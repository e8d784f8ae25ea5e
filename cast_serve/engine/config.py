"""A checkpoint's ``quantization_config`` -> which of its layers run sparse in vLLM.

The plugin claims compressed-tensors checkpoints
    with a sparsity_config of the format ``sparse-24-bitmask`` or, on a CPU, ``sparse-64-bitmask``;
    with one of the format ``dense``, which vLLM 0.32 itself refuses (its #51188);
    without one, if ``--quantization cast_sparse24`` asks for it: config.json does not say that
        they are 2:4, so `cast-serve worker` looks at the values and asks.
Served as they are: sparse weights as bitmasks in the model's dtype or in 4 bits, and int8 or float8
(e4m3) weights as bitmasks or with their zeros.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from cast_serve.checkpoint.declared import BITMASK_64
from cast_serve.checkpoint.record import checked_kept
from cast_serve.engine.claims import FORMATS, METHOD, claims
from cast_serve.engine.head import HeadMethod
from cast_serve.engine.linear import SparseLinearMethod, Stored
from cast_serve.engine.report import kernel_of
from cast_serve.errors import UsageError
from cast_serve.kernels.cpu import build
from cast_serve.sparsity.pattern import TWO_FOUR, WORD, Pattern, PatternError
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS

logger = logging.getLogger(f"vllm.{__name__}")  # so that vLLM shows what we log

REMEDY = "run `cast-serve convert SRC OUT` and serve OUT; convert says so if it cannot read SRC"
DTYPES = {"int-quantized": torch.int8, "float-quantized": torch.float8_e4m3fn}
INT4 = "pack-quantized"  # as bitmasks only
HEADS = (
    Stored(torch.int8),
    Stored(torch.int8, has_zeros=True),
    *(Stored(torch.int8, has_zeros=True, scale_group=group) for group in INT4_SCALE_GROUPS),
)
# What a quantised checkpoint must say, per part of its config_groups. A scale belongs to a row of
# the weight (channel) or to all of it (tensor). Activations of int8 weights are quantised as they
# come, finer than any file asks for; those of float8 weights are not.
# 4-bit weights have a scale for each group of columns.
STRATEGIES = ("channel", "tensor")
INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True}
SERVED: dict[str, dict[str, dict[str, Any]]] = {
    "int-quantized": {
        "weights": {"num_bits": 8, "type": "int", "symmetric": True},
        "input_activations": INT8_ACTIVATIONS,
    },
    INT4: {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"},
        "input_activations": INT8_ACTIVATIONS,
    },
    "float-quantized": {"weights": {"num_bits": 8, "type": "float", "symmetric": True}},
}


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfig):
    """vLLM's configuration of a sparse checkpoint.

    Args:
        ignore: module names, or regular expressions after ``re:``, that are not sparse.
        stored: how the sparse weights are stored.
        unquantized: names, as in ignore, that stay in the model's dtype all the same.
        head: how the output layer is stored, if it is quantised; None: as the sparse weights.
        kept_of_64: N by name, of the linears of an N:64 checkpoint whose N is another than
            `stored`'s.
    """

    def __init__(
        self,
        ignore: list[str],
        stored: Stored = Stored(),  # noqa: B008, frozen
        unquantized: list[str] | None = None,
        head: Stored | None = None,
        kept_of_64: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.kept_of_64 = kept_of_64 or {}
        self.ignore = ignore
        self.stored = stored
        self.head = replace(head or stored, kept=None)
        self.unquantized = unquantized or []
        self._num_unpacked = 0  # linears of vLLM, made and not loaded yet
        self._num_linears = 0  # as on disk, so a qkv that vLLM merged counts three

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims what the module's docstring says, and no others."""
        return METHOD if claims(hf_quant_cfg, user_quant) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseConfig":
        """Reads config.json's ``quantization_config``.

        Raises:
            UsageError: if the checkpoint is quantised in a form that is not served, or neither 2:4
                nor N:64, or N:64 on a GPU, or targets other layers than linears.
        """
        sparsity = config.get("sparsity_config") or {}
        has_zeros = sparsity.get("format") not in FORMATS
        form, scheme = config.get("format", "dense"), config.get("config_groups") or {}
        unquantized = list(config.get("ignore") or [])
        if has_zeros and form not in DTYPES:
            raise UsageError(
                f"the checkpoint stores the zeros of its weights, in the format {form!r}, which "
                f"is served unconverted only in {' and '.join(DTYPES)}; {REMEDY}"
            )
        if has_zeros:
            stored = _stored(form, scheme, has_zeros)
            return cls(unquantized, stored, unquantized)
        kept = _kept(sparsity)
        kept_of_64 = checked_kept("config.json", sparsity.get("kept_of_64"))
        ignore = list(sparsity.get("ignore") or [])
        if form == "dense" and not scheme:
            return cls([*ignore, *unquantized], Stored(kept=kept), kept_of_64=kept_of_64)
        head = None
        heads = {name: group for name, group in scheme.items() if _is_head(group, form)}
        if heads:
            scheme = {name: group for name, group in scheme.items() if name not in heads}
            own = next(iter(heads.values())).get("format") or "int-quantized"
            head = _stored(own, heads, has_zeros=True)
            if head.scale_group is not None and not current_platform.is_cpu():
                raise UsageError(
                    "the checkpoint has an output layer in 4 bits, which only CPUs multiply here; "
                    "convert the model with --head int8 for GPUs"
                )
        stored = replace(_stored(form, scheme, has_zeros), kept=kept)
        return cls(ignore, stored, unquantized, head, kept_of_64)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a target, of a quantised head, of an ignored linear; else None.

        Raises:
            UsageError: if a linear is quantised and not sparse, or a head in a form that is not
                served.
        """
        # Of a draft vLLM says "draft_model.model...", and GPT-2's head is ".lm_head" to it.
        prefix = prefix.removeprefix("draft_model.").removeprefix(".")
        stored = self.head if isinstance(layer, ParallelLMHead) else self.stored
        if self._is_in(self.unquantized, prefix):
            stored = Stored(kept=stored.kept)
        if isinstance(layer, ParallelLMHead):
            if stored.dtype and stored not in HEADS:
                raise UsageError(
                    f"{prefix} is quantised, as {stored}; a head is served unquantised, in int8 "
                    "with a scale for each row, or in 4 bits in a group of its own, and without an "
                    f"input_scale; {REMEDY}"
                )
            return HeadMethod(prefix, stored) if stored.dtype else None
        if not isinstance(layer, LinearBase):
            return None
        if not self._is_in(self.ignore, prefix):
            self._num_unpacked += 1
            stored = replace(stored, kept=self._kept(prefix))
            return SparseLinearMethod(prefix, stored, self._count)
        if stored.dtype:
            raise UsageError(
                f"{prefix} is quantised and not sparse; only the head is served in that form; "
                f"{REMEDY}"
            )
        return UnquantizedLinearMethod()

    def _count(self, layer: nn.Module) -> None:
        """Says what runs, once all is loaded."""
        self._num_unpacked -= 1
        self._num_linears += layer.cast_num_linears
        if self._num_unpacked == 0:
            op, runs_on = kernel_of(layer)
            pattern = "2:4" if self.stored.kept is None else "N:64"
            logger.info(
                "%s is active: %d linears run %s on %s", pattern, self._num_linears, op, runs_on
            )
            if not layer.packed.is_cuda:
                logger.info("the sparse kernels come from %s", build.build())

    def _kept(self, prefix: str) -> int | None:
        """Of 64 columns, of a linear of vLLM; None: 2:4.

        Raises:
            UsageError: if it is made of linears that keep different numbers.
        """
        parent, dot, last = prefix.rpartition(".")
        names = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]
        found = {self.kept_of_64.get(name, self.stored.kept) for name in names}
        if len(found) > 1:
            raise UsageError(
                f"{', '.join(names)} keep {sorted(map(str, found))} of 64 weights, but vLLM "
                "merges them into one linear: convert a model that keeps the same number in each"
            )
        return found.pop()

    def _is_in(self, names: list[str], prefix: str) -> bool:
        mapping = self.packed_modules_mapping
        return bool(should_ignore_layer(prefix, ignore=names, fused_mapping=mapping))


def _is_head(group: Mapping[str, Any], form: str) -> bool:
    """Whether one of the ``config_groups`` is of a head that is not quantised as the linears are.

    Args:
        form: of ``format``, the linears'.
    """
    has_own_group = INT4 in (form, group.get("format"))
    return has_own_group and group.get("targets") != ["Linear"]


def _kept(sparsity: Mapping[str, Any]) -> int | None:
    """Of 64 columns, of a ``sparsity_config`` with bitmasks; None: 2:4.

    Raises:
        UsageError: if it is not served here.
    """
    structure, targets = sparsity.get("sparsity_structure"), sparsity.get("targets")
    is_wide = sparsity.get("format") == BITMASK_64
    try:
        pattern = Pattern.parse(str(structure))
    except PatternError:
        pattern = None
    is_known = pattern is not None and (pattern.m == WORD if is_wide else pattern == TWO_FOUR)
    if targets != ["Linear"] or not is_known:
        raise UsageError(
            f"the format {sparsity.get('format')} with sparsity_structure {structure!r} and "
            f"targets {targets} is not served; {'N:64' if is_wide else '2:4'} on ['Linear'] is "
            "needed"
        )
    if is_wide and not current_platform.is_cpu():
        raise UsageError(
            f"the checkpoint keeps {structure} weights, which only CPUs multiply here; GPUs take "
            "2:4: serve the dense twin there (cast-serve convert SRC OUT --dense-twin DIR)"
        )
    return pattern.n if is_wide and pattern is not None else None


def _stored(form: str, scheme: dict[str, Any], has_zeros: bool) -> Stored:
    """How the weights of a quantised checkpoint are stored; refuses what would be computed wrongly.

    Args:
        form: of ``format``.
        scheme: the ``config_groups``.
        has_zeros: whether the zeros of the weights are stored.

    Raises:
        UsageError: naming what is not served.
    """
    if form not in SERVED or not scheme:
        raise UsageError(
            f"the checkpoint is sparse and quantised ({form}); sparse weights are served in bf16, "
            f"fp16, fp32, as {' or '.join(DTYPES)} with 8 bits or {INT4} with 4; {REMEDY}"
        )
    key, known = ("group_size", INT4_SCALE_GROUPS) if form == INT4 else ("strategy", STRATEGIES)
    for name, group in scheme.items():
        for part, wanted in SERVED[form].items():
            for each, value in wanted.items():
                _check(form, f"{name}.{part}.{each}", (group.get(part) or {}).get(each), (value,))
        _check(form, f"{name}.weights.{key}", group["weights"].get(key), known)
    found = {group["weights"][key] for group in scheme.values()}
    if len(found) > 1:
        raise UsageError(f"config_groups differ in weights.{key}: {sorted(found)}; {REMEDY}")
    inputs = [group.get("input_activations") or {"dynamic": True} for group in scheme.values()]
    has_input_scale = not all(activations.get("dynamic") for activations in inputs)
    if has_input_scale:
        logger.warning(
            "the input_scale of the checkpoint is left out: activations are %s",
            "not quantised" if form == "float-quantized" else "quantised for each token",
        )
    if form == INT4:
        return Stored(torch.int8, True, has_input_scale, has_zeros, found.pop())
    return Stored(DTYPES[form], found == {"channel"}, has_input_scale, has_zeros)


def _check(form: str, key: str, found: Any, served: tuple[Any, ...]) -> None:
    if found not in served:
        raise UsageError(
            f"config_groups.{key} is {found!r}; of {4 if form == INT4 else 8}-bit sparse weights "
            f"{' or '.join(map(repr, served))} is served; {REMEDY}"
        )
