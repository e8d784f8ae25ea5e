"""Every request -> an id that goes in and out as X-Request-Id, and one line of JSON in the log.

The line has the variant, the status and the time taken; it never has anything of a body.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cast_serve.gateway.api.errors import CUT_OFF, APIError, send_error
from cast_serve.gateway.api.paths import PROBES

logger = logging.getLogger(__name__)

QUIET_PATHS = (*PROBES, "/metrics", "/v1/comparison")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
OWN_ERROR = APIError(
    500, "the gateway failed at this request; its log has the cause", "server_error"
)
CLIENT_LEFT = 499  # nginx's number for a client that closed the connection


def facts_of(scope: Scope) -> dict[str, Any]:
    """More for the log line of this request; handlers add to it."""
    facts: dict[str, Any] = scope.setdefault("state", {}).setdefault("cast_facts", {})
    return facts


class RequestLog:
    """The middleware; the outermost, so that errors of all others are logged too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        facts = facts_of(scope)
        facts["request_id"] = request_id.decode()
        began_s = time.perf_counter()
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # By uvicorn, once the grace of a shutdown is over. It would log a traceback of each
            # request, and this is the outermost call of its task, so it ends here.
            if status == CLIENT_LEFT:  # no answer has begun
                await send_error(send_with_id, CUT_OFF, (b"connection", b"close"))
        except Exception:
            if status == CLIENT_LEFT:  # no answer has begun
                await send_error(send_with_id, OWN_ERROR, (b"connection", b"close"))
            raise  # uvicorn logs the cause
        finally:
            if scope["path"] not in QUIET_PATHS:
                line = {"method": scope["method"], "path": scope["path"][:200], "status": status}
                line["duration_s"] = round(time.perf_counter() - began_s, 6)
                logger.info("%s", json.dumps({**line, **facts}))
