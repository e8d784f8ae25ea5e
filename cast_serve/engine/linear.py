"""One sparse linear of a checkpoint -> a vLLM linear that runs ``cast::linear24*`` or ``linear64``.

It creates parameters for the tensors on disk, so that vLLM's own loaders merge qkv and gate_up and
narrow for tensor parallelism. After loading it packs them into the kernel's layout and deletes
them. float8 weights are multiplied by their scale and rounded once to the dtype that the model runs
in, as `cast-serve convert` does it: they run ``cast::linear24``, and activations stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from cast_serve import kernels
from cast_serve.engine.packing import (
    check_dtype,
    check_words,
    keep_scales,
    load_kernels,
    row_scales,
    shape_checked,
    take_scales,
    weight_scales,
)
from cast_serve.errors import UsageError
from cast_serve.sparsity.bitmask import compress
from cast_serve.sparsity.float8 import widen_float8
from cast_serve.sparsity.nibbles import NIBBLES, unpack_nibbles


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores its sparse weights, or its head.

    Attributes:
        dtype: int8 or float8_e4m3fn, with scales; None: the model's.
        has_row_scales: of 8 bits, whether each row has a scale, else each weight.
        has_input_scale: whether there is an ``input_scale``, which is left out.
        has_zeros: whether ``weight`` holds the zeros; else ``compressed``, ``bitmask`` and
            ``shape`` stand for it.
        scale_group: of 4 bits, the columns that share a scale: dtype is int8 and ``weight_packed``
            stands for ``compressed``; else None.
        kept: of each 64 columns, on a CPU; None: 2:4.
    """

    dtype: torch.dtype | None = None
    has_row_scales: bool = True
    has_input_scale: bool = False
    has_zeros: bool = False
    scale_group: int | None = None
    kept: int | None = None

    def num_kept(self, in_features: int) -> int:
        """Of so many columns."""
        return in_features // 2 if self.kept is None else in_features * self.kept // 64


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """A linear, possibly a merged one, whose weight is packed.

    Args:
        prefix: the layer's name.
        stored: how its tensors are stored.
        on_packed: called with the layer, once its weight is packed.
    """

    def __init__(
        self,
        prefix: str,
        stored: Stored = Stored(),  # noqa: B008, frozen
        on_packed: Callable[[nn.Module], None] = lambda layer: None,
    ) -> None:
        self.prefix = prefix
        self.stored = stored
        self.on_packed = on_packed

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Creates parameters for the tensors on disk.

        They are ``compressed``, ``bitmask`` and ``shape``, or ``weight``; of 8-bit weights also
        ``weight_scale`` and ``input_scale``. Those of 4 bits have ``weight_packed`` in place of
        ``compressed``.

        Raises:
            UsageError: if in_features cannot be cut into whole groups, bitmask bytes and scale
                groups.
        """
        is_sharded = input_size_per_partition != input_size
        scale_group = self.stored.scale_group
        unit = 8 if is_sharded and not self.stored.has_zeros else 4
        if self.stored.kept is not None:
            unit = 64
        if is_sharded and scale_group is not None:
            unit = max(unit, scale_group)
        if input_size_per_partition % unit:
            smaller = "" if scale_group is None else ", or convert with a smaller --scale-group"
            raise UsageError(
                f"{self.prefix}: in_features {input_size} over "
                f"{input_size // input_size_per_partition} tensor-parallel ranks leaves "
                f"{input_size_per_partition} per rank, not a multiple of {unit}; use fewer ranks"
                f"{smaller}"
            )
        rows = sum(output_partition_sizes)
        load = extra_weight_attrs["weight_loader"]
        layer.cast_num_linears = 0  # on disk: q, k and v are one in some models, such as GPT-2

        def load_values(*arguments: Any, **more: Any) -> Any:
            layer.cast_num_linears += 1
            return load(*arguments, **more)

        def on_disk(
            columns: int, dtype: torch.dtype, weight_loader: Callable[..., Any] = load
        ) -> ModelWeightParameter:
            return ModelWeightParameter(
                data=torch.zeros(rows, columns, dtype=dtype),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
            )

        dtype = self.stored.dtype or params_dtype
        if self.stored.has_zeros:
            weight = on_disk(input_size_per_partition, dtype, load_values)
            layer.register_parameter("weight", weight)
        else:
            num_kept = self.stored.num_kept(input_size_per_partition)
            if scale_group is None:
                layer.register_parameter("compressed", on_disk(num_kept, dtype, load_values))
            else:
                words = on_disk(-(-num_kept // NIBBLES), torch.int32, load_values)
                layer.register_parameter("weight_packed", words)
            num_bytes = -(-input_size_per_partition // 8)
            layer.register_parameter("bitmask", on_disk(num_bytes, torch.uint8))
            layer.register_parameter("shape", shape_checked(self.prefix, input_size))
        if scale_group is not None:
            num_groups = -(-input_size_per_partition // scale_group)
            layer.register_parameter("weight_scale", on_disk(num_groups, torch.float32))
        elif self.stored.dtype:
            scales: nn.Parameter = (
                row_scales(rows, extra_weight_attrs)
                if self.stored.has_row_scales
                else weight_scales(len(output_partition_sizes), extra_weight_attrs)
            )
            layer.register_parameter("weight_scale", scales)
        if self.stored.has_input_scale:
            unused = nn.Parameter(torch.zeros(1), requires_grad=False)
            unused.weight_loader = _leave_out
            layer.register_parameter("input_scale", unused)
        layer.cast_out_features = rows
        layer.cast_in_features = input_size_per_partition
        layer.cast_out_sizes = output_partition_sizes
        layer.cast_kept = self.stored.kept

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs into the kernel's layout and deletes the loaded parameters.

        Raises:
            PatternError: if a group of the bitmask has another number of bits than the pattern (a
                bitmask that was not in the checkpoint is all zeros), or a group of a weight with
                its zeros has more than two non-zeros.
            UsageError: if a scale is not positive and finite (one that was not in the checkpoint
                is zero), a float8 weight is NaN, or int8 weights are to run in fp32 on a GPU.
        """
        scale_group = self.stored.scale_group
        loaded = next(
            getattr(layer, part)
            for part in ("weight", "compressed", "weight_packed")
            if hasattr(layer, part)
        )
        values: Tensor = loaded.data
        load_kernels(values.is_cuda)
        scale = None
        if scale_group is not None:
            check_dtype(layer, self.prefix, values.is_cuda)
            check_words(self.prefix, values)
            values = unpack_nibbles(values, self.stored.num_kept(layer.cast_in_features))
            scale = take_scales(layer, self.prefix, scale_group=scale_group)
            layer.cast_scale_group = scale_group
        elif self.stored.dtype:
            out_sizes = None if self.stored.has_row_scales else layer.cast_out_sizes
            row_scale = take_scales(layer, self.prefix, out_sizes=out_sizes)
            if self.stored.dtype == torch.int8:
                keep_scales(layer, self.prefix, row_scale)
            else:
                values = widen_float8(values, row_scale[:, None], layer.params_dtype, self.prefix)
        if self.stored.has_zeros:
            values, bitmask = compress(values, self.prefix)
        else:
            bitmask = layer.bitmask.data
        try:
            packed = kernels.pack_sparse(values, bitmask, scale, scale_group, self.stored.kept)
        except ValueError as error:
            raise type(error)(f"{self.prefix}: {error}") from None
        _keep_packed(layer, packed)
        self.on_packed(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        group = self.stored.scale_group
        is_int8 = self.stored.dtype == torch.int8 and group is None
        scale = layer.scale if is_int8 else None
        return kernels.multiply(
            x,
            layer.packed,
            layer.cast_out_features,
            bias,
            scale=scale,
            scale_group=group,
            kept=self.stored.kept,
        )


def _keep_packed(layer: nn.Module, packed: Tensor) -> None:
    """Replaces what was loaded."""
    for name in ("weight", "compressed", "weight_packed", "bitmask", "shape", "input_scale"):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))


def _leave_out(param: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
    """Loads nothing: activations are not quantised by a scale of the file."""
