"""A command line and a server -> where a record is from: command, date, versions, variants."""

import platform
import shlex
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

from loadtest.send.connection import authorization

SECRETS = {"api_key"}


def provenance(context: typer.Context, url: str, api_key: str | None) -> dict[str, Any]:
    """Command, date, versions, and what the server says about itself, for run.json."""
    return {
        "url": url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_of(context),
        "versions": {"cast-serve": version("cast-serve"), "python": platform.python_version()},
        "served": served_at(url, api_key),
    }


def command_of(context: typer.Context) -> str:
    """The command with every option that was given, but for secrets."""
    words = ["cast-loadtest", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = "SECRET" if name in SECRETS else context.params[name]
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return shlex.join(words)


def served_at(url: str, api_key: str | None = None) -> dict[str, dict[str, str]]:
    """By variant: kernel, layers and bytes, as our gateway's /metrics names them; else empty.

    If the server wants another key, that is printed on stderr: without its metrics no one would
    notice that dense was measured against dense.
    """
    try:
        response = httpx.get(
            f"{url.rstrip('/')}/metrics",
            headers=authorization(api_key),
            timeout=5,
            trust_env=False,
        )
    except (httpx.HTTPError, httpx.InvalidURL):
        return {}
    if response.status_code in (401, 403):
        typer.echo(
            f"cast-loadtest: {url}/metrics answered {response.status_code}, so the record does not "
            "say which kernels were served; give --api-key (CAST_LOADTEST_API_KEY) a key that "
            "opens it",
            err=True,
        )
        return {}
    try:
        families = list(text_string_to_metric_families(response.text))
    except ValueError:  # another kind of server
        return {}
    return {
        sample.labels["variant"]: {k: v for k, v in sample.labels.items() if k != "variant"}
        for family in families
        if family.name == "cast_variant_info"
        for sample in family.samples
    }
