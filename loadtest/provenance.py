"""A command line and a server -> what a record says about how it came about."""

import platform
import shlex
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

SECRETS = {"api_key"}


def provenance(context: typer.Context, url: str) -> dict[str, Any]:
    """Command, date, versions, and what the server tells about itself, for run.json."""
    return {
        "url": url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_of(context),
        "versions": {"cast-serve": version("cast-serve"), "python": platform.python_version()},
        "served": served_at(url),
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


def served_at(url: str) -> dict[str, dict[str, str]]:
    """By variant: kernel, layers and bytes, as our gateway's /metrics names them; else empty."""
    try:
        response = httpx.get(f"{url.rstrip('/')}/metrics", timeout=5, trust_env=False)
        families = list(text_string_to_metric_families(response.text))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}
    return {
        sample.labels["variant"]: {k: v for k, v in sample.labels.items() if k != "variant"}
        for family in families
        if family.name == "cast_variant_info"
        for sample in family.samples
    }
