"""CAST_WORKER_KEY -> the key that a gateway and its workers share, and the worker's check of it.

vLLM's own check (VLLM_API_KEY) covers the paths under /v1, /v2, /inference and /cohere, and leaves
/metrics, /tokenize, /invocations, /pause and others open. `KeyCheck` covers every path but two that
probes ask and that tell nothing of requests. It needs no more than the standard library, since
vLLM's processes load it.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

VARIABLE = "CAST_WORKER_KEY"
FILE_VARIABLE = "CAST_WORKER_KEY_FILE"
VLLM_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = ("/health", "/version")
HOW_TO_MAKE = "`openssl rand -hex 32` makes one"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


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
        ValueError: if both are given, the file cannot be read, or what they hold fits no header. No
            message tells the key.
    """
    if not key and file is None:
        return ""
    if key and file is not None:
        raise ValueError(f"{VARIABLE} and {FILE_VARIABLE} are both set; unset one")
    where = VARIABLE
    if file is not None:
        where = str(file)
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no ASCII text"
            raise ValueError(f"the workers' key in {where} cannot be read: {reason}") from None
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"{where} holds no key: it must be printable ASCII without spaces; {HOW_TO_MAKE}"
        )
    return key


def key_of_environment() -> str:
    """The key that a worker asks for: ours, else vLLM's own; empty for none.

    Raises:
        ValueError: as `read_key` does.
    """
    file = os.environ.get(FILE_VARIABLE)
    own = read_key(os.environ.get(VARIABLE, ""), Path(file) if file else None)
    return own or read_key(os.environ.get(VLLM_VARIABLE, ""), None)


class KeyCheck:
    """ASGI middleware for vLLM's --middleware: 401 without the key of the environment.

    Raises:
        ValueError: if the environment has no key.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        key = key_of_environment()
        if not key:
            raise ValueError(f"no key to check: set {VARIABLE} or {FILE_VARIABLE}")
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or scope["path"] in OPEN_PATHS or self._knows(scope):
            return await self.app(scope, receive, send)
        if kind == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        message = (
            "this worker answers its gateway alone: ask the gateway, or send the header "
            f"Authorization: Bearer KEY with the key of its {VARIABLE}"
        )
        error = {"message": message, "type": "authentication_error", "param": None}
        body = json.dumps({"error": {**error, "code": "invalid_api_key"}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _knows(self, scope: Message) -> bool:
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == b"bearer"
