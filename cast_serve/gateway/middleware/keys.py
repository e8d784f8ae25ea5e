"""API keys -> whether a request may pass: ASGI middleware before every route but the open ones.

Keys are kept as sha256 only. A request's key is compared with every one of them in constant time,
so that neither which key matched nor how much of it shows in the time taken. The route is read from
the ASGI scope and never from the Host header.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from cast_serve.gateway.api.errors import APIError, send_error
from cast_serve.gateway.api.paths import is_open


def load_keys(text: str, file: Path | None) -> list[bytes]:
    """Digests of the keys in a setting and a file.

    Args:
        text: keys with commas between; ``sha256:HEX`` is a key already hashed.
        file: the same, one a line; empty lines and lines that begin with # are passed over.

    Raises:
        ValueError: if the file cannot be read, the text or the file is given and holds no key, or
            a digest is none.
    """
    keys = [key.strip() for key in text.split(",")]
    if text and not any(keys):
        raise ValueError(
            f"CAST_API_KEYS is {text!r}, which holds no API key and would leave the gateway open; "
            "name a key, or unset the variable to leave it open"
        )
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the API keys in {file}: {error}") from error
        lines = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(lines):
            raise ValueError(f"{file} holds no API key, which would leave the gateway open")
        keys += lines
    return [_digest(key) for key in keys if key]


def _digest(key: str) -> bytes:
    prefix, colon, digits = key.partition(":")
    if prefix != "sha256" or not colon:
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(digits)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ValueError("an API key that begins with sha256: must go on with 64 hex digits")
    return digest


class KeyCheck:
    """The middleware; without keys it lets everything pass."""

    def __init__(self, app: ASGIApp, digests: Iterable[bytes]) -> None:
        self.app = app
        self.digests = tuple(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.digests or is_open(scope["path"]):
            return await self.app(scope, receive, send)
        if self._is_known(dict(scope["headers"]).get(b"authorization", b"")):
            return await self.app(scope, receive, send)
        error = APIError(
            401,
            "this gateway wants an API key; send the header Authorization: Bearer KEY",
            "authentication_error",
            "invalid_api_key",
        )
        await send_error(send, error, (b"www-authenticate", b"Bearer"))

    def _is_known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]  # all of them
        return scheme.lower() == b"bearer" and any(matches)
