"""Directories or URLs by variant name -> the variants, each one or several vLLM servers."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.cores import parse_cores
from cast_serve.errors import UsageError
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.replica import (
    CONFINED,
    Replica,
    Variant,
    start_worker,
)
from cast_serve.ports import free_port

logger = logging.getLogger(__name__)


def local_variants(
    workers: Mapping[str, WorkerConfig],
    vllm_flags: Sequence[str] = (),
    gateway_port: int | None = None,
) -> list[Variant]:
    """Variants for directories, each with a worker on this machine.

    Args:
        workers: by the variant's name. Those without cores share what the others leave of this
            process's equally, those without a port get a free one. A `dir` or `draft` that is a
            model's name on a hub is fetched.
        vllm_flags: of every worker, after its own.
        gateway_port: which the gateway is about to take, and which no worker gets.

    Raises:
        UsageError: if a directory holds no model, there are fewer cores than variants,
            `draft_tokens` or `draft_requests` without a draft, or not one of `dir` and `command`.
    """
    named = {name: parse_cores(each.cores) for name, each in workers.items() if each.cores}
    taken = {core for cores in named.values() for core in cores}
    left = sorted(os.sched_getaffinity(0) - taken)
    sharing = [name for name in workers if name not in named]
    if len(left) < len(sharing):
        raise UsageError(
            f"{len(sharing)} variants need a core each, but this process has {len(left)}"
            f"{' left' if taken else ''}; "
            "serve fewer, or run workers elsewhere and use `cast-serve gateway`"
        )
    for name, worker in workers.items():
        _check_one(name, worker)
    folders = {name: x.dir and _fetched(name, x.dir) for name, x in workers.items()}
    worker_flags = {name: _draft_flags(name, worker) for name, worker in workers.items()}
    share = len(left) // max(1, len(sharing))
    for index, name in enumerate(sharing):
        named[name] = left[index * share : (index + 1) * share]
    ports = {gateway_port, *(worker.port for worker in workers.values())}
    variants = []
    for name, worker in workers.items():
        port = worker.port or free_port(ports)
        ports.add(port)
        replica = Replica(
            name,
            f"http://127.0.0.1:{port}",
            folders[name],
            tuple(word.replace("{port}", str(port)) for word in worker.command),
            tuple(named[name]),
            (*worker.vllm, *vllm_flags),
            worker_flags=worker_flags[name],
        )
        variants.append(Variant(name, [replica]))
    return variants


def remote_variants(urls: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Variants for servers that run elsewhere, each with one URL or more.

    Raises:
        UsageError: if one is not ``http://HOST:PORT``.
    """
    return [
        Variant(name, [Replica(name, _checked_url(name, url)) for url in given])
        for name, given in urls.items()
    ]


def share_key(variants: Sequence[Variant], key: str) -> str:
    """Gives the local replicas the key that their workers ask for.

    Args:
        variants: not started yet.
        key: the one that is set; empty: where a replica is local, a new one is made.

    Returns:
        the key that the gateway sends to all; empty: none.
    """
    local = [replica for replica in replicas_of(variants) if replica.is_local]
    if local and not key:
        key = secrets.token_urlsafe(32)
    for replica in local:
        replica.key = key
    return key


def successor(old: Replica, model: Path | None, log_name: str) -> Replica:
    """A replica like a local one, for another directory and on another port; not started.

    Args:
        old: started.
        model: a directory, or a model's name on a hub, which is fetched; None: that of `old`.
        log_name: of its log, beside that of `old`.

    Raises:
        UsageError: if there is no model.
    """
    assert old.model is not None
    assert old.log is not None
    return Replica(
        old.variant,
        f"http://127.0.0.1:{free_port()}",
        _fetched(old.variant, model or old.model),
        (),
        old.cores,
        old.vllm_flags,
        old.key,
        old.worker_flags,
        log=old.log.with_name(log_name),
    )


def log_name(variant: str, number: int) -> str:
    """File name of the log of a variant's first worker, or of its n-th."""
    return f"{quote(variant, safe='')}{f'-{number}' if number > 1 else ''}.log"


def start(variants: Sequence[Variant], log_dir: Path | None = None) -> None:
    """Starts the local replicas; returns at once, `Supervisor` tells when they answer.

    Args:
        log_dir: where their logs go; None: a temporary folder.
    """
    local = [replica for replica in replicas_of(variants) if replica.is_local]
    if not local:
        return
    if log_dir is None:
        log_dir = Path(tempfile.mkdtemp(prefix="cast-serve-"))
    for replica in local:
        replica.log = log_dir / log_name(replica.variant, 1)
        start_worker(replica)


def end_logs(variants: Sequence[Variant], is_kept: bool) -> None:
    """Removes the folder of the logs, or says where it is; of workers that have ended."""
    for folder in {replica.log.parent for replica in replicas_of(variants) if replica.log}:
        if is_kept:
            logger.warning("the workers' logs are kept in %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def replicas_of(variants: Iterable[Variant]) -> list[Replica]:
    return [replica for variant in variants for replica in variant.replicas]


def _fetched(name: str, model: Path) -> Path:
    try:
        folder = hub.fetch(model)
    except CheckpointError as error:
        raise UsageError(f"variant {name}: {error}") from None
    if not (folder / "config.json").is_file():
        raise UsageError(f"variant {name}: {model} holds no model (no config.json)")
    return folder


def _check_one(name: str, worker: WorkerConfig) -> None:
    if (worker.dir is None) == (not worker.command):
        raise UsageError(f"variant {name}: give dir or command, and not both")
    if not worker.command:
        return
    if worker.vllm or worker.draft:
        raise UsageError(
            f"variant {name}: vllm and draft are for a dir; a command has its flags in itself"
        )
    if worker.port is None and not any("{port}" in word for word in worker.command):
        raise UsageError(
            f"variant {name}: command {' '.join(worker.command)!r} does not say on which port it "
            "listens; write {port} in it, or name the port"
        )
    for program in (*CONFINED, worker.command[0]):
        if shutil.which(program) is None:
            raise UsageError(
                f"variant {name}: there is no program {program}; install it, or correct the command"
            )


def _draft_flags(name: str, worker: WorkerConfig) -> tuple[str, ...]:
    """Of `cast-serve worker`."""
    options = {"draft_tokens": worker.draft_tokens, "draft_requests": worker.draft_requests}
    given = {key: str(value) for key, value in options.items() if value is not None}
    if worker.draft is None:
        for key, value in given.items():
            raise UsageError(f"variant {name}: {key} {value} has no effect without draft; name one")
        return ()
    flags = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    return ("--draft", str(_fetched(name, worker.draft)), *flags)


def _checked_url(name: str, text: str) -> str:
    try:
        url = urlsplit(text)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # brackets or a port that are none
        is_url = False
    if not is_url:
        raise UsageError(f"variant {name}: {text!r} is not a URL; write {name}=http://HOST:PORT")
    return text.rstrip("/")
