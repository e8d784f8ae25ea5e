"""A request as it arrives -> its body, bounded in bytes and time, parsed and checked.

Bodies are bounded in sum too, since each is held until its request has been answered: as text of
Python's it may take four times its bytes, and once more those that are sent on.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from cast_serve.gateway.api import schemas
from cast_serve.gateway.api.errors import APIError, ShedError
from cast_serve.gateway.exchange import Exchange
from cast_serve.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

LARGE_BODY_BYTES = 1 << 16  # takes long enough to check that others would wait for the event loop


class BodyReader:
    """Reads bodies; large ones are checked in a thread.

    Args:
        settings: `max_body_bytes`, `max_held_body_bytes`, `body_timeout_s`, `max_prompts` and
            `strict_fields`.

    Attributes:
        num_held_bytes: of the bodies of all requests that have not ended.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.num_held_bytes = 0
        # One at a time: memory and the interpreter's lock are not for large bodies alone.
        self._checker = ThreadPoolExecutor(1, "check-body")
        self._logged: set[str] = set()  # fields without effect

    def close(self) -> None:
        self._checker.shutdown()

    def release(self, exchange: Exchange) -> None:
        """Frees the body's bytes; call it when the request has ended."""
        self.num_held_bytes -= exchange.num_body_bytes
        exchange.num_body_bytes = 0

    async def read(
        self, request: Request, exchange: Exchange
    ) -> tuple[dict[str, Any], BaseModel, list[str]]:
        """The body as received, the same checked, and the names of fields without effect (removed).

        Args:
            exchange: whose body it is; the bytes that came are counted there, until `release`.

        Raises:
            APIError: 400, 408, 413 or 429.
            ClientDisconnect: if the client leaves before the body is whole.
        """
        limit = self.settings.max_body_bytes
        too_large = APIError(
            413,
            f"the request body is larger than {limit} bytes; send less, or raise "
            "CAST_MAX_BODY_BYTES",
            "invalid_request_error",
            "request_too_large",
        )
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for chunk in request.stream():
                    exchange.num_body_bytes += len(chunk)
                    self.num_held_bytes += len(chunk)
                    if self.num_held_bytes > self.settings.max_held_body_bytes:
                        raise self._too_many_bytes()
                    content += chunk
                    if len(content) > limit:
                        raise too_large
        except TimeoutError:
            raise APIError(
                408,
                f"the request body did not arrive within {self.settings.body_timeout_s:g} s",
                "invalid_request_error",
                "body_timeout",
            ) from None

        def check() -> tuple[dict[str, Any], BaseModel]:
            body = schemas.read_json(content)
            return body, schemas.parse(request.url.path, body, self.settings.max_prompts)

        if len(content) < LARGE_BODY_BYTES:
            body, checked = check()
        else:
            loop = asyncio.get_running_loop()
            body, checked = await loop.run_in_executor(self._checker, check)
        without_effect = schemas.take_without_effect(body)
        if without_effect and self.settings.strict_fields:
            raise schemas.unknown_field(without_effect[0])
        for name in set(without_effect) - self._logged:
            self._logged.add(name)
            logger.warning(
                "the field %s has no effect here: it is accepted but not passed on", name
            )
        return body, checked, without_effect

    def _too_many_bytes(self) -> ShedError:
        return ShedError(
            429,
            f"waiting and running requests hold bodies of {self.settings.max_held_body_bytes} "
            "bytes in total, the limit; try again after Retry-After seconds, or raise "
            "CAST_MAX_HELD_BODY_BYTES",
            "rate_limit_error",
            "too_many_bytes",
            headers={"Retry-After": "1"},
        )
