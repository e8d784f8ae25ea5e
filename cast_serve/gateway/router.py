"""The name in a request's ``model`` -> the variant to ask, and its fallback."""

import hashlib
import itertools
import random
from collections.abc import Mapping

from cast_serve.errors import UsageError
from cast_serve.gateway.api.errors import APIError
from cast_serve.gateway.upstream.replica import Variant


class Router:
    """Splits and fallbacks. It only decides; nothing is asked here.

    Args:
        variants: by name.
        split: {model name: {variant: share of its requests}}; shares sum to 1 and may change while
            it runs. Of two variants, one whose share grows keeps the keys that it has.
        fallbacks: {variant that is down: variant that answers for it}.

    Raises:
        UsageError: if a split or fallback names an unknown variant.
    """

    def __init__(
        self,
        variants: Mapping[str, Variant],
        split: Mapping[str, dict[str, float]],
        fallbacks: Mapping[str, str],
    ) -> None:
        self.variants = variants
        self.split = split
        self.fallbacks = fallbacks
        weights = [name for shares in split.values() for name in shares]
        for name in (*weights, *fallbacks, *fallbacks.values()):
            if name not in variants:
                raise UsageError(
                    f"split or fallback names {name!r}, but the variants are {list(variants)}"
                )
        if taken := split.keys() & variants.keys():
            raise UsageError(f"split {sorted(taken)} is the name of a variant; choose another")

    def choose(self, model: str, key: str | None) -> Variant:
        """The variant that a model's name means, whether it is up or not.

        Args:
            model: a variant's name, or a split's.
            key: requests with the same key go to the same variant of a split; None: by chance.

        Raises:
            APIError: 404 if there is no such model.
        """
        if model in self.variants:
            return self.variants[model]
        if model not in self.split:
            known = sorted([*self.variants, *self.split])
            raise APIError(
                404,
                f"The model {model[:200]!r} does not exist; this gateway serves {known}.",
                "invalid_request_error",
                "model_not_found",
                "model",
            )
        point = _point(f"{model}/{key}") if key else random.random()
        shares = self.split[model]
        for variant, end in zip(shares, itertools.accumulate(shares.values()), strict=True):
            if point < end:
                return self.variants[variant]
        return self.variants[variant]  # the shares' sum was rounded below 1

    def candidates(self, variant: Variant) -> list[Variant]:
        """A variant and its fallback, if it has one."""
        names = dict.fromkeys((variant.name, self.fallbacks.get(variant.name, variant.name)))
        return [self.variants[name] for name in names]

    def answerer(self, variant: Variant) -> Variant | None:
        """Who answers for a variant now: itself, else its fallback, else none."""
        return next((found for found in self.candidates(variant) if found.is_up), None)


def _point(key: str) -> float:
    """A number in [0, 1) that is the same for the same key in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
