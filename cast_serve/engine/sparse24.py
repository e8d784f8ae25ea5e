"""A `sparse-24-bitmask` checkpoint -> vLLM linears that run ``cast::linear24``.

`Sparse24Config` says which layers are sparse; `Sparse24LinearMethod` creates the tensors that are
on disk, so that vLLM's own loaders merge qkv and gate_up and narrow for tensor parallelism, packs
them into the kernel's layout after loading, and drops them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.parameter import ModelWeightParameter

from cast_serve import kernels
from cast_serve.kernels.gpu import dispatch

METHOD = "cast_sparse24"
FORMAT = "sparse-24-bitmask"


@register_quantization_config(METHOD)
class Sparse24Config(QuantizationConfig):
    """Which layers of a checkpoint are 2:4-sparse.

    Args:
        ignore: module names, or regular expressions after ``re:``, that stay dense.
    """

    def __init__(self, ignore: list[str]) -> None:
        super().__init__()
        self.ignore = ignore

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims compressed-tensors checkpoints in our format, and no others."""
        sparsity = (hf_quant_cfg or {}).get("sparsity_config") or {}
        return METHOD if sparsity.get("format") == FORMAT else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sparse24Config":
        """Reads config.json's ``quantization_config``.

        Raises:
            ValueError: if the checkpoint is quantised as well, or not 2:4, or targets other layers
                than linears.
        """
        sparsity = config["sparsity_config"]
        if config.get("format", "dense") != "dense" or config.get("config_groups"):
            raise ValueError(
                f"the checkpoint is 2:4-sparse and quantised ({config.get('format')}); "
                "only unquantised 2:4 weights are served"
            )
        if sparsity.get("sparsity_structure") != "2:4" or sparsity.get("targets") != ["Linear"]:
            raise ValueError(
                f"sparsity_structure {sparsity.get('sparsity_structure')!r} with targets "
                f"{sparsity.get('targets')} is not served; 2:4 on ['Linear'] is needed"
            )
        return cls([*sparsity.get("ignore", []), *config.get("ignore", [])])

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

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The sparse method for a target, the dense one for an ignored linear, else None."""
        if not isinstance(layer, LinearBase):
            return None
        if should_ignore_layer(
            prefix, ignore=self.ignore, fused_mapping=self.packed_modules_mapping
        ):
            return UnquantizedLinearMethod()
        return Sparse24LinearMethod(prefix)


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """One linear (merged ones count as one) whose weight is packed 2:4."""

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
        """Creates what is on disk: ``compressed``, ``bitmask`` and ``shape``.

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
        layer.register_parameter("compressed", on_disk(half, params_dtype))
        layer.register_parameter("bitmask", on_disk(-(-half // 4), torch.uint8))
        shape = nn.Parameter(torch.zeros(2, 1, dtype=torch.int64), requires_grad=False)
        shape.weight_loader = _shape_checker(self.prefix, input_size)
        layer.register_parameter("shape", shape)
        layer.cast_out_features = rows
        layer.cast_in_features = input_size_per_partition
        layer.cast_num_linears = len(output_partition_sizes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs into the kernel's layout and drops what was loaded.

        Raises:
            PatternError: if a group of the bitmask has not exactly two bits (a tensor that was
                not in the checkpoint has none).
        """
        kernels.load()
        try:
            packed = kernels.pack(layer.compressed.data, layer.bitmask.data)
        except ValueError as error:
            raise type(error)(f"{self.prefix}: {error}") from None
        for name in ("compressed", "bitmask", "shape"):
            delattr(layer, name)
        layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
        form = dispatch.wanted_form() if packed.is_cuda else "packed"
        second = dispatch.second_form(
            *(packed, layer.cast_out_features, layer.cast_in_features, layer.params_dtype, form)
        )
        layer.cast_form = form if second else "packed"
        layer.cast_second = nn.ParameterList(nn.Parameter(part, False) for part in second)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        arguments = (x, layer.packed, layer.cast_out_features, bias)
        if layer.cast_form == "packed":
            return torch.ops.cast.linear24(*arguments)
        return torch.ops.cast.linear24_many(*arguments, [*layer.cast_second], layer.cast_form)


def _shape_checker(prefix: str, in_features: int) -> Callable[..., None]:
    def check(param: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
        found = loaded.flatten().tolist()
        if len(found) != 2 or found[1] != in_features:
            raise ValueError(
                f"{prefix}: the checkpoint says shape {found}, but in_features is {in_features}"
            )

    return check


def report(model: nn.Module) -> dict[str, Any]:
    """What a loaded vLLM model really runs.

    Returns:
        num_sparse_layers and num_dense_layers (linears as on disk, so a merged qkv counts three),
        weight_bytes of all linears as held, dense_weight_bytes they would take, isa (the CPU
        kernel, or the GPU's architecture and second form; None if no layer is sparse).
    """
    num_sparse = num_dense = weight_bytes = dense_weight_bytes = 0
    runs_on = None
    for module in model.modules():
        if not isinstance(module, LinearBase):
            continue
        packed = getattr(module, "packed", None)
        if isinstance(module.quant_method, Sparse24LinearMethod) and packed is not None:
            num_sparse += module.cast_num_linears
            weight_bytes += packed.nbytes + sum(part.nbytes for part in module.cast_second)
            runs_on = _runs_on(packed, module.cast_form)
            itemsize = module.params_dtype.itemsize
            dense_weight_bytes += module.cast_out_features * module.cast_in_features * itemsize
        else:
            num_dense += len(getattr(module, "output_sizes", [0]))
            num_bytes = _dense_bytes(module)
            weight_bytes += num_bytes
            dense_weight_bytes += num_bytes
    return {
        "num_sparse_layers": num_sparse,
        "num_dense_layers": num_dense,
        "weight_bytes": weight_bytes,
        "dense_weight_bytes": dense_weight_bytes,
        "isa": runs_on,
    }


def _runs_on(packed: Tensor, form: str) -> str:
    if not packed.is_cuda:
        return kernels.isa()
    card = dispatch.properties(packed.device.index)
    return f"sm_{card.major}{card.minor}" + ("" if form == "packed" else f" {form}")


def _dense_bytes(module: LinearBase) -> int:
    out_features = getattr(module, "output_size_per_partition", module.output_size)
    in_features = getattr(module, "input_size_per_partition", module.input_size)
    return int(out_features * in_features * module.params_dtype.itemsize)
