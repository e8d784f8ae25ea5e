"""OUT.partial: an unfinished run's identity and checkpoints -> the checkpoint to resume from.

    run.json                the run's identity, the layout of its weights, and where each of its
                            launches came from (origin.py)
    kept_dense.json         the linears that stay dense for `zeros`, chosen at the start
    kept_of_64.json         of N:64 the linears' own N, chosen at the start, if they have one
    channel_order.json      the order of the channels, found at the start, if they were reordered
    checkpoint-N/           transformers' Trainer wrote it after step N: weights, gates, optimiser,
                            random states of all processes
    checkpoint-N/complete   empty; written last, when all of the above is on the disk

Trainer writes checkpoint-N file by file, so a kill may leave an incomplete one. Only checkpoints
with the file ``complete`` are resumed from, and the one before is removed only once it is written.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cast_serve.checkpoint import record
from cast_serve.checkpoint.record import CheckpointError
from cast_train.checkpoint import channel_order, identity
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.config import Gates, TrainConfig
from cast_train.gates.gating import Gate, logits_of

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"
DENSE_FILE = "kept_dense.json"
KEPT_FILE = "kept_of_64.json"
# Of weights, gates and their moments. Another one is another release's.
LAYOUT = "out_features, in_features; with a fixed mask the kept weights"
COMPLETE = "complete"
PREFIX = "checkpoint-"  # Trainer's


def check_room(
    partial: Path, model: nn.Module, gates: Mapping[str, Gate], config: TrainConfig
) -> None:
    """Refuses a run whose checkpoints the disk cannot hold, besides what is there.

    While one is written there are the last one and, with `keep_best`, the best. A weight is stored
    with the optimiser's two moments, a logit with one, or none where it is not learnt.

    Raises:
        CheckpointError: naming what is needed and what is free.
    """
    num_moments = {id(logits): int(isinstance(config, Gates)) for logits in logits_of(gates)}
    num_bytes = sum(
        p.nbytes * (1 + (num_moments.get(id(p), 2) if p.requires_grad else 0))
        for p in model.parameters()
    )
    num_bytes += sum(buffer.nbytes for buffer in model.buffers())
    num_new = max(2 + config.keep_best - len(_checkpoints(partial)), 1)
    record.check_room(partial, num_new * num_bytes, f"{num_new} checkpoints of this model")


@dataclass(frozen=True)
class Choices:
    """What a run chooses at its start; on another machine it could choose otherwise.

    Attributes:
        kept_dense: linears that would be targets and stay dense for `zeros`.
        kept_of_64: N of N:64 by name, of the targets whose N is not `TrainConfig.pattern`'s.
        order: of the channels, seen from the dense model; None: as they were.
    """

    kept_dense: Sequence[str]
    kept_of_64: Mapping[str, int]
    order: ChannelOrder | None


def begin(
    partial: Path, wanted: Mapping[str, Any], choices: Choices, origin: Mapping[str, Any]
) -> None:
    """Makes the directory of a run, if it is not there; writes its choices, then its identity.

    To be called where there is no checkpoint; a kill meanwhile leaves an identity whole or none.

    Args:
        partial: OUT.partial.
        wanted: the run's identity.
        choices: what the run has chosen.
        origin: of this launch.
    """
    partial.mkdir(parents=True, exist_ok=True)
    for name, chosen in ((DENSE_FILE, list(choices.kept_dense)), (KEPT_FILE, choices.kept_of_64)):
        (partial / name).write_text(json.dumps(chosen) + "\n", encoding="utf-8")
    channel_order.write(partial, choices.order)
    _write_run(partial, {**wanted, "layout": LAYOUT, "origins": [{"step": 0, **origin}]})


def go_on(partial: Path, step: int, origin: Mapping[str, Any]) -> None:
    """Adds the launch that goes on after that step to the run's origins."""
    found = json.loads((partial / RUN_FILE).read_text(encoding="utf-8"))
    origins = [*found["origins"], {"step": step, **origin}]
    _write_run(partial, {**found, "origins": origins})


