"""Digests of keys -> ASGI middleware that answers 401 to whoever sends none of them.

The gateway and its workers both use it. Keys are kept as sha256 only. A request's key is compared
with every one of them in constant time, so that neither which key matched nor how much of it shows
in the time taken. The route is read from the ASGI scope and never from the Host header. It needs no
more than the standard library, since vLLM's processes load it.
"""

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class KeyCheck:
    """The middleware; without digests every request passes.

    Args:
        app: the application behind it.
        digests: sha256 of each key.
        is_open: whether a path is answered without a key.
        message: of the 401: what to do.
    """

    def __init__(
        self, app: App, digests: Iterable[bytes], is_open: Callable[[str], bool], message: str
    ) -> None:
        self.app = app
        self.digests = tuple(digests)
        self.is_open = is_open
        self.message = message

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if (
            kind not in ("http", "websocket")
            or not self.digests
            or self.is_open(scope["path"])
            or self._is_known(dict(scope["headers"]).get(b"authorization", b""))
        ):
            return await self.app(scope, receive, send)
        if kind == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        error = {"message": self.message, "type": "authentication_error", "param": None}
        body = json.dumps({"error": {**error, "code": "invalid_api_key"}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _is_known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]  # all of them
        return scheme.lower() == b"bearer" and any(matches)
