"""A dense model + calibration blocks -> the same function, its channels in an order that suits N:M.

Another order puts other weights into a group; reorder.py says which channels can be reordered. The
search looks for an order whose groups keep most of the squared Wanda scores (|W_ij| ||x_j||)^2,
since the sum of those that are dropped estimates the output's error. In each round groups are
paired at random, and each pair exchanges the two channels that gain most.
Sources: Pool and Yu, "Channel permutations for N:M sparsity", 2021; Zhang et al., "Plug-and-play:
an efficient post-training pruning method for large language models", 2024, for the first order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import check_new
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern, PatternError
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint import channel_order, models
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.pruning import oneshot
from cast_train.pruning.reorder import layers_of, num_key_heads, reorder, residual_readers
from cast_train.pruning.scores import wanda_scores

# Of all readers together; with few rows the order fits those only (benchmarks/log.md).
MAX_ROWS = 8192
ROUNDS = 128  # more gain little, also where there are more groups (benchmarks/log.md)
MOST_IN_GROUP = 8  # the search's time grows with M: a minute at 2:4, an hour at 16:32
MAX_DIFFERENCE = 1e-3  # of logits, relative to the largest, before and after; fp32 rounds at 1e-6


@torch.no_grad()
def permute(
    model: Any,
    blocks: Tensor,
    pattern: Pattern,
    seed: int = 0,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> tuple[ChannelOrder, dict[str, list[float]]]:
    """Finds an order of a model's channels and reorders them in place.

    Args:
        model: a transformers causal language model of Llama's layout, fp32.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        pattern: N:M.
        seed: of the pairs of groups.
        include: regular expressions, as for `find_targets`; the groups of its targets count.
        exclude: as include.

    Returns:
        The order; and by set of channels [before, after]: the share of the squared scores that the
        pattern keeps, over the rows that were searched, the mean over layers.

    Raises:
        UsageError: if the model has another layout (it is unchanged then), or if it computes
            something else afterwards (it is not usable then).
        PatternError: if its channels make no whole groups, or groups of more than MOST_IN_GROUP.
    """
    if pattern.m > MOST_IN_GROUP:
        raise PatternError(
            f"{pattern} has groups of {pattern.m} channels, and a search would take an hour or "
            f"more; only groups of up to {MOST_IN_GROUP} are searched"
        )
    layers = layers_of(model)
    _check_sizes(layers[0], pattern)
    targets, _ = find_targets(model, pattern, include, exclude)
    before = model(input_ids=blocks[:1], use_cache=False).logits
    scores = wanda_scores(model, targets, blocks)
    of_linear = {linear: scores[name] for name, linear in targets.items()}
    num_orders = 1 + sum(1 + num_key_heads(layer.self_attn) for layer in layers)
    with tqdm(total=num_orders, desc="order", unit="set") as progress:
        search_for = _Searches(pattern, torch.Generator().manual_seed(seed), progress)
        readers = [linear for layer in layers for linear in residual_readers(layer)]
        found = [of_linear[linear] for linear in readers if linear in of_linear]
        num_channels = readers[0].weight.shape[1]
        order = ChannelOrder(search_for.order("residual", num_channels, *found), [], [])
        for layer in layers:
            down = layer.mlp.down_proj
            found = [of_linear[down]] if down in of_linear else []
            order.inner.append(search_for.order("inner", down.weight.shape[1], *found))
            attention = layer.self_attn
            reads: list[list[Tensor]] = [[] for _ in range(num_key_heads(attention))]
            if attention.o_proj in of_linear:
                reads = [[head] for head in _by_key_head(attention, of_linear)]
            order.values.append(
                [search_for.order("values", attention.head_dim, *head) for head in reads]
            )
    reorder(model, order)
    after = model(input_ids=blocks[:1], use_cache=False).logits
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= MAX_DIFFERENCE:
        raise UsageError(
            f"{type(model).__name__} computes something different with its channels reordered "
            f"(logits off by {difference:.2g} of the largest, allowed {MAX_DIFFERENCE})"
        )
    shares = {
        kind: [sum(share) / len(found) for share in zip(*found, strict=True)]
        for kind, found in search_for.shares.items()
    }
    return order, shares


@dataclass
class _Searches:
    """Searches for one set of channels after the other, and collects the shares that are kept."""

    pattern: Pattern
    generator: torch.Generator
    progress: Any
    shares: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def order(self, kind: str, num_channels: int, *readers: Tensor) -> list[int]:
        """One order for the columns of all readers; the given one if there are none.

        Args:
            kind: the set of channels, as reorder.py names it.
            num_channels: of the set.
            readers: Wanda scores of the linears that read them, fp32 [num_rows, num_channels] each.
        """
        self.progress.update()
        if not readers:
            return list(range(num_channels))
        per_reader = max(MAX_ROWS // len(readers), 1)
        squared = [reader[:: -(-len(reader) // per_reader)].square() for reader in readers]
        rows = torch.cat([scores / scores.mean() for scores in squared])
        found, before, after = search(rows, self.pattern, self.generator)
        self.shares.setdefault(kind, []).append((before, after))
        return found.tolist()


def search(
    scores: Tensor, pattern: Pattern, generator: torch.Generator
) -> tuple[Tensor, float, float]:
    """An order of channels whose groups keep a large share of the scores.

    Args:
        scores: fp32 [num_rows, num_channels], none below 0.
        pattern: N:M; num_channels is a multiple of M.
        generator: draws the pairs; on the CPU.

    Returns:
        int64 [num_channels], the channel that each place takes; the share of the scores' sum in the
        N largest of each group and row, in the given order and in this one.
    """
    n, m = pattern.n, pattern.m
    columns = scores.t().contiguous()
    given = torch.arange(len(columns), device=scores.device)
    by_size = columns.sum(1).argsort(descending=True)
    spread = by_size.view(m, -1).t().flatten()  # every group has large and small channels
    total = float(columns.sum())

    def kept(members: Tensor) -> float:
        return float(_largest(members, n)[0].sum()) / total

    first = kept(columns.view(-1, m, len(scores)))
    order = max(given, spread, key=lambda one: kept(columns[one].view(-1, m, len(scores))))
    members, order = columns[order].view(-1, m, len(scores)), order.view(-1, m)
    half = len(members) // 2
    for _ in range(ROUNDS if half else 0):
        pairs = torch.randperm(len(members), generator=generator).to(scores.device)
        _exchange(members, order, pairs[:half], pairs[half : 2 * half], n)
    return order.flatten(), first, kept(members)


def _exchange(members: Tensor, order: Tensor, left: Tensor, right: Tensor, n: int) -> None:
    """Each pair of groups exchanges the two channels, one of each, that gain most, if any gain.

    Args:
        members: [num_groups, M, num_rows], changed in place, as is order [num_groups, M].
        left, right: int64 [num_pairs], the two groups of each pair.
    """
    ours, theirs = members[left], members[right]
    m = ours.shape[1]
    # Without channel i, a group's N largest sum to `rest`. A channel that replaces it adds the
    # amount by which it exceeds the least of them, if it does.
    our_rest, our_least = _without_each(ours, n)
    their_rest, their_least = _without_each(theirs, n)
    kept = torch.stack(
        [
            (our_rest[:, i] + (theirs[:, j] - our_least[:, i]).relu_()).sum(-1)
            + (their_rest[:, j] + (ours[:, i] - their_least[:, j]).relu_()).sum(-1)
            for i in range(m)
            for j in range(m)
        ]
    )
    now = _largest(ours, n)[0].sum(-1) + _largest(theirs, n)[0].sum(-1)
    best, which = kept.max(0)
    gains = best > now * (1 + 1e-6)
    left, right, which = left[gains], right[gains], which[gains]
    i, j = which // m, which % m
    for tensor in (members, order):
        tensor[left, i], tensor[right, j] = tensor[right, j], tensor[left, i]


def _largest(members: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Sum and least of the N largest: [..., M, num_rows], none below 0 -> twice [..., num_rows]."""
    largest = [torch.zeros_like(members[..., 0, :]) for _ in range(n)]
    for item in members.unbind(-2):
        for place in range(n):
            largest[place], item = (
                torch.maximum(largest[place], item),
                torch.minimum(largest[place], item),
            )
    return torch.stack(largest).sum(0), largest[-1]


