"""N:M patterns: a weight or score tensor -> groups, exact masks, checks, and their errors.

A *group* is M consecutive weights along in_features (the last dimension). A *mask* is a bool
tensor, True = kept. M divides 64, so every pattern keeps a constant number of each *word* of 64
columns: 16:32 is stored and multiplied as 32:64. 2:4 alone is stored as itself, for a GPU. This
module needs torch only and is imported by everything.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cast_serve.errors import PatternError as PatternError


@dataclass(frozen=True)
class Pattern:
    """N of M consecutive weights are kept."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Parses ``"2:4"``.

        Raises:
            PatternError: if the text is not ``N:M`` with 0 < N < M and M a divisor of 64, or
                ``64:64``, which keeps every weight.
        """
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip())
        n, m = (int(match[1]), int(match[2])) if match else (0, 0)
        if not (0 < n < m and WORD % m == 0 or n == m == WORD):
            raise PatternError(
                f"sparsity {text!r:.100} is not N:M with 0 < N < M and M one of 2, 4, 8, 16, 32, "
                "64, nor 64:64, which keeps every weight; write, for example, 2:4, which a GPU "
                "needs, or 32:64 for a CPU"
            )
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def stored(self) -> "Pattern":
        """What weights of this pattern are stored as: 2:4 as itself, any other as N of 64.

        Raises:
            PatternError: if M does not divide 64, as earlier releases allowed.
        """
        if WORD % self.m:
            raise PatternError(
                f"{self} has no compressed weights and kernels, since {self.m} does not divide "
                f"{WORD}; serve it dense, or train with --sparsity 2:4 or 32:64"
            )
        return self if self == TWO_FOUR else Pattern(self.n * WORD // self.m, WORD)

    @property
    def columns(self) -> int:
        """What in_features must be a multiple of: whole groups, and whole words but of 2:4."""
        return self.m if self == TWO_FOUR else math.lcm(self.m, WORD)

    @property
    def zeros(self) -> float:
        """The share of weights that are not kept."""
        return 1 - self.n / self.m

    def check_zeros(self, share: float) -> None:
        """Refuses a share of zeros over all targets that cannot be had (allocate.py).

        Raises:
            PatternError: if it is neither 1, for the pattern everywhere, nor a share that dense
                linears, or with N:64 linears of another N, leave.
        """
        least, most = 0.0, self.zeros
        if self.m == WORD:
            least, most = (1 - n / WORD for n in (MOST_KEPT, LEAST_KEPT))
        if not (share == 1 or (least <= share <= most and share > 0)):
            limit = f"from {least:g}" if least else "above 0 and"
            raise PatternError(
                f"zeros {share} is not a share {limit} up to {most:g}, the most that {self} "
                "allows; write, for example, 0.45, or leave it at 1 for the pattern in every "
                "linear"
            )

    def with_zeros(self, share: float) -> "Pattern":
        """Of N:64 the nearest to that share of zeros; itself with 1, or another M."""
        if self.m != WORD or share == 1:
            return self
        return Pattern(round(WORD * (1 - share)), WORD)


TWO_FOUR = Pattern(2, 4)
WORD = 64  # columns of a word of the bitmask
# N of 64 that a budget chooses from, and the step between them; above, dense takes no more.
LEAST_KEPT, MOST_KEPT, KEPT_STEP = 4, 56, 4
MAX_PATTERNS = 70  # of a group in `gumbel_topk`: 4:8
COUNTED_M = 8  # up to which counting ranks is faster than sorting
SLAB_WEIGHTS = 1 << 18  # sorted at a time on a CPU: they stay in a core's cache


def groups(tensor: Tensor, m: int) -> Tensor:
    """Views [..., K] as [..., K / m, m].

    Raises:
        PatternError: if K is no multiple of m.
    """
    if tensor.shape[-1] % m:
        raise PatternError(
            f"in_features {tensor.shape[-1]} is not a multiple of {m}: no whole groups of {m}"
        )
    return tensor.unflatten(-1, (-1, m))


def hard_mask(scores: Tensor, pattern: Pattern = TWO_FOUR) -> Tensor:
    """The N largest scores of each group.

    Args:
        scores: any real dtype, [..., K]; ties go to the lower column.

    Returns:
        bool [..., K] with exactly N True in every group, also where scores are equal.

    Raises:
        PatternError: if K is no multiple of M, or a score is NaN.
    """
    grouped = groups(scores, pattern.m)
    if torch.isnan(grouped).any():
        raise PatternError(
            "scores hold NaN, so they cannot be ranked; check the training for divergence"
        )
    if pattern.m <= COUNTED_M:
        return _by_counting(grouped, pattern.n).flatten(-2)
    mask = torch.empty(grouped.shape, dtype=torch.bool, device=grouped.device)
    for rows, kept in slabs(grouped.detach(), mask):
        kept.copy_(_by_sorting(rows.t().contiguous(), pattern.n).t())
    return mask.flatten(-2)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, else 0; without a gradient.

    It is `torch.where(mask, values, 0)` to the bit. That branches on every value, and on masks that
    look random a CPU guesses half of the branches wrong.

    Args:
        values: floating point of 2 or 4 bytes, any shape.
        mask: bool, of that shape.

    Returns:
        the dtype and shape of values.
    """
    integers = torch.int16 if values.element_size() == 2 else torch.int32
    return (values.view(integers) * mask).view(values.dtype)