def read_origins(partial: Path) -> list[dict[str, Any]]:
    """Where each launch of the run came from, and after which step it went on, in their order."""
    return list(json.loads((partial / RUN_FILE).read_text(encoding="utf-8"))["origins"])


def _write_run(partial: Path, content: Mapping[str, Any]) -> None:
    unnamed = partial / f"{RUN_FILE}.new"
    unnamed.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    record.to_disk(partial)
    unnamed.rename(partial / RUN_FILE)
    record.fsync(partial)


@contextmanager
def held(partial: Path, is_first: bool) -> Iterator[None]:
    """Keeps other runs out of the directory while it lasts; makes it, and removes it if empty.

    Args:
        partial: OUT.partial.
        is_first: whether this is the first of several processes, which holds it for all.

    Raises:
        CheckpointError: if another run is at work there.
    """
    if not is_first:
        yield
        return
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"another process is working in {partial}; wait for it, or choose another --out"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked: %s; do not start a second run there", partial, error)
    try:
        yield
    finally:
        with suppress(OSError):  # it holds a run, or is gone
            partial.rmdir()
        os.close(descriptor)


def read_choices(partial: Path) -> Choices:
    """What `begin` was given."""
    kept_dense = json.loads((partial / DENSE_FILE).read_text(encoding="utf-8"))
    kept_of_64 = json.loads((partial / KEPT_FILE).read_text(encoding="utf-8"))
    return Choices(list(kept_dense), dict(kept_of_64), channel_order.read(partial))


def find(partial: Path, wanted: Mapping[str, Any], is_resume: bool, is_first: bool) -> Path | None:
    """The newest complete checkpoint, or None to start from the beginning.

    Args:
        partial: OUT.partial.
        wanted: the run's identity.
        is_resume: whether --resume was given.
        is_first: whether this is the first of several processes. It alone checks the identity and
            removes incomplete checkpoints, and it may have just made the directory.

    Raises:
        CheckpointError: if there is an unfinished run without --resume, or of another identity.
    """
    if not partial.exists():
        return None
    if is_first:
        check(partial, wanted, is_resume)
        for folder in _checkpoints(partial):
            if not (folder / COMPLETE).exists():
                logger.warning("%s is incomplete and is removed", folder)
                shutil.rmtree(folder)
    complete = [f for f in _checkpoints(partial) if (f / COMPLETE).exists()] if is_resume else []
    return max(complete, key=step_of, default=None)


def check(partial: Path, wanted: Mapping[str, Any], is_resume: bool) -> None:
    """Refuses an unfinished run that is not to be resumed, or is another one or another release's.

    Raises:
        CheckpointError: as `find` does.
    """
    if not any(partial.iterdir()):  # a run that was killed before it began
        return
    if not is_resume:
        raise CheckpointError(
            f"{partial} holds an unfinished run; continue it with --resume, or remove it"
        )
    try:
        found = json.loads((partial / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{partial} is not an unfinished run: {error}; remove it") from error
    remedy = "repeat that run with its inputs and settings, or remove it"
    identity.check(found, wanted, f"{partial} is another run", remedy)
    if found.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{partial} was begun by an earlier release, whose checkpoints this one does not read; "
            "finish it with that release, or remove it and start the run again"
        )


def mark_complete(folder: Path, best: str | None) -> None:
    """Marks a checkpoint that every process has written, and removes the ones before it.

    Args:
        folder: OUT.partial/checkpoint-N.
        best: the checkpoint that `keep_best` would load at the end; it is kept.
    """
    record.to_disk(folder)
    (folder / COMPLETE).touch()
    record.fsync(folder)
    record.fsync(folder.parent)
    kept = {folder.name, Path(best).name if best else None}
    for other in _checkpoints(folder.parent):
        if other.name not in kept:
            (other / COMPLETE).unlink(missing_ok=True)  # first, in case rmtree is interrupted
            shutil.rmtree(other)


def _checkpoints(partial: Path) -> list[Path]:
    folders = partial.glob(f"{PREFIX}*")
    return [p for p in folders if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.removeprefix(PREFIX))
