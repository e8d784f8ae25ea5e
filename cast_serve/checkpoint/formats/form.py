"""What `ModelDirectory` asks a form on disk: which linears it stores, and one of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from cast_serve.checkpoint.declared import Structure, weights_of
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.stored import StoredModel
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS, SCALE_GROUP

# Tensors beside a weight that are read with it, or left out.
SCALE_PARTS = (
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "scale_packed",
    "meta",
    "input_scale",
    "input_zero_point",
)


class Form(ABC):
    """How a directory stores the weights of its targets.

    Attributes:
        kind: dense, pruned, gated, compressed; by another program: quantised, with its zeros
            stored or as marlin-24, or ragged, rows of any count.
        source: the directory.
        linears: those that are stored so; of a form that any linear may have, none.
        quantized: int8, int4 or float8 if their weights are, else None.
        is_widened: whether quantised weights can only become unquantised ones: float8, and integers
            whose scale groups no kernel has.
        is_foreign: whether it is not as `convert` writes it.
        structure: what the linears become, where neither cast.json nor config.json says; else None.
        dense: modules in another form than the model's that become dense, by `dense_weight`.
    """

    kind: ClassVar[str]
    quantized: str | None = None
    is_widened = False
    is_foreign = False
    structure: Structure | None = None
    dense: Sequence[str] = ()

    def __init__(self, source: StoredModel, linears: Iterable[str] = ()) -> None:
        self.source = source
        self.linears = sorted(linears)

    @abstractmethod
    def read(self, name: str) -> CompressedLinear:
        """A target's kept values, hardened.

        Raises:
            CheckpointError: if it is damaged, or stored in a way that is not read; naming it.
            PatternError: if it has another pattern.
        """

    def dense_weight(self, name: str) -> Tensor:
        """The weight of a module of `dense`, as the model stores it.

        Raises:
            KeyError: if it is not one of them.
        """
        raise KeyError(f"{name} is not in {self.dense}, which is {self.kind}")

    @property
    def scale_group(self) -> int | None:
        """Of 4-bit weights, the columns that share a scale when they are converted; else None.

        The largest of our scale groups that divides all that config.json names.
        """
        if self.quantized != "int4" or self.is_widened:
            return None
        declared = weights_of(self.source.quantization)
        sizes = [weights.get("group_size") or SCALE_GROUP for weights in declared]
        return next((g for g in INT4_SCALE_GROUPS if all(size % g == 0 for size in sizes)), None)
