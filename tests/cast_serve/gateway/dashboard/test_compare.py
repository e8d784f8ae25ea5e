"""One prompt on both variants at once: answers, figures, errors."""

import re
import time

from playwright.sync_api import Page, expect

from tests.browser import Watched
from tests.cast_serve.gateway.dashboard.fake_gateway import WORDS, FakeGateway, column


def figure(page: Page, variant: str, name: str) -> float:
    pair = column(page, variant).locator("dl > div").filter(has=page.get_by_text(name, exact=True))
    return float(pair.locator("dd").inner_text().removesuffix(" ms"))


def test_both_variants_stream_side_by_side(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    page = watched.page
    page.goto(url)
    page.get_by_label("Example").select_option(label="A question")
    expect(page.get_by_label("Prompt")).to_have_value("Question: Why is the sky blue?\nAnswer:")
    page.get_by_label("Max tokens").fill("20")
    page.get_by_label("Prompt").fill("The capital of France is")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#outcome")).to_contain_text("Above 1, sparse is faster.")
    for name in ("dense", "sparse"):
        words = re.findall(r"\s?\S+", WORDS[name])[:20]
        assert column(page, name).locator(".answer").text_content() == "".join(words).strip()
        expect(column(page, name)).to_contain_text("done")
        assert figure(page, name, "TTFT") > 0
        assert figure(page, name, "tokens/s") > 0
        assert figure(page, name, "tokens") == 40  # as usage says, not one per event
    assert re.findall(r"(TTFT|TPOT|tokens/s)(?:\n|\s)*\d+\.\d\d×", page.inner_text("#outcome"))
    expect(page.locator("#outcome")).to_contain_text("The texts differ from character 50 on")
    expect(page.locator("#outcome")).to_contain_text("no interval, so this is not a verdict")
    assert sorted(body["model"] for body in gateway.bodies) == ["dense", "sparse"]
    assert gateway.bodies[0] | {"model": ""} == {
        "model": "",
        "prompt": "The capital of France is",
        "max_tokens": 20,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_nothing_to_compare_before_the_variants_are_known(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.readyz_answers.clear()
    page = watched.page
    page.goto(url)
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    gateway.readyz_answers.set()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#outcome")).to_contain_text("Above 1, sparse is faster.")
    assert len(gateway.bodies) == 2


def test_the_keyboard_is_enough_and_stop_stops(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.gap_s["dense"] = 60
    page = watched.page
    page.goto(url)
    expect(column(page, "sparse")).to_be_visible()
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    expect(column(page, "sparse")).to_contain_text("done")
    expect(column(page, "dense")).to_contain_text("waiting for the first token")
    page.keyboard.press("Enter")
    expect(column(page, "dense")).to_contain_text("stopped")
    expect(page.locator("#outcome")).to_contain_text("No ratio")
    expect(page.get_by_role("button", name="Compare")).to_be_focused()
    for _ in range(500):
        if gateway.left:
            break
        time.sleep(0.01)
    assert gateway.left == ["dense"]


def test_errors_stand_in_their_variants_columns(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.broken["sparse"] = {"message": "variant 'sparse' <b>left</b>", "type": "server_error"}
    gateway.refusal["dense"] = {"message": "the queue is full", "type": "rate_limit_error"}
    page = watched.page
    page.goto(url)
    page.get_by_role("button", name="Compare").click()
    answer = column(page, "sparse").locator(".answer")
    expect(answer).to_have_text("Paris, a cityError: variant 'sparse' <b>left</b>")
    expect(column(page, "dense")).to_contain_text("Error: the queue is full")
    expect(page.locator("#outcome")).to_contain_text("No ratio")
    watched.expect_problems("429")


def test_a_fallback_does_not_pass_for_the_variant(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.fallback["sparse"] = "dense"
    page = watched.page
    page.goto(url)
    page.get_by_role("button", name="Compare").click()
    expect(column(page, "sparse")).to_contain_text("dense answered instead")
    expect(page.locator("#outcome")).to_contain_text("No ratio")


def test_a_long_answer_starts_at_its_beginning(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.gap_s = {"dense": 0.0, "sparse": 0.0}
    gateway.words = {name: " word" * 400 for name in ("dense", "sparse")}
    page = watched.page
    page.goto(url)
    page.get_by_label("Max tokens").fill("400")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#outcome")).to_contain_text("Above 1, sparse is faster.")
    for name in ("dense", "sparse"):
        answer = column(page, name).locator(".answer")
        assert answer.evaluate("e => e.scrollHeight > e.clientHeight")
        assert answer.evaluate("e => e.scrollTop") == 0
