"""What is served: of the model's directory, and of the worker's metrics."""

from playwright.sync_api import expect

from tests.browser import Watched
from tests.cast_serve.gateway.dashboard.fake_gateway import FakeGateway, column


def test_of_a_worker_by_url_only_the_metrics_tell(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.models = {"dense": {}, "sparse": {}}  # given as URLs
    page = watched.page
    page.goto(url)
    card = page.locator("#sparsity [data-variant=sparse]")
    for text in ('a "quoted" one', "210 sparse, 1 dense", "66.7 MB of 212.3 MB", "5.02"):
        expect(card).to_contain_text(text)
    expect(card).to_contain_text("Draft48:64, 81.3 % of its tokens accepted")
    expect(page.locator("#sparsity [data-variant=dense]")).not_to_contain_text("Draft")
    expect(card).to_contain_text("unknown: the worker is given as a URL")


def test_quality_stands_beside_speed(url: str, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    for text in ("runs/demo/int8", "54.8 before int8 (heldout-wiki.txt", "50 %", "5.02"):
        expect(page.locator("#sparsity [data-variant=sparse]")).to_contain_text(text)
    expect(page.locator("#sparsity [data-variant=dense]")).to_contain_text("not measured")
    expect(column(page, "sparse")).to_contain_text("perplexity 54.8 before int8")


def test_a_directory_that_cannot_be_read_is_told(
    url: str, gateway: FakeGateway, watched: Watched
) -> None:
    gateway.models["dense"]["quality"] = {"perplexity": None}
    gateway.models["sparse"] |= {"quality": None, "zeros": None, "problem": "<b>cast.json</b>"}
    page = watched.page
    page.goto(url)
    card = page.locator("#sparsity [data-variant=sparse]")
    expect(card.locator(".error")).to_have_text("Error: <b>cast.json</b>")
    expect(page.locator("#sparsity [data-variant=dense]")).to_contain_text("Perplexityinfinite")
