"""The name of a directory or file -> whether it can be written; a new directory with a result."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from loadtest.errors import UsageError

ROOM_BYTES = 64 << 20


def check_out(out: Path) -> None:
    """Finds out before the run what would stop its reports after it.

    Raises:
        UsageError: if `out` is taken, cannot be written there, or matplotlib is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists already; name a new directory, or remove it")
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    _check_room(f"--out {out}", folder)
    check_matplotlib()


def check_file(flag: str, out: Path) -> None:
    """Finds out before the run what would stop its record, which is one file, after it.

    Raises:
        UsageError: if the file cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"{flag} {out} is a directory; name a file")
    _check_room(f"{flag} {out}", out.absolute().parent)


def check_directory(directory: Path) -> None:
    """Finds out before the work whether reports can be written into a directory that exists.

    Raises:
        UsageError: if not.
    """
    if not os.access(directory, os.W_OK):
        raise UsageError(f"{directory} cannot be written; copy it, and name the copy")


def check_matplotlib() -> None:
    """Finds out whether charts can be drawn.

    Raises:
        UsageError: if not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "reports need matplotlib; install it with: pip install 'cast-serve[loadtest]'"
        ) from error


def _check_room(what: str, folder: Path) -> None:
    """Takes the room of a large record for a moment: a full disk shows only when it is written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM_BYTES)
    except OSError as error:
        raise UsageError(
            f"{what} cannot be written: {folder}: {error.strerror}; name a place in a folder that "
            f"exists, may be written and has {ROOM_BYTES >> 20} MiB free"
        ) from error


def new_directory(out: Path, result: dict[str, Any]) -> None:
    """Makes a directory with result.json, or nothing."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (partial / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
