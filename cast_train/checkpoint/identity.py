"""What a run or a study reads -> its identity: names, and the sha256 of every file.

Names do not identify files: weights may be trained again under the same name. So every file is
hashed whole, each time a command starts. One core with SHA instructions hashes about 1.7 GB a
second (AMD Zen 4, measured): 0.2 s for SmolLM2-135M, 10 s for 8 billion parameters in bf16. Sizes
and modification times would be quicker, but copying changes the times and not the weights, and
training changes the weights and not the sizes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import CheckpointError, sha256
from cast_serve.errors import UsageError
from cast_train.checkpoint.models import check_directory
from cast_train.config import of_method

# Weights, configuration and tokenizer, as transformers names them.
SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".jinja"}
MAX_SHOWN = 4  # differences in a message


def of_file(path: Path) -> dict[str, str]:
    """``name`` and ``sha256``.

    Raises:
        OSError: if it cannot be read.
    """
    return {"name": path.name, "sha256": sha256(path)}


def of_directory(directory: Path) -> dict[str, str]:
    """The sha256 by name of every file that a model directory's reader may read.

    ``*.bin`` count only where there is no ``*.safetensors``; otherwise transformers ignores them.

    Raises:
        CheckpointError: if it is not a model directory.
        OSError: if a file cannot be read.
    """
    check_directory(directory)
    files = [path for path in sorted(directory.iterdir()) if path.is_file()]
    has_safetensors = any(path.suffix == ".safetensors" for path in files)
    suffixes = SUFFIXES if has_safetensors else {*SUFFIXES, ".bin"}
    return {path.name: sha256(path) for path in files if path.suffix in suffixes}


def of_inputs(
    model_dir: Path,
    text_files: Sequence[Path],
    heldout_file: Path | None,
    teacher_dir: Path | None,
) -> dict[str, Any]:
    """``source`` of a training run's record.

    Returns:
        ``model`` (name) and ``model_sha256`` (see `of_directory`); ``text``, in the order read, and
        ``heldout`` (see `of_file`); ``teacher`` and ``teacher_sha256``. Heldout and teacher only if
        there are any.
    """
    found: dict[str, Any] = {
        "model": hub.name_of(model_dir),
        "model_sha256": of_directory(model_dir),
        "text": [of_file(path) for path in text_files],
    }
    if heldout_file is not None:
        found["heldout"] = of_file(heldout_file)
    if teacher_dir is not None:
        found["teacher"] = hub.name_of(teacher_dir)
        found["teacher_sha256"] = of_directory(teacher_dir)
    return found


def check_texts(source: Mapping[str, Any]) -> None:
    """Refuses a text that would be measured on though it was trained on.

    Args:
        source: of `of_inputs`.

    Raises:
        UsageError: naming it.
    """
    names: dict[str, str] = {}
    for text in source["text"]:
        if text["sha256"] in names:
            raise UsageError(
                f"--text has {text['name']} twice (also as {names[text['sha256']]}); what is held "
                "out of one would be trained on in the other; name it once"
            )
        names[text["sha256"]] = text["name"]
    if (heldout := source.get("heldout")) and heldout["sha256"] in names:
        raise UsageError(
            f"--heldout {heldout['name']} is among the training texts, as "
            f"{names[heldout['sha256']]}; measure on another text"
        )


def check(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuses a record of other inputs or settings.

    Args:
        found: a record; only the keys of `wanted` are compared.
        wanted: the identity of what is asked for now.
        what: begins the message, as in "OUT is another run".
        remedy: what to do.

    Raises:
        CheckpointError: naming what differs.
    """
    compared = {key: found[key] for key in wanted if key in found}
    if isinstance(compared.get("config"), dict):
        compared["config"] = of_method(compared["config"])
    differences = _differences(compared, wanted)
    if differences:
        shown = ", ".join(differences[:MAX_SHOWN])
        more = len(differences) - MAX_SHOWN
        raise CheckpointError(
            f"{what} ({shown}{f' and {more} more' if more > 0 else ''}); {remedy}"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        parts = [
            _differences(ours, theirs, f"{name}[{i}]")
            for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True))
        ]
        return [difference for part in parts for difference in part]
    if not (isinstance(found, Mapping) and isinstance(wanted, Mapping)):
        return [f"{name} is {_short(found)}, not {_short(wanted)}"] if found != wanted else []
    differences = []
    for key, value in wanted.items():
        inner = f"{name}.{key}" if name else str(key)
        if key in found:
            differences += _differences(found[key], value, inner)
        else:
            differences.append(f"{inner} is missing there")  # maybe an earlier release's record
    differences += [f"{name}.{key} is only there" for key in sorted(found.keys() - wanted.keys())]
    return differences


def _short(value: Any) -> str:
    """A value for a message, hashes and tables abbreviated."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}..."
