"""What to serve, on the command line -> a gateway that runs, or one that serves something else.

`up`, `gateway` and `roll` of `cast-serve`. What they need is imported when they run.
"""

import difflib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cast_serve.errors import UsageError
from cast_serve.options import option

if TYPE_CHECKING:
    from cast_serve.gateway.settings import GatewaySettings
    from cast_serve.gateway.upstream.replica import Variant

GatewayPort = Annotated[
    int | None,
    option("N", "TCP port to listen on.", "CAST_PORT, else 8000", min=1, max=65535),
]
GatewayHost = Annotated[
    str | None, option("ADDRESS", "Address to listen on.", "CAST_HOST, else 127.0.0.1")
]
Split = Annotated[
    str | None,
    option(
        "NAME=NAME:N,NAME:N",
        "llama=dense:9,sparse:1: split the requests for llama by weight.",
        "CAST_SPLIT, else none",
    ),
]
Fallback = Annotated[
    str | None,
    option(
        "NAME=NAME",
        "sparse=dense: dense answers while sparse is down.",
        "CAST_FALLBACK, else none",
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    option(
        "debug|info|warning|error",
        "Minimum level of the gateway's own log lines.",
        "CAST_LOG_LEVEL, else info",
    ),
]
Assignments = Annotated[
    list[str] | None,
    option("KEY=VALUE", "Any gateway setting (docs/settings.md); repeatable.", "none", "--set"),
]


def up(
    context: typer.Context,
    variant: Annotated[
        list[str] | None,
        option(
            "NAME=DIR",
            "Name of a variant and its model, or MODEL+DRAFT (docs/serving.md); repeatable.",
            "those of --config",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        option(
            "FILE",
            "TOML file of variants and settings (docs/serving.md); flags override it.",
            "none",
        ),
    ] = None,
    port: GatewayPort = None,
    host: GatewayHost = None,
    split: Split = None,
    fallback: Fallback = None,
    log_level: LogLevel = None,
    log_dir: Annotated[
        Path | None,
        option(
            "DIR",
            "Folder to keep the workers' logs in.",
            "CAST_LOG_DIR, else a temporary folder, removed after a clean exit",
        ),
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Start one worker per variant, each on its own cores, and the gateway in front of them.

    Flags after -- go to every vLLM server: -- --enforce-eager, for example.
    """
    from cast_serve.gateway.upstream.config import (
        ServeConfig,
        WorkerConfig,
        read_config,
        settings_of,
    )
    from cast_serve.gateway.upstream.variants import local_variants

    given = ServeConfig() if config is None else read_config(config)
    workers = dict(given.variant)
    for name, values in _parse_variants(variant or []).items():
        if len(values) > 1:
            raise UsageError(f"--variant {name} is given twice; each directory needs its own name")
        known = workers.get(name, WorkerConfig())
        workers[name] = known.model_copy(update=_models(name, values[0]))
    if not workers:
        raise UsageError("nothing to serve; give --variant NAME=DIR, or --config FILE with one")
    flags: dict[str, Any] = {"host": host, "port": port, "split": split, "fallback": fallback}
    logs = {"log_level": log_level, "log_dir": log_dir}
    settings = settings_of(given.gateway, flags | logs, assignments or [])
    ports = [worker.port for worker in workers.values() if worker.port is not None]
    if len({settings.port, *ports}) <= len(ports):
        raise UsageError(
            f"ports {settings.port}, {ports}: gateway and variants need different ports"
        )
    for own in ports:
        check_port_is_free("127.0.0.1", own)
    _serve(local_variants(workers, context.args, settings.port), settings)


def gateway(
    variant: Annotated[
        list[str], option("NAME=URL", "Name of a variant and the URL of its server; repeatable.")
    ],
    port: GatewayPort = None,
    host: GatewayHost = None,
    split: Split = None,
    fallback: Fallback = None,
    log_level: LogLevel = None,
    assignments: Assignments = None,
) -> None:
    """Run the gateway in front of vLLM servers that run elsewhere (NAME=URL).

    Repeat a name to add a replica of that variant.
    """
    from cast_serve.gateway.upstream.config import settings_of
    from cast_serve.gateway.upstream.variants import remote_variants

    flags: dict[str, Any] = {"host": host, "port": port, "split": split, "fallback": fallback}
    settings = settings_of({}, {**flags, "log_level": log_level}, assignments or [])
    _serve(remote_variants(_parse_variants(variant)), settings)


Socket = Annotated[
    Path | None,
    option(
        "FILE",
        "Control socket of the gateway.",
        "CAST_CONTROL_SOCKET, else the one for --port",
        "--socket",
    ),
]


def roll(
    variant: Annotated[
        str,
        typer.Argument(
            metavar="NAME[=DIR]",
            help="Variant, and its new model; NAME alone: reload the same directory.",
        ),
    ],
    port: Annotated[
        int | None,
        option("N", "TCP port of the gateway.", "CAST_PORT, else 8000", min=1, max=65535),
    ] = None,
    control_socket: Socket = None,
) -> None:
    """Switch a variant of a running `cast-serve up` to another model without losing a request.

    A second worker starts and takes over once it answers; the first one finishes its requests.
    """
    from cast_serve.checkpoint import hub
    from cast_serve.gateway.upstream.config import settings_of
    from cast_serve.gateway.upstream.control import default_path, request_roll

    name, equals, model = variant.partition("=")
    if not name or (equals and not model):
        raise UsageError(f"{variant!r} is not NAME or NAME=DIR; write sparse=PATH")
    settings = settings_of({}, {"port": port, "control_socket": control_socket}, [])
    if model and not (hub.is_name(model.partition("@")[0]) and not Path(model).exists()):
        model = str(Path(model).absolute())
    path = settings.control_socket or default_path(settings.port)
    print(json.dumps(request_roll(path, name, model or None, say)))


def _serve(variants: "list[Variant]", settings: "GatewaySettings") -> None:
    import logging

    import uvloop

    from cast_serve.gateway.app import serve

    _tell_of_misspelt(f"CAST_{name.upper()}" for name in type(settings).model_fields)
    check_port_is_free(settings.host, settings.port)
    if settings.log_dir is not None:
        try:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"log directory {settings.log_dir} cannot be made ({error.strerror}); name another"
            ) from None
    level = settings.log_level.upper()
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host  # IPv6
    url = f"http://{host}:{settings.port}"
    say(f"gateway: {url}, metrics at /metrics; Ctrl-C stops everything")
    uvloop.run(serve(variants, settings))
    print(json.dumps({"stopped": [variant.name for variant in variants]}))


def _tell_of_misspelt(settings: Iterable[str]) -> None:
    """Warns of environment variables that look like misspelt settings."""
    known = set(settings)
    for name in sorted(os.environ.keys() - known):
        if name.startswith("CAST_") and (near := difflib.get_close_matches(name, known, 1, 0.9)):
            say(f"cast-serve: {name} in the environment is not a setting; the nearest is {near[0]}")


def _parse_variants(given: list[str]) -> dict[str, list[str]]:
    from cast_serve.gateway.upstream.config import check_name

    variants: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"--variant {text!r} is not NAME=DIR or NAME=URL; write dense=PATH")
        check_name(name, f"--variant {text!r}")
        variants.setdefault(name, []).append(value)
    return variants


def _models(name: str, text: str) -> dict[str, Any]:
    """`WorkerConfig.dir`, and `draft` of MODEL+DRAFT; a directory may have a + in its name."""
    model, plus, draft = text.partition("+")
    if not plus or Path(text).is_dir():
        return {"dir": Path(text), "command": ()}
    if not (model and draft):
        raise UsageError(f"--variant {name}={text} is not NAME=MODEL+DRAFT; name both models")
    return {"dir": Path(model), "draft": Path(draft), "command": ()}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def check_port_is_free(host: str, port: int) -> None:
    """Raises UsageError if the port is taken, or the host is not one of this machine's."""
    import socket

    flags = socket.AI_PASSIVE  # an empty host is every address
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
        family, _, _, _, address = found[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be listened on ({error.strerror}); "
            "free it or name another --port"
        ) from None
