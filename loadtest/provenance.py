"""A command line and a server -> where a record is from: date, machine, versions, models."""

import hashlib
import shlex
from collections.abc import Mapping
from contextlib import suppress
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cast_serve.provenance import origin
from loadtest.send.connection import authorization

SECRETS = {"api_key"}


def provenance(context: typer.Context, models: Mapping[str, Path]) -> dict[str, Any]:
    """Date, versions, machine, command and models, for run.json; taken before the run.

    `models` are directories that this command serves itself, by variant; each file is hashed.
    """
    return {
        **origin(),
        "command": command_of(context),
        "models": {name: hashes_of(directory) for name, directory in models.items()},
    }


def told_by(api_key: str | None, url: str) -> dict[str, Any]:
    """What a server says about itself, for run.json; `api_key` opens its /metrics."""
    return {
        "url": url,
        "served": served_at(url, api_key),
        "directories": directories_at(url, api_key),
    }


def hashes_of(directory: Path) -> dict[str, str]:
    """The sha256 of each file of a model directory."""
    found = {}
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def given_in(context: typer.Context) -> set[str]:
    """The parameters that the command line gives, even if their values are the defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def command_of(context: typer.Context) -> str:
    """The command with every option that was given, but for secrets."""
    words, given = ["cast-loadtest", str(context.info_name)], given_in(context)
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in given:
            continue
        value = "SECRET" if name in SECRETS else context.params[name]
        for one in value if isinstance(value, list) else [value]:
            words += [parameter.opts[0]] if one is True else [parameter.opts[0], str(one)]
    return shlex.join(words)


def served_at(url: str, api_key: str | None = None) -> dict[str, dict[str, str]]:
    """By variant: kernel, layers and bytes, as our gateway's /metrics names them; else empty.

    If the server wants another key, that is printed on stderr: without its metrics no one would
    notice that dense was measured against dense.
    """
    response = _get(url, "/metrics", api_key)
    if response is None:
        return {}
    if response.status_code in (401, 403):
        typer.echo(
            f"cast-loadtest: {url}/metrics answered {response.status_code}, so the record does not "
            "say which kernels were served; give --api-key (CAST_LOADTEST_API_KEY) a key that "
            "opens it",
            err=True,
        )
        return {}
    return {
        sample.labels["variant"]: {k: v for k, v in sample.labels.items() if k != "variant"}
        for sample in _samples(response, "cast_variant_info")
    }


def acceptance_at(url: str, api_key: str | None = None) -> dict[str, float]:
    """By variant with a draft: the share of proposed tokens that were accepted since its start.

    Of several replicas the mean; of a server that is not our gateway nothing.
    """
    shares: dict[str, list[float]] = {}
    for sample in _samples(_get(url, "/metrics", api_key), "cast_draft_acceptance_ratio"):
        if not isnan(sample.value):  # nothing was proposed yet
            shares.setdefault(sample.labels["variant"], []).append(sample.value)
    return {variant: fmean(found) for variant, found in shares.items()}


def directories_at(url: str, api_key: str | None = None) -> dict[str, dict[str, Any]]:
    """By variant: what our gateway says of the directory it serves; empty of another server."""
    response = _get(url, "/v1/comparison", api_key)
    try:
        found = dict(response.json()["models"]) if response and response.is_success else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: about for name, about in found.items() if isinstance(about, dict)}


def _get(url: str, path: str, api_key: str | None) -> httpx.Response | None:
    """The answer, or None without one."""
    headers = authorization(api_key)
    with suppress(httpx.HTTPError, httpx.InvalidURL):
        return httpx.get(f"{url.rstrip('/')}{path}", headers=headers, timeout=5, trust_env=False)
    return None


def _samples(metrics: httpx.Response | None, name: str) -> list[Sample]:
    """Those of one metric; none if the answer is none of our gateway's."""
    if metrics is None:
        return []
    try:
        families = list(text_string_to_metric_families(metrics.text))
    except ValueError:  # another kind of server
        return []
    return [s for family in families if family.name == name for s in family.samples]
