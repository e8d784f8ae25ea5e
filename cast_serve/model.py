"""A compressed directory -> a transformers model whose sparse linears run the kernels, for Python.

    from cast_serve.model import load

    model = load("DIR")
    model.generate(**tokenizer("The capital of France is", return_tensors="pt"))

Everything else in it is the ordinary model, so `generate`, pipelines and evaluation harnesses take
it. It is for inference: the packed weights have no gradient. vLLM serves faster.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve import kernels
from cast_serve.checkpoint import hub
from cast_serve.checkpoint.architecture import empty_model
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.head import QuantizedHead
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.pattern import TWO_FOUR


class SparseLinear(nn.Module):
    """A linear with a packed sparse weight; integer values round x as they do in vLLM.

    Args:
        linear: the weight as it is stored.
        bias: [out_features], or None.
        dtype: of x and the output, bf16, fp16 or fp32.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: CompressedLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        kernels.load()
        self.in_features, self.out_features = linear.in_features, linear.values.shape[0]
        self.dtype = dtype
        self.scale_group, self.pattern = linear.scale_group, linear.pattern
        self.kept = None if linear.pattern == TWO_FOUR else linear.pattern.n
        scale = linear.scale
        values = linear.values.to(dtype) if scale is None else linear.values
        packed = kernels.pack_sparse(values, linear.bitmask, scale, self.scale_group, self.kept)
        self.register_buffer("packed", packed)
        has_row_scales = scale is not None and self.scale_group is None  # else packed too
        # Not a buffer: `model.to(dtype)` would round it, and the kernel takes fp32.
        self.scale = _row_scales(scale) if scale is not None and has_row_scales else None
        self.register_buffer("bias", bias if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features].

        Raises:
            ValueError: if the weights are not integers and x has another dtype than they.
        """
        is_integer = self.scale is not None or self.scale_group is not None
        if not is_integer and x.dtype != self.dtype:  # the packed bytes hold that dtype's bits
            raise ValueError(
                f"sparse weights packed in {self.dtype} cannot multiply {x.dtype}: call load(DIR, "
                f"dtype={x.dtype}) instead of converting the loaded model"
            )
        return kernels.multiply(
            x,
            self.packed,
            self.out_features,
            self.bias,
            scale=self.scale,
            scale_group=self.scale_group,
            kept=self.kept,
        )

    def extra_repr(self) -> str:
        kind = str(self.pattern) if self.scale is None else f"{self.pattern} int8"
        if self.scale_group is not None:
            kind = f"{self.pattern} int4, scale_group={self.scale_group}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


class IntegerHead(nn.Module):
    """A dense output layer of 8 or 4 bits.

    Args:
        head: the weight as it is stored.
        bias: [vocabulary], or None.
        dtype: of x and the output, bf16, fp16 or fp32.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, head: QuantizedHead, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features = head.values.shape[0]
        self.scale_group = head.scale_group
        self.scale = None
        if head.scale_group is None:
            packed = kernels.pack_dense(head.values)
            self.scale = _row_scales(head.scale)  # not a buffer, as in `SparseLinear`
        else:
            packed = kernels.pack_dense_int4(head.values, head.scale, head.scale_group)
        self.register_buffer("packed", packed)
        self.register_buffer("bias", bias if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> logits [..., vocabulary]."""
        return kernels.multiply_dense(
            x,
            self.packed,
            self.out_features,
            self.bias,
            scale=self.scale,
            scale_group=self.scale_group,
        )


def load(directory: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Loads what `cast-serve convert` wrote, on a CPU, in evaluation mode.

    Args:
        directory: a compressed directory, or its name on a hub.
        dtype: bf16, fp16 or fp32; None: what its config.json says.

    Returns:
        the transformers model of its architecture. Its sparse linears are `SparseLinear`, a
        quantised head is `IntegerHead`.

    Raises:
        CheckpointError: if it is not compressed, damaged, or of another program and not converted;
            or if it cannot be fetched.
        PatternError: if a bitmask is damaged.
        ValueError: if ``CAST_CPU_TUNING`` has no such value.
    """
    source = ModelDirectory(hub.fetch(directory))
    if source.kind != "compressed" or source.form.is_foreign:
        raise CheckpointError(
            f"{directory} is {source.kind}; convert it first (cast-serve convert SRC OUT)"
        )
    kernels.load(tune=True)
    dtype = dtype or source.model_dtype
    model = empty_model(source.path, dtype).eval().requires_grad_(False)
    for name in source.targets:
        linear = CompressedLinear.from_parts(name, source.parts(name), source.pattern_of(name))
        bias = source.get(f"{name}.bias") if f"{name}.bias" in source.files else None
        model.set_submodule(name, SparseLinear(linear, bias, dtype))
    replaced = set(source.targets)
    if source.head_dtype:
        name = str(source.head)
        parts = source.parts(name)
        head = QuantizedHead.from_parts(name, parts)
        model.set_submodule(name, IntegerHead(head, parts.get("bias"), dtype))
        replaced.add(name)
    state = {key: source.get(key) for key in source.files if key.rpartition(".")[0] not in replaced}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if not source.head_dtype:
        model.tie_weights()
    known = {f"{name}.{part}" for name in replaced for part in ("packed", "bias")}
    if source.tied_embedding and not source.head_dtype:
        known.add(f"{source.head}.weight")
    lacking = set(missing) - known
    if unexpected or lacking:
        raise CheckpointError(
            f"{directory} lacks {sorted(lacking)} or holds unknown {sorted(unexpected)}"
        )
    return model


def _row_scales(scale: Tensor) -> Tensor:
    return scale.flatten().float()
