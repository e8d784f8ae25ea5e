"""One compressed linear of a checkpoint -> a vLLM linear that runs ``cast::linear24(_int8)``.

It creates parameters for the tensors on disk, so that vLLM's own loaders merge qkv and gate_up and
narrow for tensor parallelism. After loading it packs them into the kernel's layout and deletes
them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from cast_serve import kernels
from cast_serve.engine.packing import keep_scales, load_kernels, row_scales
from cast_serve.kernels.gpu import dispatch


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """A linear, possibly a merged one, whose weight is packed 2:4.

    Args:
        prefix: the layer's name.
        is_quantized: whether the kept weights are int8, with a scale a row.
    """

    def __init__(self, prefix: str, is_quantized: bool = False) -> None:
        self.prefix = prefix
        self.is_quantized = is_quantized

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

        They are ``compressed``, ``bitmask``, ``shape`` and, of quantised weights, ``weight_scale``.

        Raises:
            ValueError: if in_features cannot be cut into whole groups and bitmask bytes.
        """
        is_sharded = input_size_per_partition != input_size
        unit = 8 if is_sharded else 4
        if input_size_per_partition % unit:
            raise ValueError(
                f"{self.prefix}: in_features {input_size} over "
                f"{input_size // input_size_per_partition} tensor-parallel ranks leaves "
                f"{input_size_per_partition} per rank, no multiple of {unit}; use fewer ranks"
            )
        rows = sum(output_partition_sizes)

        def on_disk(columns: int, dtype: torch.dtype) -> ModelWeightParameter:
            return ModelWeightParameter(
                data=torch.zeros(rows, columns, dtype=dtype),
                input_dim=1,
                output_dim=0,
                weight_loader=extra_weight_attrs["weight_loader"],
            )

        half = input_size_per_partition // 2
        dtype = torch.int8 if self.is_quantized else params_dtype
        layer.register_parameter("compressed", on_disk(half, dtype))
        layer.register_parameter("bitmask", on_disk(-(-half // 4), torch.uint8))
        shape = nn.Parameter(torch.zeros(2, 1, dtype=torch.int64), requires_grad=False)
        shape.weight_loader = _shape_checker(self.prefix, input_size)
        layer.register_parameter("shape", shape)
        if self.is_quantized:
            layer.register_parameter("weight_scale", row_scales(rows, extra_weight_attrs))
        layer.cast_out_features = rows
        layer.cast_in_features = input_size_per_partition
        layer.cast_num_linears = len(output_partition_sizes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs into the kernel's layout and deletes the loaded parameters.

        Raises:
            PatternError: if a group of the bitmask has not exactly two bits (a bitmask that was
                not in the checkpoint is all zeros).
            ValueError: if a scale is not positive and finite (one that was not in the checkpoint
                is zero), or int8 weights are to run in fp32 on a GPU.
        """
        load_kernels(layer.compressed.is_cuda)
        try:
            packed = kernels.pack(layer.compressed.data, layer.bitmask.data)
        except ValueError as error:
            raise type(error)(f"{self.prefix}: {error}") from None
        for name in ("compressed", "bitmask", "shape"):
            delattr(layer, name)
        layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
        if self.is_quantized:
            keep_scales(layer, self.prefix)
        form = dispatch.wanted_form() if packed.is_cuda else "packed"
        second = dispatch.second_form(
            packed,
            layer.cast_out_features,
            layer.cast_in_features,
            torch.int8 if self.is_quantized else layer.params_dtype,
            form,
        )
        layer.cast_form = form if second else "packed"
        layer.cast_second = nn.ParameterList(nn.Parameter(part, False) for part in second)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        packed, out_features = layer.packed, layer.cast_out_features
        if self.is_quantized:
            return torch.ops.cast.linear24_int8(x, packed, layer.scale, out_features, bias)
        if layer.cast_form == "packed":
            return torch.ops.cast.linear24(x, packed, out_features, bias)
        second = list(layer.cast_second)
        return torch.ops.cast.linear24_many(x, packed, out_features, bias, second, layer.cast_form)


def _shape_checker(prefix: str, in_features: int) -> Callable[..., None]:
    def check(param: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
        found = loaded.flatten().tolist()
        if len(found) != 2 or found[1] != in_features:
            raise ValueError(
                f"{prefix}: the checkpoint says shape {found}, but in_features is {in_features}"
            )

    return check
