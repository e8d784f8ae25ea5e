"""The variants and splits -> OpenAI's list of models, each as its worker describes it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cast_serve.gateway.router import Router
from cast_serve.gateway.upstream.client import Client, WorkerError
from cast_serve.gateway.upstream.replica import Variant

TIMEOUT_S = 5.0  # for a worker to say what models it has


@dataclass(eq=False, frozen=True)
class ModelList:
    """GET /v1/models and below."""

    variants: Mapping[str, Variant]
    router: Router
    client: Client

    async def all(self) -> dict[str, Any]:
        """OpenAI's model list.

        A variant that does not answer has a card of its name and ``status``: `Variant.status`, or
        ``down``.
        """
        cards: list[dict[str, Any]] = []
        for variant in self.variants.values():
            card = await self._card_of(variant)
            cards.append({"id": variant.name, "object": "model", **card, "owned_by": "cast-serve"})
        cards += [
            {"id": name, "object": "model", "owned_by": "cast-serve", "split": shares}
            for name, shares in self.router.split.items()
        ]
        return {"object": "list", "data": cards}

    async def one(self, name: str) -> dict[str, Any]:
        """One card of `all`.

        Raises:
            APIError: 404 if there is no such model.
        """
        self.router.choose(name, None)
        return next(dict(card) for card in (await self.all())["data"] if card["id"] == name)

    async def _card_of(self, variant: Variant) -> dict[str, Any]:
        """What a worker says of the variant's model; ``status`` where none is up."""
        if (replica := variant.pick()) is not None:
            with suppress(WorkerError, ValueError, KeyError, TypeError):
                reply = await self.client.ask(f"{replica.url}/v1/models", TIMEOUT_S)
                cards = {card["id"]: card for card in reply.json()["data"]}
                return dict(cards[variant.name])  # others, as of adapters, are not passed on
        return {} if variant.is_up else {"status": variant.status or "down"}
