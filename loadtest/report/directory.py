"""The name of a directory -> that directory with all its files, or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_out(out: Path) -> None:
    """Finds out before the run what would stop its reports after it.

    Raises:
        ValueError: if `out` is taken, its parent cannot be written, or matplotlib is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already; name a new directory, or remove it")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be made: {parent} is not a directory we may write")
    check_matplotlib()


def check_file(flag: str, out: Path) -> None:
    """Finds out before the run what would stop its record, which is one file, after it.

    Args:
        flag: that names the file, for the error.
        out: the file.

    Raises:
        ValueError: if the file cannot be written.
    """
    folder = out.absolute().parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {out} cannot be written; name a file in a folder that exists")


def check_directory(directory: Path) -> None:
    """Finds out before the work whether reports can be written into a directory that exists.

    Raises:
        ValueError: if not.
    """
    if not os.access(directory, os.W_OK):
        raise ValueError(f"{directory} cannot be written; copy it, and name the copy")


def check_matplotlib() -> None:
    """Finds out whether charts can be drawn.

    Raises:
        ValueError: if not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "reports need matplotlib; install it with: pip install 'cast-serve[loadtest]'"
        ) from error


@contextmanager
def new_directory(out: Path, result: dict[str, Any]) -> Iterator[Path]:
    """A directory beside `out` with result.json, renamed to `out` if the block ends well."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (partial / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
