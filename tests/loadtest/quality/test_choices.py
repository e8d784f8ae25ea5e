"""Accuracies by hand, the border of prompt and answer, what servers refuse, and the command."""

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
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
from loadtest.judge.verdict import Guard, judge
from loadtest.quality import choices
from loadtest.quality.ask import Ask
from loadtest.quality.choices import log_likelihood, measure, summarise
from loadtest.record import Recorded
from loadtest.report.commands import terms_of
from loadtest.report.files import markdown_of, write_out
from loadtest.report.result import result_of
from loadtest.report.words import accuracy_text
from tests.loadtest.conftest import ServeApp
from tests.loadtest.recordings import two_pairs

GOOD = '{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}'


def echoed(*tokens: tuple[str, float | None], num_generated: int = 0) -> dict[str, Any]:
    """A completion's answer as vLLM writes it: each token's text and log likelihood."""
    texts = [text for text, _ in tokens]
    offsets = [len("".join(texts[:place])) for place in range(len(texts))]
    found = {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob in tokens],
        "text_offset": offsets,
    }
    usage = {"prompt_tokens": len(texts) - num_generated, "completion_tokens": num_generated}
    choice = {"index": 0, "text": "".join(texts), "logprobs": found, "finish_reason": "length"}
    return {"choices": [choice], "usage": usage}


PROMPT = (("Question: Is it?", None), ("\nAnswer", -9.0), (":", -8.0))


def test_an_answer_is_the_tokens_behind_the_prompt_without_what_was_generated() -> None:
    response = echoed(*PROMPT, (" much", -1.0), (" better", -0.5), (".", -4.0), num_generated=1)
    assert log_likelihood(response, " much better") == -1.5
    response = echoed(*PROMPT, (" much", -1.0), (" better", -0.5))
    assert log_likelihood(response, " much better") == -1.5


def test_a_bos_token_shifts_nothing() -> None:
    response = echoed(("<s>", None), *PROMPT, (" yes", -1.0), (".", -4.0), num_generated=1)
    assert response["choices"][0]["logprobs"]["text_offset"][3] == len(
        "<s>Question: Is it?\nAnswer"
    )
    assert log_likelihood(response, " yes") == -1.0


def test_a_token_across_the_border_counts_in_full() -> None:
    start = PROMPT[:2]
    assert log_likelihood(echoed(*start, (": y", -2.0), ("es", -1.0)), " yes") == -3.0
    assert log_likelihood(echoed(*start, (": yes", -2.0)), " yes") == -2.0


