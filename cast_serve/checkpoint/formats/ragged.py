"""A directory of ``sparse-bitmask``, rows of any count -> each linear in the least N of 64.

A module has, of its weight [rows, columns] or [columns]:
    compressed   the non-zeros, row after row: bf16, fp16, fp32, int8 or float8
    bitmask      uint8 [rows, ceil(columns / 8)], as ours
    row_offsets  int64 [rows], where a row's values begin in `compressed`
    shape        int64, the weight's

Nothing says how many of each word of 64 columns are kept. Where all words of a linear keep as many,
that is its N. Otherwise N is the least multiple of 4 that holds every word, with zeros among its
kept values; above MOST_KEPT the bitmask saves little, and the linear becomes dense, as do other
modules and linears without whole words. Linears that vLLM merges share one N. If every group of
four keeps at most two, the whole directory is 2:4. Source: sparse_bitmask.py of compressed-tensors
0.12.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cast_serve.checkpoint.declared import Structure
from cast_serve.checkpoint.formats import eight_bits
from cast_serve.checkpoint.formats.form import Form
from cast_serve.checkpoint.formats.integers import SCALE_DTYPES
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.checkpoint.stored import EIGHT_BITS, StoredModel
from cast_serve.sparsity.bitmask import unpack_bits
from cast_serve.sparsity.pattern import MOST_KEPT, TWO_FOUR, WORD, Pattern, PatternError
from cast_serve.sparsity.quantize import dequantize
from cast_serve.sparsity.targets import MERGED

PARTS = ("compressed", "bitmask", "row_offsets", "shape")
STEP = 4  # of N, where words differ


class Ragged(Form):
    """Non-zeros beside the mask of where they were.

    Attributes:
        structure: what the linears become.
        dense: the modules that become dense.
        costs: what N of 64 costs the linears whose words differ; None if none does.
    """

    kind = "ragged"
    is_foreign = True
    structure: Structure

    def __init__(self, source: StoredModel) -> None:
        modules = self.find(source)
        linears = [name for name in source.candidates if name in modules]
        masks = _Masks(source, linears)
        super().__init__(source, masks.kept)
        self.structure = masks.structure
        self.costs = masks.costs
        self.dense = sorted(set(modules) - set(self.linears))
        dtypes = [source.weight_dtypes[name] for name in linears]
        self.quantized = next((EIGHT_BITS[dtype] for dtype in dtypes if dtype in EIGHT_BITS), None)
        self.is_widened = self.quantized == "float8"

    @staticmethod
    def find(source: StoredModel) -> list[str]:
        """The modules of a directory that are stored so."""
        return [name for name, parts in source.part_names.items() if "row_offsets" in parts]

    def read(self, name: str) -> CompressedLinear:
        weight, scale = self._weight(name)
        weight = self.source.turned(name, weight)
        linear = CompressedLinear.from_weight(name, weight, self.structure.of(name))
        return replace(linear, scale=scale)

    def dense_weight(self, name: str) -> Tensor:
        """A module's weight as the model stores it, in the model's dtype if it was quantised.

        Raises:
            CheckpointError: as `read` does.
        """
        weight, scale = self._weight(name)
        return weight if scale is None else dequantize(weight, scale, self.source.model_dtype)

    def _weight(self, name: str) -> tuple[Tensor, Tensor | None]:
        parts = self.source.parts(name)
        weight = unpacked(name, parts)
        if weight.dtype in eight_bits.DTYPES:
            return eight_bits.rows(name, weight, parts, self.source.model_dtype)
        return weight, None


class _Masks:
    """The masks of some linears -> what each is stored as.

    Attributes:
        kept: N by name of the linears that become sparse.
        structure, costs: as `Ragged` has them.
    """

    def __init__(self, source: StoredModel, linears: Iterable[str]) -> None:
        self.kept: dict[str, int] = {}
        is_24 = True
        num_weights = num_values = num_slots = 0
        for name in linears:
            mask = source.turned(name, _mask(name, source.parts(name)))
            is_24 = is_24 and _is_24(mask)
            if mask.shape[1] % WORD:
                self.kept[name] = WORD
                continue
            counts = mask.unflatten(1, (-1, WORD)).sum(-1)
            least, most = int(counts.min()), int(counts.max())
            kept = most if least == most > 0 else max(STEP, -(-most // STEP) * STEP)
            self.kept[name] = kept
            if least != most and kept <= MOST_KEPT:
                num_weights += mask.numel()
                num_values += int(counts.sum())
                num_slots += counts.numel() * kept
        if is_24:
            self.structure, self.costs = Structure(TWO_FOUR), None
            return
        alone = self.kept
        self.kept = {
            name: max(alone.get(other, 0) for other in _merged_with(name)) for name in alone
        }
        self.kept = {name: kept for name, kept in self.kept.items() if kept <= MOST_KEPT}
        if not self.kept:
            raise PatternError(
                f"{source.path}: in each linear, a word of 64 columns keeps more than "
                f"{MOST_KEPT}; serve the dense model that it was made from"
            )
        n = Counter(self.kept.values()).most_common(1)[0][0]
        others = {name: kept for name, kept in self.kept.items() if kept != n}
        self.structure = Structure(Pattern(n, WORD), others)
        self.costs = None
        if num_weights:
            self.costs = (
                f"words of 64 columns keep different numbers, so {num_slots - num_values:,} zeros "
                f"are stored among the kept values of {num_weights:,} weights "
                f"({num_slots / num_weights:.1%} are stored where {num_values / num_weights:.1%} "
                "are not zero); a constant number, as of 32:64, costs nothing"
            )


def _merged_with(name: str) -> list[str]:
    """The linears that vLLM makes one of, itself included."""
    parent, dot, last = name.rpartition(".")
    group = next((merged for merged in MERGED if last in merged), (last,))
    return [f"{parent}{dot}{each}" for each in group]


def _is_24(mask: Tensor) -> bool:
    return mask.shape[1] % 4 == 0 and bool((mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def unpacked(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight of its stored tensors, zeros included.

    Raises:
        CheckpointError: if one is missing, or they do not belong together; naming the row.
    """
    mask = _mask(name, parts)
    values, offsets = parts["compressed"], parts["row_offsets"].flatten()
    counts = mask.sum(-1)
    starts = counts.cumsum(0) - counts
    if offsets.shape != starts.shape or not torch.equal(offsets.long(), starts):
        is_bad = offsets != starts if offsets.shape == starts.shape else torch.ones(1)
        row = int(is_bad.nonzero()[0])
        raise CheckpointError(
            f"{name}.row_offsets do not belong to its bitmask; the first wrong row is {row}; the "
            "file is damaged: copy the directory again"
        )
    if values.dim() != 1 or len(values) != int(counts.sum()):
        raise CheckpointError(
            f"{name}.compressed is {list(values.shape)}, but its bitmask has {int(counts.sum())} "
            "bits; the file is damaged: copy the directory again"
        )
    if values.dtype not in (*SCALE_DTYPES, *eight_bits.DTYPES):
        raise CheckpointError(
            f"{name}.compressed is {values.dtype}, but bf16, fp16, fp32, int8 or float8 is needed; "
            "the file is damaged: copy the directory again"
        )
    octets = values.view(torch.int8) if values.dtype in eight_bits.DTYPES else values
    weight = torch.zeros(mask.shape, dtype=octets.dtype)
    weight[mask] = octets  # which has no float8
    return weight.view(values.dtype).view(parts["shape"].flatten().tolist())


def _mask(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """bool [rows, columns]; a weight of one dimension is a row."""
    if missing := [part for part in PARTS if part not in parts]:
        raise CheckpointError(
            f"{name} lacks {', '.join(missing)} of sparse-bitmask; the checkpoint is incomplete: "
            "copy the directory again"
        )
    shape, bitmask = parts["shape"].flatten().tolist(), parts["bitmask"]
    if not 1 <= len(shape) <= 2 or min(shape) < 1 or parts["shape"].is_floating_point():
        raise CheckpointError(
            f"{name}.shape holds {shape!s:.100}, but one or two sizes above 0 are needed; the file "
            "is damaged: copy the directory again"
        )
    rows = shape[0] if len(shape) == 2 else 1
    bitmask = bitmask.view(1, -1) if bitmask.dim() == 1 else bitmask
    if len(bitmask) != rows:
        raise CheckpointError(
            f"{name}.bitmask has {len(bitmask)} rows, but its shape {rows}; the file is damaged: "
            "copy the directory again"
        )
    return unpack_bits(bitmask, shape[-1], name)
