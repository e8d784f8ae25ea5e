"""Texts + TrainConfig -> token blocks to train on, calibrate, choose and measure with."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cast_serve.errors import UsageError
from cast_train import documents, sharding
from cast_train.config import Pruned, TrainConfig
from cast_train.tokens import are_tokenized, check_whole, mapped, read_tokens, to_blocks, tokenize

# Texts above this are tokenised once, to a folder, and not by every process of every run.
MOST_BYTES = 1 << 30


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Token blocks as a causal language model's training set: the labels are the inputs.

    Args:
        texts: of unsigned types, [num_blocks, block_size] each, in memory or mapped from files.
        ids: which blocks in which order, int64 [number], counted through all texts.
    """

    def __init__(self, texts: Sequence[NDArray[Any]], ids: NDArray[np.int64]) -> None:
        self.texts = texts
        self.ids = ids
        self._ends = np.cumsum([len(text) for text in texts])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.ids[index]
        i = int(np.searchsorted(self._ends, block, side="right"))
        row = self.texts[i][block - (self._ends[i] - len(self.texts[i]))]
        tokens = torch.from_numpy(row.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}

    def tensor(self, most_blocks: int | None = None) -> Tensor:
        """The first blocks, int64 [num_blocks, block_size]; all with None."""
        rows = range(len(self))[:most_blocks]
        blocks = [self[row]["input_ids"] for row in rows]
        return torch.stack(blocks) if blocks else torch.empty(0, 0, dtype=torch.int64)


class RandomOrder(Sampler[int]):
    """Every block once an epoch, in the order of accelerate's SeedableRandomSampler.

    That one makes Python numbers of all at the start of an epoch: 0.8 GB of them for 20 million
    blocks.

    Args:
        number: of blocks.
        seed: of the first epoch; the next has the next seed.
    """

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.number

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's DataLoader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for part in torch.randperm(self.number, generator=generator).split(1 << 10):
            yield from part.tolist()
        self.epoch += 1


@dataclass(frozen=True)
class Blocks:
    """A run's text.

    Attributes:
        train: trained on.
        calibration: its beginning, which activations are measured on, int64 [num_blocks,
            block_size], as the next two are.
        validation: kept out of the training text; `keep_best` chooses by it.
        heldout: what quality is measured on: validation, or a text of its own.
        heldout_name: its description.
    """

    train: TokenBlocks
    calibration: Tensor
    validation: TokenBlocks
    heldout: Tensor
    heldout_name: str


def read_blocks(
    texts: Sequence[Path],
    heldout_file: Path | None,
    tokenizer: Any,
    config: TrainConfig,
    weights: Sequence[float] | None = None,
) -> Blocks:
    """Reads and cuts the texts.

    Args:
        texts: of `documents.find`, or folders of tokens.
        heldout_file: text to measure quality on; None: blocks kept out of the texts.
        tokenizer: the model's.
        config: all settings.
        weights: each text's share of what is trained on, of any sum; None: all texts are one.

    Raises:
        UsageError: if a text cannot be read or is too short.
    """
    size = config.block_size
    heldout, name = None, "held-out split of the training text"
    if heldout_file is not None:  # the short text first: what is wrong with it shows at once
        tokens = read_tokens([heldout_file], tokenizer, config.heldout_blocks * size)
        heldout, name = to_blocks(tokens, size), heldout_file.name
    parts = [[text] for text in texts] if weights else [texts]
    cut = [_cut(_tokens(part, tokenizer), size) for part in parts]
    arrays = [array for part in cut for array in part]
    step = config.batch_blocks * config.accumulation * sharding.num_processes()
    num_blocks = sum(map(len, arrays))
    train, validation = split_held_out(num_blocks, config.heldout_blocks, step, size)
    if weights:
        ends = np.cumsum([sum(map(len, part)) for part in cut])
        of_each = np.split(train, np.searchsorted(train, ends[:-1]))
        if short := [text for text, ids in zip(texts, of_each, strict=True) if not len(ids)]:
            raise UsageError(f"all blocks of {short[0]} are held out; give more of that text")
        train = _mixed(of_each, weights, step * config.steps, config.seed)
    else:  # however the processes share a step: the order is drawn for this number of blocks
        train = train[: len(train) // step * step]
    training, kept_out = TokenBlocks(arrays, train), TokenBlocks(arrays, validation)
    calibration = training.tensor(config.calibration_blocks if isinstance(config, Pruned) else 0)
    if heldout is None:
        heldout = kept_out.tensor()
    return Blocks(training, calibration, kept_out, heldout, name)


def _tokens(texts: Sequence[Path], tokenizer: Any) -> list[NDArray[Any]]:
    """Tokens [num_tokens], in one array or in a folder's shards.

    Raises:
        UsageError: if there is more text than is to be tokenised for one run.
    """
    if are_tokenized(texts):
        return [shard for text in texts for shard in mapped(text, tokenizer, is_shuffled=True)]
    sources = documents.find(texts)
    of_hub = [source.name for source in sources if source.path is None]
    if of_hub or sum(source.num_bytes for source in sources) > MOST_BYTES:
        what = (
            f"{of_hub[0]} is not a file here; if it is a hub's data set"
            if of_hub
            else f"--text has more than {MOST_BYTES >> 30} GB"
        )
        raise UsageError(
            f"{what}, tokenise it once for all processes and runs: cast-train tokenize --model "
            f"MODEL --text {texts[0]} --out DIR; then train with --text DIR"
        )
    return [np.concatenate(list(tokenize(documents.Documents(sources), tokenizer)))]


def _cut(tokens: Sequence[NDArray[Any]], size: int) -> list[NDArray[Any]]:
    """Whole blocks [num_blocks, size] of each array.

    Raises:
        UsageError: if there is none.
    """
    cut = [each[: len(each) // size * size].reshape(-1, size) for each in tokens]
    check_whole(sum(map(len, tokens)), sum(map(len, cut)), size)
    return cut


def split_held_out(
    num_blocks: int, num_heldout: int, min_train: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Takes evenly spaced blocks out as the held-out split, so that training needs no test text.

    Evenly spaced, because texts come sorted by source: the last blocks would be all of one kind.

    Args:
        num_blocks: how many there are.
        num_heldout: to be kept out.
        min_train: that must be left.
        size: tokens of a block, for the message.

    Returns:
        ids of training blocks and of held-out blocks, int64, rising.

    Raises:
        UsageError: if there are too few blocks.
    """
    if num_blocks < num_heldout + min_train:
        raise UsageError(
            f"the text has {num_blocks * size} tokens in whole blocks, but "
            f"{(num_heldout + min_train) * size} are needed: {min_train} blocks of {size} to train "
            f"on and {num_heldout} held out; give more text, or lower heldout_blocks or block_size"
        )
    heldout = np.arange(num_heldout) * num_blocks // num_heldout
    return np.delete(np.arange(num_blocks), heldout), heldout


def _mixed(
    of_each: Sequence[NDArray[np.int64]], weights: Sequence[float], number: int, seed: int
) -> NDArray[np.int64]:
    """That many ids, drawn from each text by its weight, in random order.

    A text gives all its blocks before it gives one again.
    """
    random = np.random.default_rng(seed)
    ends = np.rint(np.cumsum(weights) / sum(weights) * number).astype(int)
    drawn = []
    for ids, count in zip(of_each, np.diff(ends, prepend=0), strict=True):
        passes = [random.permutation(ids) for _ in range(math.ceil(count / len(ids)))]
        drawn.append(np.concatenate([ids[:0], *passes])[:count])
    return random.permutation(np.concatenate(drawn))
