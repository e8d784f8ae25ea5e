"""A gateway that says what a test wants to see, and where the page shows it."""

import asyncio
import copy
import json
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from playwright.sync_api import Locator, Page

from cast_serve.gateway.dashboard.page import FILES, router

WORDS = {
    "dense": " Paris, a city on the Seine, and it has been the seat of kings and of parliaments "
    "for the better part of a thousand years.",
    "sparse": " Paris, a city on the Seine, and it has been the home of painters and of "
    "publishers for as long as anyone cares to remember.",
}
INFO = """\
# TYPE cast_variant_info gauge
cast_variant_info{variant="dense",pattern="",kernel="onednn",isa="AVX-512 BF16",dtype="bfloat16",\
head="bfloat16",draft="",num_sparse_layers="0",num_dense_layers="211",\
weight_bytes="212336640",dense_weight_bytes="212336640"} 1.0
cast_variant_info{variant="sparse",pattern="2:4",kernel="a \\"quoted\\" one",isa="avx512_bf16",\
dtype="bfloat16",head="int8",draft="48:64",num_sparse_layers="210",num_dense_layers="1",\
weight_bytes="66666240",dense_weight_bytes="212336640"} 1.0
cast_draft_acceptance_ratio{variant="dense",replica="0"} NaN
cast_draft_acceptance_ratio{variant="sparse",replica="0"} 0.8126
cast_requests_in_flight{variant="dense"} 0.0
"""


MODELS = {
    "dense": {
        "path": "data/models/smollm2-135m-dense",
        "model": "smollm2-135m-dense",
        **dict.fromkeys(("kind", "pattern", "quantized", "zeros", "quality", "problem")),
        "bits_per_weight": 16,
    },
    "sparse": {
        "path": "runs/demo/int8",
        "model": "smollm2-135m-dense",
        "kind": "compressed",
        "pattern": "2:4",
        "quantized": "int8",
        "zeros": 0.5,
        "bits_per_weight": 5.0234,
        "quality": {
            "perplexity": 54.8058,
            "text": "heldout-wiki.txt",
            "num_tokens": 8176,
            "context_tokens": 512,
            "is_before_quantizing": True,
        },
        "problem": None,
    },
}


class FakeGateway:
    """What the page talks to; a test sets the attributes."""

    def __init__(self) -> None:
        self.key = ""
        self.ready: dict[str, bool | str] = {"dense": True, "sparse": True}
        self.readyz_answers = threading.Event()
        self.readyz_answers.set()
        self.has_traffic = True
        self.has_interval = True
        self.shadow_fraction = 0.1
        self.tpot = (1.31, 1.2, 1.37)  # speed-up and its interval
        self.canary: dict[str, Any] | None = None
        self.models: dict[str, Any] = copy.deepcopy(MODELS)
        self.gap_s = {"dense": 0.006, "sparse": 0.004}
        self.words = WORDS
        self.refusal: dict[str, Any] = {}  # variant -> error object, as the response
        self.broken: dict[str, Any] = {}  # variant -> error object, as an event after 3 tokens
        self.fallback: dict[str, str] = {}  # variant -> the one that answers instead
        self.bodies: list[dict[str, Any]] = []
        self.num_polls = 0
        self.left: list[str] = []  # variants whose client left early

    def known(self) -> dict[str, Any]:
        return {
            "baseline": "dense",
            "candidate": "sparse",
            "window": 512,
            "min_requests": {"ratio": 5, "interval": 20},
            "shadow_fraction": self.shadow_fraction,
            "models": self.models,
            "canary": self.canary,
        }

    def comparison(self) -> dict[str, Any]:
        if not self.has_traffic:
            return {**self.known(), "variants": {"dense": {"num_requests": 0, "ttft_s": None}},
                    "speedups": {}, "agreement": None}  # fmt: skip
        self.num_polls += 1
        wave = (1, 1.04, 0.97, 1.08, 1.01, 0.94, 1.02)[self.num_polls % 7]

        def latencies(ttft_s: float, tpot_s: float, rate: float) -> dict[str, Any]:
            def quantiles(p50: float) -> dict[str, float]:
                return {"p50": p50, "p95": 1.4 * p50, "p99": 1.6 * p50, "n": 40}

            return {
                "num_requests": 40 + self.num_polls,
                "ttft_s": quantiles(ttft_s * wave),
                "itl_s": quantiles(tpot_s),
                "tpot_s": quantiles(tpot_s / wave),
                "e2e_s": quantiles(ttft_s + 40 * tpot_s),
                "output_tokens_per_s": quantiles(rate * wave),
            }

        def ratio(value: float, low: float, high: float) -> dict[str, float]:
            interval = {"low": low, "high": high, "confidence": 0.95}
            return {"ratio": value} | (interval if self.has_interval else {})

        return {
            **self.known(),
            "variants": {
                "dense": latencies(0.5526, 0.0667, 12.3),
                "sparse": latencies(0.5433, 0.0510, 14.7),
            },
            "speedups": {
                "ttft": {"p50": ratio(1.03, 0.96, 1.1), "p95": ratio(0.99, 0.8, 1.2)},
                "tpot": {"p50": ratio(*self.tpot), "p95": ratio(1.24, 1.11, 1.4)},
                "e2e": {"p50": ratio(0.85, 0.8, 0.9), "p95": None},
            },
            "agreement": None
            if not self.shadow_fraction
            else {
                "token_agreement": {
                    "mean": 0.874 * wave / 1.08,
                    **({"low": 0.861, "high": 0.887} if self.has_interval else {}),
                    "n_requests": 31,
                    "n_tokens": 1984,
                },
                "kl_nats": {"mean": 0.0312},
            },
        }

    async def events(self, variant: str, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            words = re.findall(r"\s?\S+", self.words[variant])[: body["max_tokens"]]
            for number, word in enumerate(words):
                await asyncio.sleep(self.gap_s[variant])
                if number == 3 and variant in self.broken:
                    yield f"data: {json.dumps({'error': self.broken[variant]})}\n\n"
                    return
                last = number == len(words) - 1
                choice = {"index": 0, "text": word, "finish_reason": "length" if last else None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            usage = {"prompt_tokens": 5, "completion_tokens": 2 * len(words)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.append(variant)
            raise

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(router())

        @app.middleware("http")
        async def check_key(request: Request, call_next: Any) -> Response:
            is_open = request.url.path in (*FILES, "/readyz")
            if is_open or request.headers.get("authorization", "") in (
                f"Bearer {self.key}",
                self.key,
            ):
                return await call_next(request)  # type: ignore[no-any-return]
            return JSONResponse({"error": {"message": "give an API key"}}, 401)

        @app.get("/readyz")
        async def readyz() -> JSONResponse:
            while not self.readyz_answers.is_set():
                await asyncio.sleep(0.01)
            return JSONResponse(self.ready, 200 if set(self.ready.values()) == {True} else 503)

        @app.get("/v1/comparison")
        async def comparison() -> dict[str, Any]:
            return self.comparison()

        @app.get("/metrics")
        async def metrics() -> PlainTextResponse:
            return PlainTextResponse(INFO)

        @app.post("/v1/completions")
        async def completions(body: dict[str, Any]) -> Response:
            self.bodies.append(body)
            if error := self.refusal.get(body["model"]):
                return JSONResponse({"error": error}, 429)
            variant = self.fallback.get(body["model"], body["model"])
            headers = {"X-Cast-Variant": variant}
            events = self.events(variant, body)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")

        return app


def column(page: Page, variant: str) -> Locator:
    """Where the page shows a variant's answer."""
    return page.locator(f"#columns [data-variant={variant}]")