def slabs(grouped: Tensor, result: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts [..., M] into slabs [groups, M], each with its part of the result.

    Args:
        grouped: any dtype, [..., M].
        result: contiguous, the same shape; it is written through the slabs.
    """
    rows, results = (tensor.view(-1, tensor.shape[-1]) for tensor in (grouped.contiguous(), result))
    # On a GPU every launch costs time, so all groups are one slab.
    size = SLAB_WEIGHTS // rows.shape[1] if rows.device.type == "cpu" else max(len(rows), 1)
    yield from zip(rows.split(size), results.split(size), strict=True)


def _by_counting(grouped: Tensor, n: int) -> Tensor:
    """The mask of scores [..., M]: all pairs are compared."""
    columns = [column.contiguous() for column in grouped.unbind(-1)]
    ranks = [torch.zeros_like(columns[0], dtype=torch.uint8) for _ in columns]
    for left in range(len(columns)):
        for right in range(left + 1, len(columns)):
            is_right_larger = columns[right] > columns[left]
            ranks[left] += is_right_larger
            ranks[right] += ~is_right_larger
    return torch.stack(ranks, dim=-1) < n


def _by_sorting(columns: Tensor, n: int) -> Tensor:
    """The mask [M, groups] of contiguous scores [M, groups].

    It is what lies above the N-th largest score, and of those that equal it the lowest columns.
    """
    least = sort_columns(columns.clone())[-n]
    kept = columns >= least
    tied = (kept.sum(0, dtype=torch.int16) != n).nonzero().flatten()
    if len(tied):
        columns, least = columns[:, tied], least[tied]
        is_above, is_least = columns > least, columns == least
        room = n - is_above.sum(0, dtype=torch.int16)
        kept[:, tied] = is_above | (is_least & (is_least.cumsum(0, dtype=torch.int16) <= room))
    return kept


def sort_columns(columns: Tensor) -> Tensor:
    """Sorts each column of a contiguous [M, groups] in place, ascending, by Batcher's merges.

    A merge of two sorted halves of `block` rows compares rows that are `gap` apart. That takes
    log2(M) (log2(M) + 1) / 2 steps, each a single operation on all groups and pairs, which beats
    torch.sort. If M is not a power of two, torch.sort is used.
    """
    num_rows, num_groups = columns.shape
    if num_rows & (num_rows - 1):
        return columns.copy_(columns.sort(dim=0).values)
    half = 1
    while half < num_rows:
        gap = half
        while gap:
            blocks = columns.view(-1, 2 * half, num_groups)
            unpaired = gap % half  # rows at both ends of a block
            pairs = blocks[:, unpaired : 2 * half - unpaired].unflatten(1, (-1, 2, gap))
            upper, lower = pairs.unbind(2)
            smaller = torch.minimum(upper, lower)
            torch.maximum(upper, lower, out=lower)
            upper.copy_(smaller)
            gap //= 2
        half *= 2
    return columns


def patterns_of(n: int, m: int) -> Tensor:
    """All ways to keep N of M, fp32 [C(m, n), m] of 0 and 1, in lexicographic order.

    Raises:
        PatternError: if there are more than MAX_PATTERNS.
    """
    if math.comb(m, n) > MAX_PATTERNS:
        raise PatternError(
            f"{n}:{m} has {math.comb(m, n)} patterns per group; the gumbel selector takes up to "
            f"{MAX_PATTERNS} (4:8); use soft_topk"
        )
    table = torch.zeros(math.comb(m, n), m)
    for row, kept in zip(table, itertools.combinations(range(m), n), strict=True):
        row[list(kept)] = 1
    return table


def check_weight(weight: Tensor, pattern: Pattern, name: str) -> None:
    """Checks that every group of a weight [out_features, in_features] has at most N non-zeros.

    Raises:
        PatternError: naming the tensor, the first bad row and group, and how many are bad.
    """
    bad = (groups(weight, pattern.m) != 0).sum(-1) > pattern.n
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise PatternError(
            f"{name}: {int(bad.sum())} of {bad.numel()} groups do not have at most {pattern.n} "
            f"non-zeros; the first is row {row}, group {group}; prune or train the model to the "
            "pattern first"
        )
