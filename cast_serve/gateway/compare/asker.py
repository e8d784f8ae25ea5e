"""The gateway's own requests, by which it compares variants: not counted as traffic."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cast_serve.gateway.admission import NoPlacesError, Places
from cast_serve.gateway.api.errors import unavailable
from cast_serve.gateway.compare import side_by_side
from cast_serve.gateway.compare.agreement import COMPLETIONS, max_scored_tokens
from cast_serve.gateway.exchange import Exchange
from cast_serve.gateway.forward import BrokenError, Forwarder
from cast_serve.gateway.upstream.replica import Variant
from cast_serve.latency import RequestTiming


@dataclass(eq=False, frozen=True)
class Asker:
    """Asks one replica of a variant, once.

    Attributes:
        timeout_s: of a repeated request.
    """

    variants: Mapping[str, Variant]
    forwarder: Forwarder
    places: Places
    timeout_s: float

    def max_scored_tokens(self) -> int:
        """Of prompt and answer together, for agreement."""
        return max_scored_tokens(variant.max_model_len for variant in self.variants.values())

    async def repeat(
        self, name: str, body: dict[str, Any], route: str = COMPLETIONS
    ) -> tuple[dict[str, Any], RequestTiming]:
        """A request of the shadow's, outside the queue: its own budget bounds it."""
        until_s = asyncio.get_running_loop().time() + self.timeout_s
        return await self._complete(name, body, route, until_s)

    async def compare(self, body: dict[str, Any], baseline: str, until_s: float) -> dict[str, Any]:
        """One prompt on every variant, one after the other, each in a place of its queue.

        Args:
            body: of POST /v1/compare, checked.
            baseline: the variant that the others are compared with.
            until_s: on the event loop's clock.

        Raises:
            APIError: 503 if a variant does not answer; 429 or 504.
        """

        async def complete(
            name: str, body: dict[str, Any], route: str = COMPLETIONS
        ) -> tuple[dict[str, Any], RequestTiming]:
            if not self.variants[name].is_up:
                raise unavailable(name, self.variants[name].status)
            try:
                async with self.places.place(name, until_s):
                    return await self._complete(name, body, route, until_s)
            except NoPlacesError:
                raise unavailable(name, self.variants[name].status) from None

        names = sorted(self.variants, key=lambda name: name != baseline)
        return await side_by_side.compare(body, names, complete, self.max_scored_tokens())

    async def _complete(
        self, name: str, body: dict[str, Any], route: str, until_s: float
    ) -> tuple[dict[str, Any], RequestTiming]:
        variant = self.variants[name]
        replica = variant.pick()
        if replica is None:
            raise unavailable(name, variant.status)
        exchange = Exchange(route, keeps_text=True, body=body, deadline_s=until_s)
        try:
            answer = await self.forwarder.collect(replica, exchange)
        except BrokenError:
            raise unavailable(name, variant.status) from None
        assert exchange.timing is not None
        return answer, exchange.timing
