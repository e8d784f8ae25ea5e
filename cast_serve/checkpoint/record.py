"""A model directory <-> ``cast.json``, its shards and their sha256; a new directory appears whole.

``cast.json`` says what a directory holds and what it was made from. Training writes it beside a
gated or pruned model, conversion beside a compressed one; both read and write it only through this
module. It always has ``format_version`` and the ``sha256`` of every shard; training and conversion
decide the rest.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cast_serve.checkpoint.shard import CheckpointError as CheckpointError  # read from here by all
from cast_serve.checkpoint.shard import check_contained, is_file_name

DISK_FULL = "No space left on device"
CAST_JSON = "cast.json"
ONLY_SHARD = "model.safetensors"  # what readers look for if there is no index
FORMAT_VERSION = 1
# The quant_method in config.json of a gated directory, whose weights are not pruned yet: with it
# vLLM refuses to load them, and transformers warns.
GATED_METHOD = "cast_gated"
SCALES_TRAINED = "as trained, see trained_as"  # of cast.json's quantization


def sha256(path: Path) -> str:
    """Hex digest of a whole file.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shards(directory: Path) -> list[Path]:
    """The ``*.safetensors`` of a directory, by name.

    Raises:
        CheckpointError: if the directory has a link out of it, see `check_contained`.
    """
    if directory.is_dir():
        check_contained(directory)
    return sorted(directory.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, such as config.json.

    Raises:
        CheckpointError: if it cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def read_record(directory: Path) -> dict[str, Any]:
    """Reads cast.json and refuses what this release does not know.

    Raises:
        CheckpointError: if it is missing, no JSON, of an unknown format_version, or a field is of
            another kind than it must be; or if the directory has a link out of it.
    """
    path = directory / CAST_JSON
    if directory.is_dir():
        check_contained(directory)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's record: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, but this program reads {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    _check_fields(path, record)
    return record


def _check_fields(path: Path, record: Mapping[str, Any]) -> None:
    """Refuses fields of another kind than they must be, where they are there."""
    kinds = {"kind": str, "n": int, "m": int, "targets": list, "kept_dense": list, "sha256": dict}
    objects = ("quality", "quantization", "source", "trained_as", "converted_from", "kept_of_64")
    kinds |= dict.fromkeys(objects, dict)
    for name, kind in kinds.items():
        value = record.get(name)
        if value is not None and type(value) is not kind:
            raise CheckpointError(
                f"{path}: {name} is {value!r:.100}, but must be a {kind.__name__}"
            )
    trained_as = record.get("trained_as")
    if trained_as is not None and not {"quantize", "scale_group"} <= trained_as.keys():
        raise CheckpointError(f"{path}: trained_as lacks quantize or scale_group: {trained_as}")
    names = [*(record.get("targets") or ()), *(record.get("kept_dense") or ())]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: targets and kept_dense must be names of linears")
    n, m = pattern_of(record)
    if record.get("kind") != "dense" and not (0 < n < m or n == m == 64):
        raise CheckpointError(
            f"{path}: {n}:{m} is not N:M with 0 < N < M, nor 64:64; copy the directory again"
        )
    checked_kept(path, record.get("kept_of_64"))
    if wrong := [name for name in record.get("sha256") or () if not is_file_name(name)]:
        raise CheckpointError(f"{path} lists {wrong[0]!r:.200}, which is not a file beside it")


def pattern_of(record: Mapping[str, Any]) -> tuple[int, int]:
    """n and m of cast.json; 2 and 4 where it does not say."""
    n, m = record.get("n"), record.get("m")
    return 2 if n is None else n, 4 if m is None else m


def kept_in_words(kept: Iterable[int]) -> str:
    """N of each of some linears of N:64 -> ``32:64``, or ``28-40:64`` if they differ."""
    counts = set(kept)
    least, most = min(counts), max(counts)
    return f"{least}:64" if least == most else f"{least}-{most}:64"


def checked_kept(where: str | Path, kept: Any) -> dict[str, int]:
    """``kept_of_64`` of cast.json or config.json: N of N:64 by name of a linear; empty if None.

    Raises:
        CheckpointError: naming what is wrong.
    """
    if kept is None:
        return {}
    if not isinstance(kept, dict) or not all(type(n) is int and 0 < n < 64 for n in kept.values()):
        raise CheckpointError(
            f"{where}: kept_of_64 is {kept!s:.200}, but has a number from 1 to 63 for each linear "
            "that it names; copy the directory again"
        )
    return kept


def is_gated(directory: Path) -> bool:
    """Whether a directory holds gates that have not been hardened yet.

    Raises:
        CheckpointError: if its cast.json cannot be read.
    """
    return (directory / CAST_JSON).is_file() and read_record(directory).get("kind") == "gated"


def check_listed(directory: Path, record: Mapping[str, Any]) -> None:
    """Checks the shards that a record lists; the directory may have others.

    Raises:
        CheckpointError: naming the shard that is missing or changed.
    """
    path = directory / CAST_JSON
    for name, expected in (record.get("sha256") or {}).items():
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing, but {path} lists it")
        if (found := sha256(directory / name)) != expected:
            raise CheckpointError(
                f"{directory / name} has sha256 {found}, but {path} says {expected}; "
                "the file was changed or damaged after it was written"
            )


def verify(directory: Path) -> dict[str, Any]:
    """Checks that the shards are exactly those of cast.json, unchanged.

    Returns:
        cast.json's content.

    Raises:
        CheckpointError: naming the shard that is missing, unlisted or changed.
    """
    record = read_record(directory)
    found = [path.name for path in shards(directory)]
    listed = sorted(record.get("sha256") or {})
    if found != listed:
        raise CheckpointError(
            f"{directory} holds the shards {found}, but its record lists {listed}; "
            "copy the whole directory again"
        )
    check_listed(directory, record)
    return record


def check_new(out: Path) -> None:
    """Refuses an output that exists or cannot be made, before any work is done for it.

    Raises:
        CheckpointError: if out exists, or the directory that it would lie in cannot be written.
    """
    if out.exists() or out.is_symlink():  # also a link to what is not there
        raise CheckpointError(f"{out} exists already; remove it or choose another output directory")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Refuses an output that cannot be made, or not be written to if it is a directory.

    Raises:
        CheckpointError: naming what cannot be written.
    """
    path = out.absolute()
    around = next(each for each in (path, *path.parents) if each.exists())
    if not around.is_dir():
        raise CheckpointError(f"{out} cannot be made: {around} is a file; choose another output")
    if not os.access(around, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{out} cannot be made: {around} cannot be written; choose another output directory"
        )


def check_room(out: Path, num_bytes: int, what: str) -> None:
    """Refuses an output that is larger than what is free on its disk.

    Raises:
        CheckpointError: naming both.
    """
    free = shutil.disk_usage(_existing(out.absolute().parent)).free
    if free < num_bytes:
        raise CheckpointError(
            f"{out} needs about {num_bytes / 1e9:.1f} GB for {what}, but {free / 1e9:.1f} GB are "
            "free there; free some, or choose another output directory"
        )


def _existing(directory: Path) -> Path:
    """The directory, or the first one around it that exists."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` to fill: renamed to `out` on success, removed on failure.

    So a directory called `out` is always complete, and on the disk. A process that is killed leaves
    ``.OUT-*`` behind; no other process removes it, since its owner could still be writing.

    Raises:
        CheckpointError: as `check_new`; if the disk is full; or if `out` came to be meanwhile, and
            then the temporary directory stays.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    free = shutil.disk_usage(directory).free
    try:
        yield directory
        for path in directory.iterdir():
            if path.is_file():
                path.chmod(0o644)  # safetensors writes 0600, which a container's user cannot read
        directory.chmod(0o755)
        to_disk(directory)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if DISK_FULL in str(error):  # an OSError, or safetensors' own error
            raise CheckpointError(
                f"the disk is full: {out} takes more than the {free / 1e9:.1f} GB that were free "
                f"in {out.parent}; free some, or choose another output directory"
            ) from error
        from safetensors import SafetensorError  # here: the gateway, which reads records, has none

        if isinstance(error, SafetensorError):  # of a quota, say
            raise CheckpointError(f"{out} cannot be written: {error}") from error
        raise
    try:
        directory.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} can no longer be created ({error.strerror}); everything is in {directory}: "
            "move it to where you want it"
        ) from error
    fsync(out.parent)


