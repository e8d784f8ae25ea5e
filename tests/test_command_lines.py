"""What the three command lines have in common."""

from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from cast_serve.__main__ import app as cast_serve
from cast_train.__main__ import app as cast_train
from loadtest.__main__ import app as cast_loadtest

APPS = pytest.mark.parametrize("app", [cast_serve, cast_train, cast_loadtest])


@APPS
def test_version(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout.strip()) == (0, version("cast-serve"))


@APPS
def test_help_names_every_command(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        assert name in done.stdout