def test_parts_of_a_character_belong_to_the_answer_they_are_in() -> None:
    # " é" in two tokens: the first holds the space and half of the letter, and so spells nothing.
    assert log_likelihood(echoed(*PROMPT, ("", -3.0), (" é", -1.0)), " é") == -4.0
    assert log_likelihood(echoed(*PROMPT, (" ", -3.0), ("", -1.0), ("é", -0.5)), " é") == -4.5
    # A question's letter that the server cannot show does not move the border.
    garbled = (("Question: Caf", None), ("", -5.0), ("\ufffd?\nAnswer:", -5.0))
    assert log_likelihood(echoed(*garbled, (" é", -1.0)), " é") == -1.0


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"choices": [{"text": "x", "logprobs": None}]}, "repeats no prompt with log prob.*vLLM"),
        ({"error": "no"}, "repeats no prompt with log probabilities"),
        (echoed((" it", -1.0), num_generated=1), "repeats no prompt with log probabilities"),
        (echoed(("token_id:5", None), ("token_id:6", -1.0)), "'token_id:5token_id:6', which .*ids"),
        (echoed(*PROMPT, (" no", -1.0)), "does not end with the answer ' yes'"),
        (
            echoed(*PROMPT, (" y", -1.0), ("es", None)),
            "no log probability to a part .*' yes'.*vLLM",
        ),
        (echoed(*PROMPT, (" yes", 7.5)), "reports 7.5 as a log prob.*without --logprobs-mode"),
        (echoed(*PROMPT, (" yes", math.nan)), "reports nan as a log probability"),
    ],
)
def test_what_cannot_be_scored_is_refused(response: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihood(response, " yes")


def test_lists_of_unequal_length_are_refused() -> None:
    response = echoed(*PROMPT, (" yes", -1.0))
    response["choices"][0]["logprobs"]["token_logprobs"].pop()
    with pytest.raises(ValueError, match="repeats no prompt with log probabilities"):
        log_likelihood(response, " yes")


def scorer(scores: Mapping[tuple[str, str], float], bodies: list[dict[str, Any]]) -> Ask:
    """A server by (variant, answer): one token for the prompt, one for the answer, one more."""

    async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
        bodies.append(body)
        prompt, _, answer = body["prompt"].partition("\nAnswer: ")
        score = scores[body["model"], answer]
        tokens = ((f"{prompt}\nAnswer:", None), (f" {answer}", score), ("!", -0.1))
        return echoed(*tokens, num_generated=1)

    return ask


def test_the_likeliest_answer_in_sum_and_per_byte() -> None:
    questions = [Question("A?", ("no", "ääh"), 1), Question("B?", ("one", "two"), 0)]
    scores = {
        # In sum "no"; per byte -1.0 against -0.8, so "ääh": 5 bytes. Per character it would lose.
        ("dense", "no"): -2.0,
        ("dense", "ääh"): -4.0,
        # Per byte -1.0 against -1.2.
        ("sparse", "no"): -2.0,
        ("sparse", "ääh"): -6.0,
        # Equal: the first.
        ("dense", "one"): -3.0,
        ("dense", "two"): -3.0,
        ("sparse", "one"): -3.5,
        ("sparse", "two"): -3.0,
    }
    bodies: list[dict[str, Any]] = []
    ticks: list[int] = []
    ask = scorer(scores, bodies)
    found = asyncio.run(measure(ask, questions, "dense", "sparse", lambda: ticks.append(1)))
    assert found == [
        {
            "right": 1,
            "num_choices": 2,
            "by_sum": {"dense": 0, "sparse": 0},
            "by_byte": {"dense": 1, "sparse": 0},
        },
        {
            "right": 0,
            "num_choices": 2,
            "by_sum": {"dense": 0, "sparse": 1},
            "by_byte": {"dense": 0, "sparse": 1},
        },
    ]
    assert len(ticks) == 8
    assert bodies[0] == {
        "model": "dense",
        "prompt": "Question: A?\nAnswer: no",
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }


def test_so_many_requests_are_in_flight_and_no_more() -> None:
    in_flight, most = 0, 0

    async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return echoed((body["prompt"], None), (body["prompt"][-4:], -1.0))

    questions = [Question(f"{n}?", ("yes", "yet"), 0) for n in range(10)]
    asyncio.run(measure(ask, questions, "dense", "sparse"))
    assert most == choices.NUM_IN_FLIGHT == 8


def test_the_first_failure_ends_it_and_is_named() -> None:
    num_asked = 0

    async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0)
        if body["model"] == "sparse" and "2?" in body["prompt"]:
            raise ValueError("it burns")
        return echoed((body["prompt"], None), (body["prompt"][-4:], -1.0))

    questions = [Question(f"{n}?", ("yes", "yet"), 0) for n in range(100)]
    with pytest.raises(ValueError, match="accuracy .* question 3, variant sparse: it burns"):
        asyncio.run(measure(ask, questions, "dense", "sparse"))
    assert num_asked < 40


def each(rows: list[tuple[int, int, int]]) -> dict[str, Any]:
    """(right, dense's choice, sparse's choice) a question, the same in sum and per byte."""
    found = [
        {"right": right, "num_choices": 4, "by_sum": both, "by_byte": both}
        for right, dense, sparse in rows
        for both in [{"dense": dense, "sparse": sparse}]
    ]
    return {"source": "set.jsonl", "source_sha256": "0", "each": found}


