"""CAST_WORKER_KEY -> the key that a gateway and its workers share, and the worker's check of it.

vLLM's own check (VLLM_API_KEY) covers the paths under /v1, /v2, /inference and /cohere, and leaves
/metrics, /tokenize, /invocations, /pause and others open. `WorkerKeyCheck` covers every path but
two that probes ask and that tell nothing of requests. It needs no more than the standard library,
since vLLM's processes load it.
"""

import hashlib
import ipaddress
import os
import re
from pathlib import Path

from cast_serve.errors import UsageError
from cast_serve.key_check import App, KeyCheck

VARIABLE = "CAST_WORKER_KEY"
FILE_VARIABLE = "CAST_WORKER_KEY_FILE"
VLLM_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = ("/health", "/version")
HOW_TO_MAKE = "`openssl rand -hex 32` makes one"
NEEDS_KEY = (
    "this worker answers only its gateway: send requests to the gateway, or send the header "
    f"Authorization: Bearer KEY with the key in its {VARIABLE}"
)


def is_loopback(host: str | None) -> bool:
    """Whether only this machine's processes reach what listens there; None is everywhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "::").is_loopback
    except ValueError:  # another name
        return False


def read_key(key: str, file: Path | None) -> str:
    """The key, or a file's one line; empty if neither is given.

    Raises:
        UsageError: if both are given, the file cannot be read, or the key cannot be a header's
            value. No message shows the key.
    """
    if not key and file is None:
        return ""
    if key and file is not None:
        raise UsageError(f"{VARIABLE} and {FILE_VARIABLE} are both set; unset one")
    where = VARIABLE
    if file is not None:
        where = str(file)
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise UsageError(f"the workers' key in {where} cannot be read: {reason}") from None
    if not re.fullmatch(r"[!-~]+", key):
        raise UsageError(
            f"{where} holds no key: it must be printable ASCII without spaces; {HOW_TO_MAKE}"
        )
    return key


def key_of_environment() -> str:
    """The key that a worker asks for: ours, else vLLM's own; empty for none.

    Raises:
        UsageError: as `read_key` does.
    """
    file = os.environ.get(FILE_VARIABLE)
    own = read_key(os.environ.get(VARIABLE, ""), Path(file) if file else None)
    return own or read_key(os.environ.get(VLLM_VARIABLE, ""), None)


class WorkerKeyCheck(KeyCheck):
    """For vLLM's --middleware: 401 without the key of the environment.

    Raises:
        UsageError: if the environment has no key.
    """

    def __init__(self, app: App) -> None:
        key = key_of_environment()
        if not key:
            raise UsageError(f"no key to check: set {VARIABLE} or {FILE_VARIABLE}")
        digest = hashlib.sha256(key.encode()).digest()
        super().__init__(app, [digest], OPEN_PATHS.__contains__, NEEDS_KEY)
