"""An 8-bit output head of a checkpoint -> a vLLM head that runs ``cast::linear_int8``.

The head is dense: ``lm_head.weight`` int8 [vocabulary, hidden size] and ``lm_head.weight_scale``
[vocabulary, 1]. `cast-serve convert --quantize int8` writes them for tied embeddings too; the
embedding that tokens are looked up in stays in the model's dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import ModelWeightParameter

from cast_serve import kernels
from cast_serve.engine.packing import keep_scales, load_kernels, row_scales, take_scales


class Int8HeadMethod(QuantizeMethodBase):
    """A `ParallelLMHead` with int8 weights and a scale a row.

    Args:
        prefix: the layer's name.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

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
        """Creates parameters for the tensors on disk: ``weight`` and ``weight_scale``."""
        rows = sum(output_partition_sizes)  # padded to a multiple of 64
        weight = ModelWeightParameter(
            data=torch.zeros(rows, input_size_per_partition, dtype=torch.int8),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", row_scales(rows, extra_weight_attrs))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs into the kernel's layout and deletes the loaded parameters.

        Raises:
            ValueError: if a scale is not positive and finite, or the head runs in fp32 on a GPU.
        """
        load_kernels(layer.weight.is_cuda)
        indices = layer.shard_indices
        scale = take_scales(layer, self.prefix, indices.num_org_elements)
        keep_scales(layer, self.prefix, scale)
        layer.cast_out_features, in_features = layer.weight.shape
        layer.cast_in_features = in_features
        packed = kernels.pack_dense(layer.weight.data)
        del layer.weight
        layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., hidden size] -> logits [..., vocabulary, padded]."""
        return torch.ops.cast.linear_int8(
            x, layer.packed, layer.scale, layer.cast_out_features, bias
        )
