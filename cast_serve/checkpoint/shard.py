"""A model directory's files -> opened shards; what is damaged or leads out of it is refused.

A directory may come from anywhere. A link in it could have a file of another directory read, and
copied into what is published; a pipe or a device would be read without end.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cast_serve.errors import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from safetensors import safe_open


def check_contained(directory: Path) -> None:
    """Refuses a directory with a link out of it, a shard or JSON that is no file (reading a pipe
    or a device would not end), or an index that names a path. Links into the repository that a
    snapshot of huggingface_hub's cache belongs to are right.

    Raises:
        CheckpointError: naming the file.
    """
    home = directory.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    for path in directory.iterdir():
        if path.is_symlink():
            _check_link(path, home)
        if path.suffix in (".safetensors", ".json") and not path.is_file():
            raise CheckpointError(f"{path} is not a file; copy the directory again")
        if path.name.endswith(".safetensors.index.json") and path.is_file():
            _check_index(path)


def _check_link(path: Path, home: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a circle
        raise CheckpointError(f"{path} is a broken link; copy the directory again") from None
    if not target.is_relative_to(home):
        raise CheckpointError(
            f"{path} is a link to {target}, outside its directory; copy the file itself there"
        )


def _check_index(path: Path) -> None:
    try:
        files = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of shards: {error!r:.200}") from None
    for name in files:
        if not is_file_name(name):
            raise CheckpointError(
                f"{path} names {name!r:.200}, which is not a file beside it; copy the directory "
                "again"
            )


def is_file_name(name: object) -> bool:
    """Whether it names a file of one directory, and no path that leads elsewhere."""
    is_bare = isinstance(name, str) and Path(name).name == name and "\0" not in name
    return is_bare and name not in ("", "..")


@contextmanager
def opened(path: Path) -> Iterator["safe_open"]:
    """A shard, to read headers and tensors from.

    Raises:
        CheckpointError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it is damaged or was not copied "
            "whole: copy the directory again"
        ) from None


def each_tensor(paths: Iterable[Path]) -> Iterator[tuple[str, Path, "safe_open"]]:
    """Name, path and opened shard of every tensor of some shards.

    Raises:
        CheckpointError: if a shard is damaged, or two have a tensor of one name.
    """
    files: dict[str, Path] = {}
    for path in paths:
        with opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is no dict
                if name in files:
                    raise CheckpointError(
                        f"{path.parent} has {name} in {files[name].name} and in {path.name}, so "
                        "shards of two versions of the model are mixed there; remove those that "
                        "its index does not name"
                    )
                files[name] = path
                yield name, path, shard
