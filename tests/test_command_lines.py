"""What the three command lines have in common."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cast_serve.__main__ import app as cast_serve
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.options import METAVARS
from cast_train.__main__ import app as cast_train
from cast_train.config import METHODS
from loadtest.__main__ import app as cast_loadtest

APPS = pytest.mark.parametrize("app", [cast_serve, cast_train, cast_loadtest])


@APPS
def test_version_and_help_which_names_every_command(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout.strip()) == (0, version("cast-serve"))
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        assert name in done.stdout


def options(app: typer.Typer, *commands: str) -> Iterator[tuple[str, Any]]:
    """Of the commands, or of all: the command's name, and an option that takes a value."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for option in command.params:
            takes_value = option.param_type_name == "option" and not option.is_flag
            if takes_value and (not commands or name in commands):
                yield name, option


@APPS
def test_every_option_says_in_one_style_what_it_takes_and_its_default(app: typer.Typer) -> None:
    found = list(options(app))
    assert len(found) > 10
    for command, option in found:
        where = f"{command} {option.opts[0]}"
        is_choice = option.metavar and "|" in option.metavar or option.metavar == "int8"
        assert is_choice or option.metavar in METAVARS, where
        is_shown = isinstance(option.show_default, str) or option.default not in (None, "", ())
        assert option.required or is_shown, where
        assert "default" not in option.help, where  # in words of its own


def test_the_defaults_in_the_help_are_the_settings_own() -> None:
    checked = set()
    settings = {
        name: field.default
        for method in reversed(METHODS)  # the first, gates, is the default
        for name, field in METHODS[method].model_fields.items()
    }
    for _, option in options(cast_train, "run"):
        if option.name in settings:
            assert option.show_default == str(settings[option.name]), option.name
            checked.add(option.name)
    assert {"steps", "method", "zeros"} <= checked
    for _, option in options(cast_serve, "up", "gateway"):
        if option.name in GatewaySettings.model_fields and option.name != "log_dir":
            default = GatewaySettings.model_fields[option.name].default or "none"
            assert option.show_default == f"CAST_{option.name.upper()}, else {default}"
            checked.add(option.name)
    assert {"host", "port", "split", "fallback", "log_level"} <= checked