def _without_each(members: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`_largest` of all channels but the i-th, for each i: twice [num_groups, M, num_rows]."""
    m = members.shape[1]
    found = [_largest(members[:, [k for k in range(m) if k != i]], n) for i in range(m)]
    sums, least = zip(*found, strict=True)
    return torch.stack(sums, 1), torch.stack(least, 1)


def _check_sizes(layer: Any, pattern: Pattern) -> None:
    sizes = {
        "hidden_size": layer.self_attn.q_proj.in_features,
        "intermediate_size": layer.mlp.down_proj.in_features,
        "head_dim": layer.self_attn.head_dim,
    }
    for name, size in sizes.items():
        if size % pattern.m:
            raise PatternError(
                f"{name} {size} is not a multiple of {pattern.m}, so its channels do not form "
                f"whole groups of {pattern}"
            )


def _by_key_head(attention: Any, of_linear: Mapping[nn.Module, Tensor]) -> list[Tensor]:
    """o_proj's scores of each key-value head's channels, [num_readers * num_rows, head_dim]."""
    reads = of_linear[attention.o_proj].unflatten(1, (-1, attention.head_dim))
    per_key_head = reads.shape[1] // num_key_heads(attention)  # query heads that read it
    return [part.flatten(0, 1) for part in reads.split(per_key_head, dim=1)]


def write_permuted(
    model_dir: Path, text_files: Sequence[Path], out: Path, sparsity: str = "2:4"
) -> dict[str, Any]:
    """A dense directory -> another one that computes the same.

    Args:
        model_dir: dense HF directory, or its name on a hub.
        text_files: calibration text; its first `TrainConfig.calibration_blocks` are used.
        out: must not exist.

    Returns:
        cast.json's content; ``kept_share`` is what `permute` returns.

    Raises:
        UsageError: for every wrong input; nothing is written then.
    """
    pattern = Pattern.parse(sparsity)
    check_new(out)
    model_dir = hub.fetch(model_dir)
    models.check_dense(model_dir)
    if channel_order.read(model_dir) is not None:
        raise UsageError(
            f"the channels of {model_dir} were reordered before; give the dense model that it was "
            "made of"
        )
    tokenizer = models.load_tokenizer(model_dir)
    blocks = oneshot.read_calibration(text_files, tokenizer)
    model = models.load_dense(model_dir, torch.float32)
    try:
        order, shares = permute(model, blocks, pattern)
    except UsageError as error:
        raise type(error)(f"{error}; train it without reordering") from error
    record = {
        "kind": "dense",
        "method": "permute",
        "n": pattern.n,
        "m": pattern.m,
        "kept_share": shares,
    }
    model = model.to(torch.bfloat16)
    return models.write(out, model, tokenizer, record, source=model_dir, order=order)
