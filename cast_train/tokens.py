"""Documents + tokenizer -> tokens: in memory, or in a folder that runs map and do not read.

`cast-train tokenize` writes such a folder:

    tokens-00000.bin ...   little-endian unsigned integers of 16 or 32 bits, one after another
    tokens.json            their type, number and sha256; what they were made of
    tokenizer.json ...     of the model

Tokens of OUT.partial are kept shard by shard, with the place in the texts where the next begins.
"""

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import (
    CheckpointError,
    check_new,
    check_room,
    fsync,
    read_json,
    sha256,
    to_disk,
)
from cast_serve.errors import UsageError
from cast_serve.provenance import origin
from cast_train.checkpoint import identity, models, resume
from cast_train.documents import FIELD, TOKENS_JSON, TRAIN_SPLIT, Documents, Hub, Source, find

STATE_JSON = "state.json"
FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 26
BATCH_CHARS = 1_000_000  # that a tokenizer gets at once, to share over its threads
CHARS_A_TOKEN = 8  # at most, roughly
Piece = tuple[str, bool]


def tokenize(
    pieces: Iterable[Piece], tokenizer: Any, max_tokens: int | None = None, is_first: bool = True
) -> Iterator[NDArray[np.uint32]]:
    """The tokens of documents, with the tokenizer's end token between two of them.

    Other special tokens are not added. Without an end token a blank line stands in its place.

    Args:
        pieces: of `Documents`.
        tokenizer: a transformers tokenizer.
        max_tokens: stop once there are this many; None means all.
        is_first: whether no document comes before.

    Yields:
        the tokens of some pieces at a time, [num_tokens].
    """
    end = getattr(tokenizer, "eos_token_id", None)
    between = [end] if end is not None else _ids(["\n\n"], tokenizer)[0]
    most_chars = BATCH_CHARS if max_tokens is None else min(BATCH_CHARS, CHARS_A_TOKEN * max_tokens)
    num_tokens = 0
    for batch in _batches(pieces, most_chars):
        found: list[int] = []
        ids = _ids([piece for piece, _ in batch], tokenizer)
        for (_, is_new), tokens in zip(batch, ids, strict=True):
            if is_new and not is_first:
                found += between
            found += tokens
            is_first = False
        kept = np.array(found[: None if max_tokens is None else max_tokens - num_tokens], np.uint32)
        num_tokens += len(kept)
        yield kept
        if max_tokens is not None and num_tokens >= max_tokens:
            return


