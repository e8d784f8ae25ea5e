"""A quantised output head of a checkpoint -> a vLLM head that runs a kernel for dense integers.

checkpoint/head.py has its tensors. `cast-serve convert --quantize` writes them for tied embeddings
too; the embedding that tokens are looked up in stays in the model's dtype. 8 bits run
``cast::linear_int8``, 4 bits ``cast::linear64``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import ModelWeightParameter

from cast_serve import kernels
from cast_serve.engine.linear import Stored
from cast_serve.engine.packing import (
    check_words,
    keep_scales,
    load_kernels,
    row_scales,
    shape_checked,
    take_scales,
)
from cast_serve.sparsity.nibbles import NIBBLES, unpack_nibbles


class HeadMethod(QuantizeMethodBase):
    """A `ParallelLMHead` with integer weights: a scale for each row, or of 4 bits scale group.

    Args:
        prefix: the layer's name.
        stored: how its tensors are stored.
    """

    def __init__(self, prefix: str, stored: Stored) -> None:
        self.prefix = prefix
        self.scale_group = stored.scale_group

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
        """Creates parameters for the tensors on disk: ``weight`` and ``weight_scale``, or of 4 bits
        ``weight_packed``, ``weight_scale`` and ``weight_shape``."""
        rows = sum(output_partition_sizes)  # padded to a multiple of 64

        def on_disk(columns: int, dtype: torch.dtype) -> ModelWeightParameter:
            return ModelWeightParameter(
                data=torch.zeros(rows, columns, dtype=dtype),
                input_dim=1,
                output_dim=0,
                weight_loader=extra_weight_attrs["weight_loader"],
            )

        if self.scale_group is None:
            layer.register_parameter("weight", on_disk(input_size_per_partition, torch.int8))
            layer.register_parameter("weight_scale", row_scales(rows, extra_weight_attrs))
        else:
            words = on_disk(input_size_per_partition // NIBBLES, torch.int32)
            layer.register_parameter("weight_packed", words)
            scale = on_disk(input_size_per_partition // self.scale_group, torch.float32)
            layer.register_parameter("weight_scale", scale)
            layer.register_parameter("weight_shape", shape_checked(self.prefix, input_size))
        layer.cast_out_features, layer.cast_in_features = rows, input_size_per_partition

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs into the kernel's layout and deletes the loaded parameters.

        Raises:
            UsageError: if a scale is not positive and finite, rows of 4 bits were not loaded, or
                the head runs in fp32 on a GPU.
            PatternError: if in_features of 4 bits is not a multiple of 64.
        """
        load_kernels(layer.weight_scale.is_cuda)
        num_loaded = layer.shard_indices.num_org_elements  # the others are padding
        scale = take_scales(layer, self.prefix, num_loaded, scale_group=self.scale_group)
        if self.scale_group is None:
            keep_scales(layer, self.prefix, scale)
            packed = kernels.pack_dense(layer.weight.data)
            del layer.weight
        else:
            words = layer.weight_packed.data
            check_words(self.prefix, words[:num_loaded])
            del layer.weight_packed, layer.weight_shape
            values = unpack_nibbles(words, layer.cast_in_features)
            packed = kernels.pack_dense_int4(values, scale, self.scale_group)
            layer.cast_scale_group = self.scale_group
        layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., hidden size] -> logits [..., vocabulary, padded]."""
        return kernels.multiply_dense(
            x,
            layer.packed,
            layer.cast_out_features,
            bias,
            scale=layer.scale if self.scale_group is None else None,
            scale_group=self.scale_group,
        )
