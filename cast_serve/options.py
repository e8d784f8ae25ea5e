"""What an option takes and its default, in words -> the option of a command line, in one style."""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

# What an option takes, in --help; or the words to choose from, as in int8|none.
METAVARS = {
    *("DIR", "FILE", "MODEL", "ORG/NAME", "NAME", "TEXT", "FLAGS"),
    *("REGEX", "KEY", "ADDRESS", "URL", "CORES", "WAYS"),
    *("NAME,NAME", "N", "N,N", "N:M", "LENGTH", "RATE", "RATE,RATE", "SHARE"),
    *("MINUTES", "SECONDS", "MS"),
    *("KEY=VALUE", "NAME=DIR", "NAME=URL", "NAME=NAME", "NAME=NAME:N,NAME:N"),
}


def option(
    metavar: str, text: str, default: str | None = None, name: str | None = None, **more: Any
) -> Any:
    """Typer's option.

    Args:
        metavar: one of `METAVARS`, or words with ``|`` between them.
        text: of --help.
        default: shown as such, where the parameter's own default does not say it.
        name: of the flag, where it is not the parameter's.
        more: passed on to typer.
    """
    names = () if name is None else (name,)
    shown = True if default is None else default
    return typer.Option(*names, metavar=metavar, help=text, show_default=shown, **more)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(version("cast-serve"))
        raise typer.Exit


VERSION = typer.Option(
    "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
)

# Settings of a command whose flags, --help too, are those of what it runs.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def of_source_tree(context: typer.Context, module: str) -> Any:
    """A module of benchmarks/, which lies beside the packages and is in no wheel.

    Args:
        context: of the command that runs it.
        module: its whole name.

    Raises:
        typer.Exit: with 2, if this is not a source tree.
    """
    tree = Path(__file__).resolve().parents[1]
    if not (tree / "benchmarks").is_dir():
        print(
            f"{context.command_path} runs {module.removesuffix('.__main__')}, which is in no "
            "wheel: it needs the source tree",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    if str(tree) not in sys.path:
        sys.path.insert(0, str(tree))
    return import_module(module)
