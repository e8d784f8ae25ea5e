"""N:M patterns: a weight or score tensor -> groups, exact masks, checks, and their errors.

A *group* is M consecutive weights along in_features (the last dimension). A *mask* is a bool
tensor, True = kept. This module needs torch only and is imported by everything.
"""

import itertools
import math
import re
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
            PatternError: if the text is not ``N:M`` with 0 < N < M <= 256.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise PatternError(
                f"sparsity {text!r} is not N:M with 0 < N < M; write for instance 2:4"
            )
        if int(match[2]) > MAX_M:
            raise PatternError(f"sparsity {text!r} has groups of more than {MAX_M} weights")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def zeros(self) -> float:
        """The share of weights that are not kept."""
        return 1 - self.n / self.m

    def check_zeros(self, share: float) -> None:
        """Refuses a share of zeros over all targets that no choice of dense linears gives.

        Raises:
            ValueError: if it is neither 1, for the pattern everywhere, nor in (0, `zeros`].
        """
        if not (share == 1 or 0 < share <= self.zeros):
            raise ValueError(
                f"zeros {share} is no share above 0 and up to {self.zeros:g}, all that {self} has; "
                "write for instance 0.45, or leave it at 1 for the pattern in every linear"
            )


TWO_FOUR = Pattern(2, 4)
MAX_M = 256  # `hard_mask` counts ranks in 8 bits
MAX_PATTERNS = 70  # of a group in `gumbel_topk`: 4:8


def groups(tensor: Tensor, m: int) -> Tensor:
    """Views [..., K] as [..., K / m, m].

    Raises:
        PatternError: if K is no multiple of m.
    """
    if tensor.shape[-1] % m:
        raise PatternError(
            f"in_features {tensor.shape[-1]} is no multiple of {m}: no whole groups of {m}"
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
    columns = [column.contiguous() for column in grouped.unbind(-1)]
    ranks = [torch.zeros_like(columns[0], dtype=torch.uint8) for _ in columns]
    for left in range(pattern.m):  # counting is far faster than sorting at such small M
        for right in range(left + 1, pattern.m):
            is_right_larger = columns[right] > columns[left]
            ranks[left] += is_right_larger
            ranks[right] += ~is_right_larger
    return (torch.stack(ranks, dim=-1) < pattern.n).flatten(-2)


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
