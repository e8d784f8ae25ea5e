"""The variants and splits -> OpenAI's list of models, each as its worker describes it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cast_serve.gateway.router import Router
from cast_serve.gateway.upstream.client import Client, WorkerError
from cast_serve.gateway.upstream.replica import Variant

TIMEOUT_S = 5.0  # for a worker to list its models


@dataclass(eq=False, frozen=True)
class ModelList:
    """What GET /v1/models and GET /v1/models/NAME answer."""

    variants: Mapping[str, Variant]
    router: Router
    client: Client

    async def all(self) -> dict[str, Any]:
        """OpenAI's model list: the variants, then the splits."""
        cards = [await self._card(name) for name in (*self.variants, *self.router.split)]
        return {"object": "list", "data": cards}

    async def one(self, name: str) -> dict[str, Any]:
        """One card of `all`.

        Raises:
            APIError: 404 if there is no such model.
        """
        self.router.choose(name, None)  # refuses unknown names
        return await self._card(name)

    async def _card(self, name: str) -> dict[str, Any]:
        """OpenAI's description of a model.

        That of a variant which does not answer has only its name and ``status``: `Variant.status`,
        or ``down``.
        """
        if name in self.variants:
            about = await self._told_of(self.variants[name])
        else:
            about = {"split": self.router.split[name]}
        return {"id": name, "object": "model", **about, "owned_by": "cast-serve"}

    async def _told_of(self, variant: Variant) -> dict[str, Any]:
        """What a worker says of the variant's model; ``status`` where none is up."""
        if (replica := variant.pick()) is not None:
            with suppress(WorkerError, ValueError, KeyError, TypeError):
                reply = await self.client.ask(f"{replica.url}/v1/models", TIMEOUT_S)
                cards = {card["id"]: card for card in reply.json()["data"]}
                return dict(cards[variant.name])  # other cards, such as LoRA adapters', stay there
        return {} if variant.is_up else {"status": variant.status or "down"}