def _batches(pieces: Iterable[Piece], most_chars: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_chars = 0
    with tqdm(desc="tokens", unit="char", unit_scale=True, delay=2) as bar:
        for piece in pieces:
            batch.append(piece)
            num_chars += len(piece[0])
            if num_chars >= most_chars:
                yield batch
                bar.update(num_chars)
                batch, num_chars = [], 0
        if batch:
            yield batch
            bar.update(num_chars)


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: list[list[int]]
    if backend is None:  # a tokenizer in Python
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found
    # As `tokenizer` would, but without where each token stood, which is quicker
    backend.no_truncation()
    backend.no_padding()
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def read_tokens(names: Sequence[Path], tokenizer: Any, max_tokens: int | None = None) -> Tensor:
    """The tokens of the beginning of some texts, in memory.

    Args:
        names: of `documents.find`, or folders of `write_tokens`; not both.
        tokenizer: a transformers tokenizer.
        max_tokens: None means all.

    Returns:
        int64 [num_tokens].

    Raises:
        UsageError: if a text cannot be read, or was tokenised for another tokenizer.
    """
    parts: list[NDArray[Any]] = []
    if are_tokenized(names):
        for name in names:
            parts += [shard[:max_tokens] for shard in mapped(name, tokenizer)]
    else:
        parts += tokenize(Documents(find(names)), tokenizer, max_tokens)
    return torch.from_numpy(np.concatenate(parts)[:max_tokens].astype(np.int64))


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
    check_whole(len(tokens), num_blocks, block_size)
    return tokens[: num_blocks * block_size].view(num_blocks, block_size)


def check_whole(num_tokens: int, num_blocks: int, block_size: int) -> None:
    """Refuses a text that is too short for one block.

    Raises:
        UsageError: saying what it has.
    """
    if num_blocks == 0:
        raise UsageError(
            f"the text has {num_tokens} tokens, but {block_size} are needed for one block; give "
            "more text, or shorter blocks"
        )


def are_tokenized(names: Sequence[Path]) -> bool:
    """Whether all are folders of `write_tokens`.

    Raises:
        UsageError: if some are.
    """
    folders = [name for name in names if (name / TOKENS_JSON).is_file()]
    if folders and len(folders) < len(names):
        other = next(name for name in names if name not in folders)
        raise UsageError(
            f"{folders[0]} holds tokens and {other} is text; tokenise that one too, with "
            "cast-train tokenize, or leave one of them out"
        )
    return bool(folders)


def mapped(folder: Path, tokenizer: Any, is_shuffled: bool = False) -> list[NDArray[Any]]:
    """The tokens of a folder, mapped from its shards and read where they are used.

    Args:
        folder: of `write_tokens`.
        tokenizer: the model's.
        is_shuffled: they are read in random order, so Linux is not to read on behind each place.

    Returns:
        for each shard read-only tokens [num_tokens], of the folder's unsigned dtype.

    Raises:
        UsageError: if a shard is missing or has another size, or the tokenizer is another one.
    """
    record = read_record(folder)
    names = f"the model and {folder}"
    models.check_same_vocabulary(tokenizer, models.read_tokenizer(folder), names)
    dtype = np.dtype(record["dtype"]).newbyteorder("<")
    found: list[NDArray[Any]] = []
    for shard in record["shards"]:
        path = folder / shard["name"]
        wanted = shard["num_tokens"] * dtype.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != wanted:
            raise CheckpointError(
                f"{path} has {size} bytes, but {TOKENS_JSON} says {wanted}; copy the folder again"
            )
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if is_shuffled:
            pages.madvise(mmap.MADV_RANDOM)
        found.append(np.frombuffer(pages, dtype))
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The content of tokens.json.

    Raises:
        CheckpointError: if it is none that this release reads.
    """
    record = read_json(folder / TOKENS_JSON)
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / TOKENS_JSON} has format_version {record.get('format_version')!r}, but this "
            f"program reads {FORMAT_VERSION}; use the release that wrote it"
        )
    shards = record.get("shards")
    if record.get("dtype") not in ("uint16", "uint32") or not (
        isinstance(shards, list)
        and all(isinstance(each, dict) and {"name", "num_tokens"} <= each.keys() for each in shards)
    ):
        raise CheckpointError(f"{folder / TOKENS_JSON} does not say what its shards hold")
    return record


def write_tokens(
    model_dir: Path,
    names: Sequence[Path],
    out: Path,
    field: str = FIELD,
    max_tokens: int | None = None,
    of_hub: Hub = TRAIN_SPLIT,
    is_resume: bool = False,
) -> dict[str, Any]:
    """Tokenises texts of any size once, for many runs; memory does not grow with them.

    Args:
        model_dir: whose tokenizer; or its name on a hub.
        names: of `documents.find`.
        out: the folder to write; OUT.partial beside it holds what is there until the end.
        field: of the data sets' rows.
        max_tokens: of the beginning; None means all.
        of_hub: what of a hub's data sets is read.
        is_resume: go on from OUT.partial if it is there.

    Returns:
        the content of tokens.json.

    Raises:
        UsageError: for every wrong input; nothing is written then.
        CheckpointError: if out exists, or OUT.partial was made of something else.
    """
    check_new(out)
    folder = hub.fetch(model_dir)
    tokenizer = models.load_tokenizer(folder)
    sources = find(names)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    check_room(out, _num_tokens_about(sources, max_tokens) * np.dtype(dtype).itemsize, "tokens")
    wanted = {
        "model": hub.name_of(folder),
        "dtype": np.dtype(dtype).name,
        "field": field,
        "max_tokens": max_tokens,
        "hub": [of_hub.subset, of_hub.split],
        "source": identity.of_texts(names),
    }
    partial = out.with_name(out.name + ".partial")
    with resume.held(partial, is_first=True):
        state = _begun(partial, wanted, is_resume)
        documents = Documents(sources, field, state["position"], of_hub)
        left = None if max_tokens is None else max_tokens - _num_tokens(state)
        shard: list[NDArray[Any]] = []
        found = tokenize(documents, tokenizer, left, is_first=not state["shards"])
        for tokens in takewhile(lambda _: left is None or left > 0, found):
            shard.append(tokens.astype(dtype))
            if sum(map(len, shard)) >= SHARD_TOKENS:
                _keep(partial, shard, state, documents.position())
                shard = []
        if any(map(len, shard)):
            _keep(partial, shard, state, documents.position())
        if not _num_tokens(state):
            raise UsageError(f"{names[0]} holds no text; give another --text")
        tokenizer.save_pretrained(partial)
        record = {
            "format_version": FORMAT_VERSION,
            **wanted,
            "num_tokens": _num_tokens(state),
            "shards": state["shards"],
            "origin": origin(),
        }
        (partial / TOKENS_JSON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        to_disk(partial)
        partial.rename(out)
    fsync(out.parent)
    (out / STATE_JSON).unlink()
    return record


def _num_tokens_about(sources: Sequence[Source], max_tokens: int | None) -> int:
    """How many tokens there will be; of a hub's data set that is read whole, 0."""
    about = sum(source.num_bytes for source in sources) // 4
    if max_tokens is None:
        return about
    return min(max_tokens, about) if about else max_tokens


def _begun(partial: Path, wanted: Mapping[str, Any], is_resume: bool) -> dict[str, Any]:
    """What OUT.partial has already: its shards, and the position after them.

    Raises:
        CheckpointError: if it is not to be resumed, or was made of something else.
    """
    state = {**wanted, "shards": [], "position": None}
    names = [path.name for path in partial.iterdir()]
    if STATE_JSON not in names and all(name.startswith("tokens-") for name in names):
        return state  # killed before the first file was whole, or never begun
    if not is_resume:
        raise CheckpointError(
            f"{partial} holds unfinished work; continue it with --resume, or remove it"
        )
    found = read_json(partial / STATE_JSON)
    remedy = "repeat that command, or remove it"
    identity.check(found, wanted, f"{partial} is of other texts", remedy)
    return {**state, "shards": found["shards"], "position": found["position"]}


def _keep(
    partial: Path, tokens: Sequence[NDArray[Any]], state: dict[str, Any], position: Any
) -> None:
    """Writes the next shard, and then that it is there."""
    path = partial / f"tokens-{len(state['shards']):05}.bin"
    shard = np.concatenate(tokens)
    shard.astype(shard.dtype.newbyteorder("<")).tofile(path)
    fsync(path)
    kept = {"name": path.name, "num_tokens": len(shard), "sha256": sha256(path)}
    state |= {"shards": [*state["shards"], kept], "position": position}
    unnamed = partial / f"{STATE_JSON}.new"
    unnamed.write_text(json.dumps(state) + "\n", encoding="utf-8")
    fsync(unnamed)
    unnamed.rename(partial / STATE_JSON)


def _num_tokens(state: Mapping[str, Any]) -> int:
    return sum(shard["num_tokens"] for shard in state["shards"])