def to_disk(directory: Path) -> None:
    """Writes all that a directory holds, and its own list of names, to the disk."""
    for path in (*directory.rglob("*"), directory):
        fsync(path)


def fsync(path: Path) -> None:
    """Writes a file's content, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_record(
    directory: Path,
    content: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    weight_map: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the index, config.json and cast.json, once all shards are written.

    Args:
        directory: holds every shard.
        content: what cast.json says; its own format_version and sha256 are replaced.
        config: config.json; None: it is written already.
        weight_map: shard by tensor, for an index if readers need one: for several shards, or one
            that is called otherwise than model.safetensors; None: it is written already.

    Returns:
        cast.json's content.
    """
    names = [path.name for path in shards(directory)]
    if weight_map is not None and names != [ONLY_SHARD]:
        total = sum(_tensor_bytes(directory / name) for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    if config is not None:
        _write_json(directory / "config.json", config)
    record = {
        "format_version": FORMAT_VERSION,
        **{key: value for key, value in content.items() if key not in ("format_version", "sha256")},
        "sha256": {name: sha256(directory / name) for name in names},
    }
    _write_json(directory / CAST_JSON, record)
    return record


def _tensor_bytes(shard: Path) -> int:
    """The file without its header: 8 bytes with the length of the JSON behind them, and that."""
    with shard.open("rb") as file:
        return shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
