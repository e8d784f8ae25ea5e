"""Environment variables and flags -> the gateway's settings, each default written once here."""

from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class CanaryPlan(NamedTuple):
    """How a split's requests move to one of its two variants.

    Attributes:
        model: the split's name.
        variant: the one that gets more and more.
        steps: its shares, ascending, in (0, 1].
    """

    model: str
    variant: str
    steps: list[float]


class GatewaySettings(BaseSettings):
    """Everything the gateway can be told; ``CAST_HOST`` and so on in the environment."""

    model_config = SettingsConfigDict(env_prefix="CAST_", extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port to listen on")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="minimum level of the gateway's own log lines; requests are logged at info",
    )
    log_dir: Path | None = Field(
        default=None,
        description="folder for the local workers' `VARIANT.log`; none: a temporary folder, "
        "removed after a clean exit",
    )

    control_socket: Path | None = Field(
        default=None,
        description="Unix socket of `up` for `cast-serve roll`; none: one named after the port, "
        "in a folder only this user can open",
    )

    api_keys: str = Field(
        default="",
        repr=False,
        description="comma-separated keys, plain or hashed as `sha256:HEX`; none: open to everyone",
    )
    api_keys_file: Path | None = Field(default=None, description="the same, one per line")
    worker_key: str = Field(
        default="",
        repr=False,
        description="sent to workers as `Authorization: Bearer KEY`; `cast-serve worker` reads the "
        "same variable and requires it; refused in `--set`, where `ps` would show it; none: `up` "
        "makes one, `gateway` sends none",
    )
    worker_key_file: Path | None = Field(
        default=None, description="one-line file with that key; `cast-serve worker` reads it too"
    )

    max_body_bytes: int = Field(
        default=4 << 20, gt=0, description="largest request body; above it, 413"
    )
    max_held_body_bytes: int = Field(
        default=64 << 20,
        gt=0,
        description="bodies of all waiting and running requests; above it, 429. They take up to "
        "5× as much memory",
    )
    max_answer_bytes: int = Field(
        default=64 << 20, gt=0, description="largest answer that is not streamed; above it, 502"
    )
    max_header_bytes: int = Field(
        default=32 << 10, gt=0, description="largest request head; above it, 431"
    )
    max_connections: int = Field(
        default=2048, gt=0, description="open connections, including idle ones; above it, 503"
    )
    body_timeout_s: float = Field(
        default=30, gt=0, description="timeout for a head, then for a body, to arrive"
    )
    request_timeout_s: float = Field(
        default=600,
        gt=0,
        description="timeout for an answer; the maximum for `X-Request-Timeout`",
    )
    max_choices: int = Field(default=8, gt=0, description="largest `n`")
    max_prompts: int = Field(default=32, gt=0, description="most prompts in one request")
    max_constraint_characters: int = Field(
        default=32_768,
        gt=0,
        description="most characters in a request's schema, regex, choice or grammar",
    )
    media_parts: bool = Field(
        default=False,
        description="accept images, audio and video in chats; workers open their URLs, which "
        "vLLM's `--allowed-media-domains` restricts",
    )
    strict_fields: bool = Field(
        default=False, description="answer 400 to OpenAI fields that have no effect here"
    )
    max_running: int = Field(
        default=64, gt=0, description="concurrent requests per replica; vLLM batches them"
    )
    max_queued: int = Field(
        default=256, ge=0, description="waiting requests per variant; above it, 429"
    )

    split: str = Field(
        default="",
        description="`llama=dense:9,sparse:1`: split requests for `llama` by these weights; `;` "
        "separates several",
    )
    fallback: str = Field(
        default="", description="`sparse=dense`: dense answers while sparse is down"
    )
    shadow_fraction: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of finished requests to repeat on the other variant",
    )
    shadow_concurrency: int = Field(
        default=1,
        gt=0,
        description="concurrent repeats; further ones are dropped and counted",
    )
    canary: str = Field(
        default="",
        description="`default=canary:0.05,0.25,1`: raise canary's share of the split `default` "
        "while it meets `canary_guard` (docs/deploy.md); none: off",
    )
    canary_guard: Path | None = Field(
        default=None,
        description="TOML file of guard rails, against the split's other variant",
    )
    canary_interval_s: float = Field(
        default=60, gt=0, description="time whose requests make one comparison of the two"
    )
    comparison_window: int = Field(
        default=512, gt=1, description="latest requests per variant that `/v1/comparison` covers"
    )

    startup_timeout_s: float = Field(
        default=900, gt=0, description="timeout for a local worker to load"
    )
    health_interval_s: float = Field(
        default=1, gt=0, description="time between two checks of a worker"
    )
    hang_timeout_s: float = Field(
        default=8,
        gt=0,
        description="timeout for a one-token canary, or ten of the worker's full steps if longer",
    )
    drain_delay_s: float = Field(
        default=0,
        ge=0,
        description="time after SIGTERM to report unready but still answer, for slow load "
        "balancers",
    )
    shutdown_grace_s: float = Field(
        default=30, gt=0, description="timeout for running requests to finish"
    )

    @model_validator(mode="after")
    def _parses(self) -> "GatewaySettings":
        _ = self.split_weights, self.fallbacks, self.canary_plan
        if self.max_held_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_body_bytes {self.max_held_body_bytes} is below max_body_bytes "
                f"{self.max_body_bytes}, so a body of that size would never be accepted; raise it"
            )
        return self

    @property
    def split_weights(self) -> dict[str, dict[str, float]]:
        """{model name: {variant: share of its requests}}; shares sum to 1."""
        found: dict[str, dict[str, float]] = {}
        for text in filter(None, self.split.split(";")):
            name, equals, parts = text.partition("=")
            weights: dict[str, float] = {}
            for part in parts.split(","):
                variant, _, weight = part.partition(":")
                try:
                    weights[variant.strip()] = float(weight)
                except ValueError:
                    equals = ""
            total = sum(weights.values())
            if not (name.strip() and equals and total > 0 and min(weights.values()) >= 0):
                raise ValueError(
                    f"split {text!r} is not NAME=VARIANT:WEIGHT,VARIANT:WEIGHT with weights of 0 "
                    "or more; write, for example, llama=dense:9,sparse:1"
                )
            found[name.strip()] = {variant: weight / total for variant, weight in weights.items()}
        return found

    @property
    def fallbacks(self) -> dict[str, str]:
        """{variant that is down: variant that answers for it}."""
        found = {}
        for text in filter(None, self.fallback.split(",")):
            name, equals, other = (part.strip() for part in text.partition("="))
            if not (name and equals and other and name != other):
                raise ValueError(f"fallback {text!r} is not VARIANT=VARIANT; write sparse=dense")
            found[name] = other
        return found

    @property
    def canary_plan(self) -> CanaryPlan | None:
        """What `canary` says; None: it is off."""
        if not self.canary:
            if self.canary_guard is not None:
                raise ValueError(
                    f"canary_guard {self.canary_guard} has no effect without canary; write, for "
                    "example, canary=default=canary:0.05,0.25,1"
                )
            return None
        model, _, rest = self.canary.partition("=")
        variant, _, shares = rest.partition(":")
        model, variant = model.strip(), variant.strip()
        try:
            steps = [float(share) for share in shares.split(",")]
        except ValueError:
            steps = [0.0]
        is_ascending = all(low < high for low, high in pairwise([0.0, *steps]))
        if not (is_ascending and steps[-1] <= 1):
            raise ValueError(
                f"canary {self.canary!r} is not SPLIT=VARIANT:SHARE,SHARE with ascending shares "
                "above 0 and up to 1; write, for example, default=canary:0.05,0.25,1"
            )
        weights = self.split_weights.get(model, {})
        if variant not in weights or len(weights) != 2:
            raise ValueError(
                f"canary {self.canary!r} needs a split {model!r} of {variant!r} and one other "
                f"variant, but split is {self.split!r}; write, for example, "
                f"split={model}=stable:1,{variant}:0"
            )
        (stable,) = weights.keys() - {variant}
        if self.fallbacks.get(stable) == variant:
            raise ValueError(
                f"fallback {stable}={variant} would have the canary answer after it was rolled "
                "back; take it out while canary is set"
            )
        if self.canary_guard is None:
            raise ValueError(
                f"canary {self.canary!r} has no limits to keep to; give canary_guard, a TOML file "
                "with, for example, max_error_rate = 0.01 (docs/deploy.md)"
            )
        return CanaryPlan(model, variant, steps)
