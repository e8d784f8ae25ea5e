"""What a run or a study reads -> its identity: names, and the sha256 of every file.

Names do not identify files: weights may be trained again under the same name. So weights are
hashed whole, each time a command starts. One core with SHA instructions hashes about 1.7 GB a
second (AMD Zen 4, measured): 0.2 s for SmolLM2-135M, 10 s for 8 billion parameters in bf16. Sizes
and modification times would be quicker, but copying changes the times and not the weights, and
training changes the weights and not the sizes. Text grows, and what changes it changes its size or
its ends: of a text above `WHOLE_BYTES` those stand for it, and tokens.json for a folder of tokens.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import CheckpointError, read_json, sha256
from cast_serve.errors import UsageError
from cast_train import documents
from cast_train.checkpoint.models import check_directory
from cast_train.config import of_method

# Weights, configuration and tokenizer, as transformers names them.
SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".jinja"}
STEP_BLOCKS = "batch_blocks x accumulation x processes"
MAX_SHOWN = 4  # differences in a message
WHOLE_BYTES = 1 << 30
END_BYTES = 1 << 24


def of_file(path: Path) -> dict[str, str]:
    """``name`` and ``sha256``; above `WHOLE_BYTES` ``sha256_of_ends``, of its size and both ends.

    Raises:
        OSError: if it cannot be read.
    """
    if (size := path.stat().st_size) <= WHOLE_BYTES:
        return {"name": path.name, "sha256": sha256(path)}
    with path.open("rb") as file:
        hashed = hashlib.sha256(f"{size}\n".encode() + file.read(END_BYTES))
        file.seek(-END_BYTES, 2)
        hashed.update(file.read())
    return {"name": path.name, "sha256_of_ends": hashed.hexdigest()}


def of_texts(names: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Every file of some texts (see `of_file`), in the order read.

    Of a folder of tokens its name, the ``sha256`` of its tokens.json, and as ``of`` what it was
    made of; of a hub's data set its name.

    Raises:
        UsageError: if a text cannot be found.
        OSError: if it cannot be read.
    """
    found: list[dict[str, Any]] = []
    for name in names:
        listed = Path(name) / documents.TOKENS_JSON
        if listed.is_file():
            made_of = read_json(listed).get("source")
            found.append({"name": Path(name).name, "sha256": sha256(listed), "of": made_of})
            continue
        for source in documents.find([name]):
            found.append(of_file(source.path) if source.path else {"name": source.name})
    return found


def hashes(texts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Names by hash of all files of some texts, also those that tokens were made of."""
    names: dict[str, str] = {}
    for text in texts:
        for key in ("sha256", "sha256_of_ends"):
            if key in text:
                names[text[key]] = text["name"]
        names |= hashes(text.get("of") or ())
    return names


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
    texts: Sequence[Path],
    heldout_file: Path | None,
    teacher_dir: Path | None,
) -> dict[str, Any]:
    """``source`` of a training run's record.

    Returns:
        ``model`` (name) and ``model_sha256`` (see `of_directory`); ``text`` (see `of_texts`) and
        ``heldout`` (see `of_file`); ``teacher`` and ``teacher_sha256``. Heldout and teacher only if
        there are any.
    """
    found: dict[str, Any] = {
        "model": hub.name_of(model_dir),
        "model_sha256": of_directory(model_dir),
        "text": of_texts(texts),
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
        for digest, name in hashes([text]).items():
            if digest in names:
                raise UsageError(
                    f"--text has {name} twice (also as {names[digest]}); blocks held out of one "
                    "would be trained on in the other; name it once"
                )
            names[digest] = name
    for digest, name in hashes([source["heldout"]] if "heldout" in source else []).items():
        if digest in names:
            raise UsageError(
                f"--heldout {name} is among the training texts, as {names[digest]}; measure on "
                "another text"
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
    differences = _differences(_of_any_number(compared), _of_any_number(wanted))
    if differences:
        shown = ", ".join(differences[:MAX_SHOWN])
        more = len(differences) - MAX_SHOWN
        raise CheckpointError(
            f"{what} ({shown}{f' and {more} more' if more > 0 else ''}); {remedy}"
        )


def _of_any_number(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's identity, with the sequences of a step in place of how processes share them."""
    config, num_processes = identity.get("config"), identity.get("num_processes")
    if not isinstance(config, Mapping) or not isinstance(num_processes, int):
        return identity
    parts = ("batch_blocks", "accumulation")
    if not all(isinstance(config.get(part), int) for part in parts):
        return identity
    of_step = math.prod(config[part] for part in parts) * num_processes
    return {
        **{key: value for key, value in identity.items() if key != "num_processes"},
        "config": {key: value for key, value in config.items() if key not in parts},
        STEP_BLOCKS: of_step,
    }


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
