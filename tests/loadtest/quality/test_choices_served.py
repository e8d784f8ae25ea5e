"""Questions over HTTP: as in training through our gateway, over a socket, by the command."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cast_serve.gateway.app import create_app as create_gateway
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.variants import remote_variants
from cast_serve.questions import Question
from cast_train.evaluate.choices import choice_accuracy
from loadtest import mock_server
from loadtest.__main__ import app as command
from loadtest.quality import choices
from loadtest.quality.ask import asking
from loadtest.quality.choices import measure, summarise
from loadtest.record import Recorded
from loadtest.report.result import result_of
from tests.loadtest.conftest import ServeApp
from tests.loadtest.quality.answers import each, echoed


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Random weights over bytes."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 50  # far from uniform, so that the shortest is not the likeliest
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def worker(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> FastAPI:
    """Answers as vLLM does, for whatever model is named."""
    app = FastAPI()

    @app.get("/health")
    def health() -> Response:
        return Response()

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> JSONResponse:
        ids = tokenizer(body["prompt"]).input_ids
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        if body["model"] == "sparse":  # another opinion
            log_p = log_p.roll(1, dims=-1)
        ids.append(int(log_p[-1].argmax()))
        tokens: list[tuple[str, float | None]] = [(tokenizer.decode(ids[:1]), None)]
        shown = tokenizer.decode(ids[:1])
        for place in range(1, len(ids)):
            # A part of a character is no text; the last part is all of it.
            text = tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")
            tokens.append((text[len(shown) :], float(log_p[place - 1, ids[place]])))
            shown = max(shown, text, key=len)
        return JSONResponse(echoed(*tokens, num_generated=1))

    return app


async def over_http(
    url: str, api_key: str | None, questions: list[Question], baseline: str, candidate: str
) -> list[dict[str, Any]]:
    async with asking(url + choices.PATH, api_key, 30.0, choices.REMEDY) as ask:
        return await measure(ask, questions, baseline, candidate)


def test_the_same_as_in_training_through_our_gateway(serve_app: ServeApp) -> None:
    model, tokenizer = tiny_model()
    texts = ("a b", "bee", "c d e", "über", "naïve—no", "1234")
    questions = [
        Question(f"Is it {n} é?", (texts[n % 6], texts[(n + 1) % 6], texts[(n + 3) % 6]), n % 3)
        for n in range(24)
    ]
    url = serve_app(worker(model, tokenizer))
    gateway = create_gateway(
        remote_variants({"dense": [url], "sparse": [url]}), GatewaySettings(health_interval_s=0.05)
    )
    url = serve_app(gateway)
    while not gateway.state.gateway.is_ready:
        time.sleep(0.01)
    rows = asyncio.run(over_http(url, None, questions, "dense", "sparse"))
    for row, asked in zip(rows, questions, strict=True):
        in_sum, per_byte = (
            choice_accuracy(model, tokenizer, [replace(asked, answer=row[score]["dense"])])
            for score in ("by_sum", "by_byte")
        )
        assert (in_sum.acc, per_byte.acc_norm) == (1, 1)
    wanted = choice_accuracy(model, tokenizer, questions)
    summary = summarise(each([]) | {"each": rows}, "dense", "sparse")
    found = {**summary["accuracy"]["dense"], "chance": summary["chance"]}
    assert found == pytest.approx(wanted.about())
    assert any(row["by_sum"] != row["by_byte"] for row in rows)
    assert any(row["by_byte"]["dense"] != row["by_byte"]["sparse"] for row in rows)


class Echoing:
    """Puts scores before the mock: dense likes what is right, sparse what is first."""

    def __init__(self, app: ASGIApp, echoes: list[dict[str, Any]]) -> None:
        self.app = app
        self.echoes = echoes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            return await self.app(scope, receive, send)
        message: Message | None = await receive()
        assert message is not None
        body = json.loads(message["body"])

        async def again() -> Any:
            nonlocal message
            now, message = message, await receive() if message is None else None
            return now or await receive()

        if not body.get("echo"):
            return await self.app(scope, again, send)
        self.echoes.append(body)
        prompt, _, answer = body["prompt"].rpartition(":")
        is_liked = answer == (" right" if body["model"] == "dense" else " wrong")
        tokens = ((f"{prompt}:", None), (answer, -1.0 if is_liked else -2.0), ("!", -0.1))
        return await JSONResponse(echoed(*tokens, num_generated=1))(scope, receive, send)


SMALL = ("--num-prompts", "2", "--blocks", "2", "--output-tokens", "4", "--prompt-tokens", "8")


def test_the_command(serve_app: ServeApp, tmp_path: Path) -> None:
    variants = {name: mock_server.MockVariant(0.0, 0.0) for name in ("dense", "sparse")}
    app = mock_server.create_app(variants)
    echoes: list[dict[str, Any]] = []
    app.add_middleware(Echoing, echoes=echoes)
    path, guard = tmp_path / "set.jsonl", tmp_path / "guard.toml"
    rows = [{"question": "?", "choices": ["wrong", "right"], "answer": n} for n in (1, 0, 1, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard.write_text("max_accuracy_loss = 0.5\nallow_void = true")
    flags = ("run", "--url", serve_app(app), *SMALL, "--choices", str(path), "--guard", str(guard))
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [*flags, "--choices-limit", "3", "--out", str(out)])
    assert done.exit_code == 3, done.output  # three questions prove nothing
    assert (
        "INCONCLUSIVE: max_accuracy_loss: acc_norm, candidate - baseline -0.3333 (-1.0000 to"
        in done.stderr
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["choices"]["accuracy"]["dense"]["acc_norm"] == 2 / 3
    assert found["choices"]["accuracy"]["sparse"]["acc"] == 1 / 3
    assert len(echoes) == 3 * 2 * 2
    openings = {prompt[:9].isdigit() for _, prompt in app.state.requests}
    assert openings == {True}  # the load's requests came there, and no other
    recorded = Recorded.read(out)
    assert recorded.about["choices"]["each"][1] == {
        "right": 0,
        "num_choices": 2,
        "by_sum": {"dense": 1, "sparse": 0},
        "by_byte": {"dense": 1, "sparse": 0},
    }
    assert recorded.about["choices"]["source"] == str(path)
    assert "--choices-limit 3" in recorded.about["command"]
    assert result_of(recorded) == found == json.loads((out / "result.json").read_text())