def test_accuracies_by_hand() -> None:
    asked = each([(0, 0, 0), (1, 1, 0), (2, 2, 1), (3, 0, 3), (0, 0, 1)])
    asked["each"][0]["by_sum"] = {"dense": 1, "sparse": 0}  # in sum, dense gets it wrong
    found = summarise(asked, "dense", "sparse")
    dense, sparse = found["accuracy"]["dense"], found["accuracy"]["sparse"]
    assert (dense["acc"], dense["acc_norm"], dense["num_questions"]) == (3 / 5, 4 / 5, 5)
    assert (sparse["acc"], sparse["acc_norm"], sparse["num_questions"]) == (2 / 5, 2 / 5, 5)
    assert dense["acc_stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert sparse["acc_norm_stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    # Question by question 0, -1, -1, +1, -1; in sum it would be -1 / 5.
    assert found["acc_norm_difference"]["mean"] == -2 / 5
    assert found["acc_norm_difference"]["num_questions"] == 5
    assert found["source"] == "set.jsonl"


def test_the_interval_is_of_the_difference_question_by_question() -> None:
    # 40 won, 20 lost, the others alike: mean 0.05, variance (60 - 400 * 0.05 ** 2) / 399 / 400.
    rows = [(0, 1, 0)] * 40 + [(0, 0, 1)] * 20 + [(0, 0, 0)] * 170 + [(0, 1, 1)] * 170
    found = summarise(each(rows), "dense", "sparse")["acc_norm_difference"]
    error = math.sqrt((60 - 400 * 0.05**2) / 399 / 400)
    assert found["mean"] == 0.05
    assert found["low"] == pytest.approx(0.05 - 1.96 * error, abs=0.004)
    assert found["high"] == pytest.approx(0.05 + 1.96 * error, abs=0.004)
    # Unpaired, the two shares would give an interval more than twice as wide.
    assert found["high"] - found["low"] < 2 * 1.96 * math.sqrt(2 * 0.25 / 400) * 0.6
    alike = summarise(each([(0, 0, 0), (0, 1, 1)]), "dense", "sparse")["acc_norm_difference"]
    assert (alike["low"], alike["mean"], alike["high"]) == (0, 0, 0)


def test_one_question_has_no_standard_error_and_is_json() -> None:
    found = summarise(each([(0, 0, 1)]), "dense", "sparse")
    assert found["accuracy"]["dense"]["acc_stderr"] is None
    assert (found["acc_norm_difference"]["low"], found["acc_norm_difference"]["high"]) == (-1, -1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


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
    async with choices.server(url, api_key, 30.0) as ask:
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


def test_over_a_socket(serve_app: ServeApp) -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(body: dict[str, Any]) -> JSONResponse:
        if body["model"] == "absent":
            return JSONResponse({"error": {"message": "no such thing"}}, 404)
        score = None if body["model"] == "silent" else -1.0
        tokens = ((body["prompt"][:-4], None), (body["prompt"][-4:], score), ("!", -0.1))
        return JSONResponse(echoed(*tokens, num_generated=1))

    url = serve_app(app)

    def answer(url: str, baseline: str) -> list[dict[str, Any]]:
        question = Question("Is it?", ("yes", "yet"), 1)
        return asyncio.run(over_http(url, "key", [question], baseline, "fine"))

    both = {"good": 0, "fine": 0}
    assert answer(url, "good") == [{"right": 1, "num_choices": 2, "by_sum": both, "by_byte": both}]
    with pytest.raises(ValueError, match="variant absent: .*/completions gave 404 .*no such thing"):
        answer(url, "absent")
    with pytest.raises(ValueError, match="variant silent: .* no log probability to a part"):
        answer(url, "silent")
    with pytest.raises(ValueError, match="gave ConnectError .*leave --choices out"):
        answer("http://127.0.0.1:1", "good")


def test_the_record_names_the_file_and_its_content(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f"{GOOD}\n")
    about = choices.about(path, [])
    assert (about["source"], len(about["source_sha256"]), about["each"]) == (str(path), 64, [])


# 100 questions: dense 60 right, sparse 58: 5 won, 7 lost.
ROWS = [(0, 0, 0)] * 53 + [(0, 0, 1)] * 7 + [(0, 1, 0)] * 5 + [(0, 1, 1)] * 35


def test_reports_tell_it_and_older_records_are_read(tmp_path: Path) -> None:
    run = two_pairs()
    assert "choices" not in run.about
    assert result_of(run)["choices"] is None
    assert accuracy_text(result_of(run)) is None
    run = two_pairs(choices=each(ROWS))
    text = accuracy_text(result_of(run))
    assert text is not None
    assert text.startswith(
        "Of 100 questions of set.jsonl, sparse answers 58.0% ± 5.0% rightly and dense 60.0% ± 4.9% "
        "by log likelihood per byte (acc_norm): a difference of -2.0 points (-"
    )
    assert "By their sum (acc) it is 58.0% ± 5.0% and 60.0% ± 4.9%." in text
    assert text in markdown_of(result_of(run))
    write_out(tmp_path / "out", run, result_of(run))
    assert f"<p>{text}</p>" in (tmp_path / "out" / "report.html").read_text()
    assert result_of(Recorded.read(tmp_path / "out")) == result_of(run)


def test_the_lower_end_must_not_lose_more_than_the_guard_allows() -> None:
    result = result_of(two_pairs(choices=each(ROWS)))
    low = result["choices"]["acc_norm_difference"]["low"]
    assert -0.12 < low < -0.05

    def check(choices: Any, limit: float) -> dict[str, Any]:
        verdict = judge({**result, "choices": choices}, Guard.of({"max_accuracy_loss": limit}))
        (found,) = (c for c in verdict["checks"] if c["name"] == "max_accuracy_loss")
        assert verdict["passed"] == found["passed"]
        return dict(found)

    kept = check(result["choices"], -low)
    assert (kept["limit"], kept["found"], kept["passed"]) == (-low, -low, True)
    lost = check(result["choices"], 0.05)
    assert not lost["passed"]
    assert lost["why"].startswith("acc_norm, candidate - baseline -0.0200 (-0.")
    assert lost["why"].endswith("over 100 questions: its lower end must reach -0.05")
    alike = result_of(two_pairs(choices=each([(0, 0, 0)] * 9)))["choices"]
    assert check(alike, 0)["passed"]
    assert check(alike, 0)["why"].endswith("must reach 0")
    unknown = check(None, 0.05)
    assert (unknown["found"], unknown["passed"]) == (None, False)
    assert unknown["why"] == "accuracy was not measured; give --choices"


@pytest.mark.parametrize("value", [-0.1, 1.5, "little", True])
def test_a_wrong_guard_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_accuracy_loss is {value!r}; give a number from 0"):
        Guard.of({"max_accuracy_loss": value})


def test_a_guard_needs_choices(tmp_path: Path) -> None:
    guard = tmp_path / "guard.toml"
    guard.write_text("max_accuracy_loss = 0.02")
    with pytest.raises(
        ValueError, match="sets max_accuracy_loss, but nothing .*give --choices, or"
    ):
        terms_of(guard, None, None, 0, is_aa=False)
    terms = terms_of(guard, None, None, 0, is_aa=False, has_choices=True)
    assert terms["guard"]["max_accuracy_loss"] == 0.02


class Echoing:
    """Puts scores before the mock: dense likes what is right, sparse what is first."""

    def __init__(self, app: ASGIApp, echoes: list[dict[str, Any]]) -> None:
        self.app = app
        self.echoes = echoes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            return await self.app(scope, receive, send)
        message = await receive()
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
    rows = [{"question": "?", "choices": ["wrong", "right"], "answer": n != 1} for n in range(4)]
    path.write_text(
        "".join(json.dumps(row | {"answer": int(row["answer"])}) + "\n" for row in rows)
    )
    guard.write_text("max_accuracy_loss = 0.5\nallow_void = true")
    flags = ("run", "--url", serve_app(app), *SMALL, "--choices", str(path), "--guard", str(guard))
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [*flags, "--choices-limit", "3", "--out", str(out)])
    assert done.exit_code == 1, done.output
    assert "max_accuracy_loss: acc_norm, candidate - baseline -0.3333 (-1.0000 to" in done.stderr
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--choices", "/absent"], "questions /absent cannot be read"),
        (["--choices-limit", "3"], "--choices-limit 3 limits nothing; give --choices too"),
        (["--choices", "SET", "--choices-limit", "0"], "--choices-limit 0 is too small"),
        (["--choices", "SET"], "POST http://127.0.0.1:1/v1/completions gave ConnectError"),
    ],
)
def test_wrong_use_exits_2_with_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(GOOD + "\n")
    flags = [str(path) if flag == "SET" else flag for flag in flags]
    done = CliRunner().invoke(command, ["run", "--url", "http://127.0.0.1:1", *flags])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
