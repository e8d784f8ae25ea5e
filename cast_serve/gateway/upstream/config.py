"""The TOML file of `cast-serve up --config` -> what each local worker runs, and gateway settings.

    [gateway]            # any of GatewaySettings
    port = 8000

    [variant.sparse]     # any of WorkerConfig; a table for each variant
    dir = "models/sparse"

Paths in it are relative to the file, except those in a `command`, which runs where `up` does.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cast_serve.checkpoint import hub
from cast_serve.cores import parse_cores
from cast_serve.errors import UsageError
from cast_serve.gateway.settings import GatewaySettings

PATHS = ("api_keys_file", "worker_key_file", "control_socket", "log_dir", "canary_guard")
"""Of GatewaySettings."""


class WorkerConfig(BaseModel):
    """One variant's local worker."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    dir: Path | None = Field(
        default=None,
        description="dense or compressed model: a directory, or ORG/NAME[@REVISION] on a hub",
    )
    command: tuple[str, ...] = Field(
        default=(),
        description="instead of `dir`, another server with OpenAI's API and /health; `{port}` in "
        "it stands for its port",
    )
    cores: str | None = Field(
        default=None,
        description="CPU ids, such as `0,2-3`; none: an equal share of those that no variant names",
    )
    vllm: tuple[str, ...] = Field(default=(), description="flags for this variant's vLLM server")
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, description="the worker's port on 127.0.0.1; none: any free one"
    )

    draft: Path | None = Field(
        default=None,
        description="model that drafts for `dir` (docs/serving.md)",
    )
    draft_tokens: Annotated[int, Field(ge=1, le=16)] | None = Field(
        default=None, description="tokens that it proposes at once; none: 3"
    )
    draft_requests: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="requests at a time up to which it proposes; none: 4 on CPUs, any number on "
        "GPUs",
    )

    @field_validator("cores")
    @classmethod
    def _parses(cls, text: str | None) -> str | None:
        if text is not None:
            parse_cores(text)
        return text


class ServeConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gateway: dict[str, Any] = {}
    variant: dict[str, WorkerConfig] = {}


def read_config(path: Path) -> ServeConfig:
    """Reads the file; the values of ``[gateway]`` are left to `GatewaySettings` to check.

    Raises:
        UsageError: if it cannot be read, a key is unknown, or a worker's value is wrong.
    """
    try:
        config = ServeConfig(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        *table, key = map(str, fault["loc"][:3])
        where = f"--config {path}" + (f", [{'.'.join(table)}]" if table else "")
        if fault["type"] == "extra_forbidden":
            known = WorkerConfig.model_fields if table else ServeConfig.model_fields
            raise UsageError(f"{where}: {_unknown(key, known)}") from None
        limit = fault["msg"].replace("Input should", "it must").replace("tuple", "list")
        raise UsageError(f"{where}: {key} is {fault['input']!r}: {limit}") from None
    _check_settings(config.gateway, f"--config {path}, [gateway]")
    for name in config.variant:
        check_name(name, f"--config {path}, [variant.{name}]")
    folder = path.parent
    gateway = {
        key: folder / value if key in PATHS and isinstance(value, str) else value
        for key, value in config.gateway.items()
    }
    workers = {
        name: worker.model_copy(
            update={
                "dir": worker.dir and _located(worker.dir, folder),
                "draft": worker.draft and _located(worker.draft, folder),
            }
        )
        for name, worker in config.variant.items()
    }
    return ServeConfig(gateway=gateway, variant=workers)


def check_name(name: str, where: str) -> None:
    """Refuses a variant's name that X-Cast-Variant cannot carry.

    Args:
        name: of a variant.
        where: it is given, for the error.

    Raises:
        UsageError: if so.
    """
    is_latin = name.isprintable() and all(ord(letter) < 256 for letter in name)
    if not (name and is_latin and name == name.strip()):
        raise UsageError(
            f"{where}: {name!r} cannot be an HTTP header's value; name the variant in "
            "printable Latin-1 letters without surrounding spaces"
        )


def _located(model: Path, folder: Path) -> Path:
    """A directory beside the file, unless there is none and it may be a model's name on a hub."""
    located = folder / model
    is_name = hub.is_name(str(model).partition("@")[0])
    return model if is_name and not located.exists() else located


def settings_of(
    file: Mapping[str, Any], flags: Mapping[str, Any], assignments: Sequence[str]
) -> GatewaySettings:
    """The environment's settings, under those of a file, under flags, under --set.

    Args:
        file: ``[gateway]``.
        flags: None: not given.
        assignments: ``KEY=VALUE``; the last of a key counts.

    Raises:
        UsageError: naming the setting, where it comes from, and its limit or the nearest key.
    """
    pairs = [text.partition("=") for text in assignments]
    for text, (key, equals, _) in zip(assignments, pairs, strict=True):
        if not (key and equals):
            raise UsageError(f"--set {text!r} is not KEY=VALUE; write, for example, max_queued=64")
    last = {key: value for key, _, value in pairs}
    _check_settings(last, "--set")
    if "worker_key" in last:
        raise UsageError("--set worker_key would show the key in `ps`; set CAST_WORKER_KEY")
    first = {key: flag for key, flag in flags.items() if flag is not None}
    sources = {key: f"[gateway] {key} of --config" for key in file}
    sources |= {key: f"--{key.replace('_', '-')}" for key in first}
    sources |= {key: f"--set {key}" for key in last}
    try:
        return GatewaySettings(**{**file, **first, **last})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = "_".join(map(str, fault["loc"]))
        flag = f", or --{name.replace('_', '-')}," if name in flags else ""
        source = sources.get(name, f"CAST_{name.upper()}{flag}")
        where = f"{source} is {fault['input']!r}: " if name else ""
        raise UsageError(f"{where}{fault['msg']}") from None


def _check_settings(names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in GatewaySettings.model_fields:
            raise UsageError(f"{where}: {_unknown(name, GatewaySettings.model_fields)}")


def _unknown(name: str, known: Iterable[str]) -> str:
    """The message for an unknown key, with the nearest known one."""
    if near := difflib.get_close_matches(name, known, 1):
        return f"unknown key {name}; the nearest is {near[0]}"
    return f"unknown key {name}; there are {', '.join(known)}"
