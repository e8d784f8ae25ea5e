"""Directories by variant name -> the gateway's URL, with both variants served, launch after launch.

A launch has an effect of its own: where memory lies, which core a worker gets, what else the
machine does. It moves all block pairs of the launch alike, so no number of pairs shows it. Several
launches do. From one to the next the variants change places, because `cast-serve up` gives the
first variant the first cores; a file for `cast-serve up --config` says itself who gets which.
"""

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from cast_serve.ports import free_port
from loadtest.errors import LaunchError, UsageError

READY_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 60.0
# Settings in our environment that would change who can reach the gateway, or who answers.
NOT_PASSED_ON = {
    "CAST_HOST",
    "CAST_API_KEYS",
    "CAST_API_KEYS_FILE",
    "CAST_SPLIT",
    "CAST_FALLBACK",
    "CAST_SHADOW_FRACTION",
}


def parse_variants(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Parses NAME=DIR for each name.

    Raises:
        UsageError: if one is not NAME=DIR, DIR holds no model, or `names` are others.
    """
    found = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"--variant {text!r} is not NAME=DIR; write dense=PATH")
        if not (Path(directory) / "config.json").is_file():
            raise UsageError(f"--variant {name}: {directory} holds no model (no config.json)")
        found[name] = Path(directory)
    if sorted(found) != sorted(names):
        raise UsageError(
            f"--variant names {', '.join(sorted(found))}, but --baseline and --candidate are "
            f"{', '.join(names)}; give --variant NAME=DIR for each"
        )
    return found


def read_config(file: Path, names: Sequence[str]) -> dict[str, Any]:
    """The variants in a file for `cast-serve up --config`, which checks all that it says of them.

    Raises:
        UsageError: if it cannot be read, or has no variant of one of the names.
    """
    try:
        config = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file} cannot be read: {error}") from error
    variants = config.get("variant")
    if not isinstance(variants, dict):
        variants = {}
    for name in names:
        if name not in variants:
            raise UsageError(
                f"--config {file} has no [variant.{name}], but {', '.join(variants) or 'none'}; "
                "name two of its variants with --baseline and --candidate"
            )
    return dict(variants)


@contextmanager
def served(
    models: Mapping[str, Path], config: Path | None, number: int, vllm_flags: Sequence[str]
) -> Iterator[str]:
    """Serves the variants by `cast-serve up` while the block lasts.

    Those of `models` change places in every launch with an odd `number`; with a `config` there are
    none of them. Yields the gateway's URL.

    Raises:
        LaunchError: if it ends or is not ready in time, with the last lines it printed.
    """
    port = free_port()
    names = list(models) if number % 2 == 0 else list(models)[::-1]
    command = [sys.executable, "-m", "cast_serve", "up", "--port", str(port)]
    if config is not None:
        command += ["--config", str(config)]
    for name in names:
        command += ["--variant", f"{name}={models[name]}"]
    if vllm_flags:
        command += ["--", *vllm_flags]
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(process, url)
            yield url
        except LaunchError as error:
            log.seek(max(0, log.tell() - 4000))
            lines = "\n".join(log.read().decode(errors="replace").splitlines()[-15:])
            raise LaunchError(f"launch {number + 1}: {error}; it printed:\n{lines}") from None
        finally:
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
            finally:  # after a Ctrl-C meanwhile too
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LaunchError(f"`cast-serve up` ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise LaunchError(f"`cast-serve up` was not ready within {READY_TIMEOUT_S:.0f} s")
