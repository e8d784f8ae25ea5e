"""Accuracies by hand, the border of prompt and answer, and what servers are refused for."""

import asyncio
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from cast_serve.guard import Guard
from cast_serve.questions import Question
from loadtest.errors import QualityError
from loadtest.judge.verdict import judge
from loadtest.quality import choices
from loadtest.quality.ask import asking
from loadtest.quality.choices import log_likelihood, measure, summarise
from loadtest.record import Recorded
from loadtest.report.files import markdown_of
from loadtest.report.result import result_of
from loadtest.report.words import accuracy_text
from tests.loadtest.conftest import ServeApp
from tests.loadtest.quality.answers import each, echoed
from tests.loadtest.recordings import two_pairs, write_out

PROMPT = (("Question: Is it?", None), ("\nAnswer", -9.0), (":", -8.0))


@pytest.mark.parametrize(
    ("tokens", "num_generated", "answer", "nats"),
    [
        ([*PROMPT, (" much", -1.0), (" better", -0.5)], 0, " much better", -1.5),
        ([*PROMPT, (" much", -1.0), (" better", -0.5), (".", -4.0)], 1, " much better", -1.5),
        ([("<s>", None), *PROMPT, (" yes", -1.0), (".", -4.0)], 1, " yes", -1.0),
        # A token across the border counts in full.
        ([*PROMPT[:2], (": y", -2.0), ("es", -1.0)], 0, " yes", -3.0),
        ([*PROMPT[:2], (": yes", -2.0)], 0, " yes", -2.0),
        # " é" in two tokens: the first holds the space and half of the letter: it spells nothing.
        ([*PROMPT, ("", -3.0), (" é", -1.0)], 0, " é", -4.0),
        ([*PROMPT, (" ", -3.0), ("", -1.0), ("é", -0.5)], 0, " é", -4.5),
        # A question's letter that the server cannot show does not move the border.
        (
            [("Caf", None), ("", -5.0), ("\ufffd?\nAnswer:", -5.0), (" é", -1.0)],
            *(0, " é", -1.0),
        ),
    ],
)
def test_an_answer_is_the_tokens_behind_the_prompt_without_what_was_generated(
    tokens: list[tuple[str, float | None]], num_generated: int, answer: str, nats: float
) -> None:
    response = echoed(*tokens, num_generated=num_generated)
    assert log_likelihood(response, answer) == nats


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"choices": [{"text": "x", "logprobs": None}]}, "does not return log prob.*vLLM"),
        ({"error": "no"}, "does not return log probabilities"),
        (echoed((" it", -1.0), num_generated=1), "does not return log probabilities"),
        (echoed(("token_id:5", None), ("token_id:6", -1.0)), "'token_id:5token_id:6', which .*ids"),
        (
            echoed(*PROMPT, (" yes", -1.0), is_short=True),
            "does not return log probabilities",
        ),
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


def test_both_variants_score_each_answer() -> None:
    bodies: list[dict[str, Any]] = []

    async def ask(body: dict[str, Any]) -> Mapping[str, Any]:
        bodies.append(body)
        prompt, _, answer = body["prompt"].rpartition(":")
        score = -2.0 if answer == " no" or body["model"] == "sparse" else -2.4
        return echoed((f"{prompt}:", None), (answer, score), ("!", -0.1), num_generated=1)

    ticks: list[int] = []
    questions = [Question("A?", ("yes", "no"), 1)]
    found = asyncio.run(measure(ask, questions, "dense", "sparse", lambda: ticks.append(1)))
    chosen = {"by_sum": {"dense": 1, "sparse": 0}, "by_byte": {"dense": 0, "sparse": 0}}
    assert found == [{"right": 1, "num_choices": 2, **chosen}]
    assert len(ticks) == len(bodies) == 4
    prompt = {"model": "dense", "prompt": "Question: A?\nAnswer: yes", "max_tokens": 1}
    assert bodies[0] == {**prompt, "temperature": 0, "echo": True, "logprobs": 1}


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
            raise QualityError("it burns")
        return echoed((body["prompt"], None), (body["prompt"][-4:], -1.0))

    questions = [Question(f"{n}?", ("yes", "yet"), 0) for n in range(100)]
    with pytest.raises(ValueError, match="accuracy .* question 3, variant sparse: it burns"):
        asyncio.run(measure(ask, questions, "dense", "sparse"))
    assert num_asked < 40


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
    assert found["low"] == pytest.approx(0.05 - 1.96 * error, abs=0.001)
    assert found["high"] == pytest.approx(0.05 + 1.96 * error, abs=0.001)
    alike = summarise(each([(0, 0, 0), (0, 1, 1)]), "dense", "sparse")["acc_norm_difference"]
    assert (alike["low"], alike["mean"], alike["high"]) == (0, 0, 0)
    of_one = summarise(each([(0, 0, 1)]), "dense", "sparse")["acc_norm_difference"]
    assert (of_one["low"], of_one["mean"], of_one["high"]) == (None, -1, None)


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
    for part in ("100 questions from set.jsonl", "58.0% ± 5.0%", "60.0% ± 4.9%", "-2.0 points (-"):
        assert part in text
    assert text in markdown_of(result_of(run))
    write_out(tmp_path / "out", run)
    assert f"<p>{text}</p>" in (tmp_path / "out" / "report.html").read_text()
    assert result_of(Recorded.read(tmp_path / "out")) == result_of(run)


def test_the_lower_end_must_not_lose_more_than_the_guard_allows() -> None:
    result = result_of(two_pairs(choices=each(ROWS)))
    difference = result["choices"]["acc_norm_difference"]
    low = difference["low"]
    assert -0.12 < low < -0.05

    def check(choices: Any, limit: float) -> dict[str, Any]:
        verdict = judge({**result, "choices": choices}, Guard.of({"max_accuracy_loss": limit}))
        (found,) = (c for c in verdict["checks"] if c["name"] == "max_accuracy_loss")
        assert verdict["verdict"] == found["verdict"]
        return dict(found)

    kept = check(result["choices"], -low)
    assert (kept["limit"], kept["found"], kept["verdict"]) == (-low, -low, "pass")
    unsure = check(result["choices"], 0.05)
    assert unsure["verdict"] == "inconclusive"
    assert "-0.0200 (-0." in unsure["why"]
    worse = {**result["choices"], "acc_norm_difference": {**difference, "high": -0.051}}
    assert check(worse, 0.05)["verdict"] == "fail"
    alike = result_of(two_pairs(choices=each([(0, 0, 0)] * 9)))["choices"]
    assert check(alike, 0)["verdict"] == "pass"
    unknown = check(None, 0.05)
    assert (unknown["found"], unknown["verdict"]) == (None, "inconclusive")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/ask", "answer of another variant, since sparse is down; start it again"),
        ("/absent", "/absent gave 404 .*; start it again"),
        ("/broken", "gave JSONDecodeError .*; start it again"),
    ],
)
def test_what_is_not_an_answer_is_refused(serve_app: ServeApp, path: str, message: str) -> None:
    app = FastAPI()
    headers = {"X-Cast-Fallback": "sparse"}
    app.add_api_route("/ask", lambda: JSONResponse({}, headers=headers), methods=["POST"])
    app.add_api_route("/broken", lambda: Response("{"), methods=["POST"])

    async def ask() -> None:
        async with asking(f"{serve_app(app)}{path}", None, 10.0, "start it again") as one:
            await one({})

    with pytest.raises(ValueError, match=message):
        asyncio.run(ask())
