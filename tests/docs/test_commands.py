"""Commands that README and docs/ show are understood by the command lines that there are."""

import re
import shlex
from typing import Any

import pytest
import typer

from cast_serve.__main__ import app as cast_serve
from cast_train.__main__ import app as cast_train
from cast_train.__main__ import repeat_text_flag
from loadtest.__main__ import app as cast_loadtest
from tests.docs.pages import PAGES, blocks

APPS = {"cast-serve": cast_serve, "cast-train": cast_train, "cast-loadtest": cast_loadtest}
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in blocks(page)
    if block.language in ("", "bash")
    for line in block.commands
    if re.match(r"(\.venv/bin/)?cast-(serve|train|loadtest) ", line)
    and " ..." not in line  # there the page leaves out what is needed
]


def test_they_are_found() -> None:
    assert len(COMMANDS) > 10
    assert {"README.md", "docs/index.md", "docs/serving.md", "docs/deploy.md"} <= {
        page for page, _ in COMMANDS
    }


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_flags_and_arguments_are_known(page: str, line: str) -> None:
    program, name, *arguments = shlex.split(line.replace("...", ""))
    group: Any = typer.main.get_command(APPS[program.rpartition("/")[2]])
    # It raises what is wrong.
    group.commands[name].make_context(name, repeat_text_flag(arguments))
