"""UTF-8 text + tokenizer -> token blocks int64 [num_blocks, block_size], and a held-out split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from cast_serve.errors import UsageError

# Texts are tokenised in pieces cut at line ends: one call per book would show no progress.
PIECE_CHARS = 200_000


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Token blocks as a causal language model's training set: the labels are the inputs."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def read_texts(paths: Sequence[Path]) -> str:
    """The files' texts, one after the other.

    Raises:
        UsageError: if no file is given, or one is missing, not UTF-8, or empty.
    """
    if not paths:
        raise UsageError("no text file is given; name one with --text FILE")
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        except OSError as error:
            raise UsageError(f"cannot read the text {path}: {error.strerror}") from error
        if not text.strip():
            raise UsageError(f"{path} is empty")
        texts.append(text)
    return "\n\n".join(texts)


def tokenize(text: str, tokenizer: Any, max_tokens: int | None = None) -> Tensor:
    """Tokens of a text, without the tokenizer's special tokens.

    Args:
        text: any length.
        tokenizer: a transformers tokenizer.
        max_tokens: stop once there are this many; None means all.

    Returns:
        int64 [num_tokens].
    """
    tokens: list[int] = []
    with tqdm(total=len(text), desc="tokens", unit="char", unit_scale=True, delay=2) as bar:
        for piece in _pieces(text):
            tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            bar.update(len(piece))
            if max_tokens is not None and len(tokens) >= max_tokens:
                break
    return torch.tensor(tokens[:max_tokens], dtype=torch.int64)


def _pieces(text: str) -> list[str]:
    pieces, begin = [], 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + PIECE_CHARS) + 1
        end = end if end > 0 else begin + PIECE_CHARS
        pieces.append(text[begin:end])
        begin = end
    return pieces


def to_blocks(tokens: Tensor, block_size: int) -> Tensor:
    """Cuts tokens into whole blocks; what is left at the end is dropped.

    Args:
        tokens: int64 [num_tokens].

    Returns:
        int64 [num_blocks, block_size].

    Raises:
        UsageError: if there is none.
    """
    num_blocks = len(tokens) // block_size
    if num_blocks == 0:
        raise UsageError(
            f"the text has {len(tokens)} tokens, but {block_size} are needed for one block; give "
            "more text, or shorter blocks"
        )
    return tokens[: num_blocks * block_size].view(num_blocks, block_size)


def split_held_out(blocks: Tensor, num_heldout: int, min_train: int) -> tuple[Tensor, Tensor]:
    """Takes evenly spaced blocks out as the held-out split, so that training needs no test text.

    Evenly spaced, because texts come sorted by source: the last blocks would be all of one kind.

    Args:
        blocks: int64 [num_blocks, block_size].

    Returns:
        training blocks, at least min_train, and num_heldout held-out blocks.

    Raises:
        UsageError: if there are too few blocks.
    """
    if len(blocks) < num_heldout + min_train:
        size = blocks.shape[1]
        raise UsageError(
            f"the text has {len(blocks) * size} tokens in whole blocks, but "
            f"{(num_heldout + min_train) * size} are needed: {min_train} blocks of {size} to train "
            f"on and {num_heldout} held out; give more text, or lower heldout_blocks or block_size"
        )
    is_heldout = torch.zeros(len(blocks), dtype=torch.bool)
    is_heldout[torch.arange(num_heldout) * len(blocks) // num_heldout] = True
    return blocks[~is_heldout], blocks[is_heldout]
