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
    for text in ('a "quoted" one', "avx512_bf16", "2:4", "210 sparse, 1 dense"):
        expect(card).to_contain_text(text)
    expect(card).to_contain_text("66.7 MB of 212.3 MB dense (0.314)")
    for text in (
        "Headint8",
        "Bits a weight5.02",
        "Perplexitynot known: the worker is given as a URL",
    ):
        expect(card).to_contain_text(text)
    dense = page.locator("#sparsity [data-variant=dense]")
    for text in ("0 sparse, 211 dense", "Headbfloat16", "Bits a weight16"):
        expect(dense).to_contain_text(text)
    expect(column(page, "sparse")).to_contain_text("5.02 bits a weight, perplexity not known")


def test_quality_stands_beside_speed(url: str, watched: Watched) -> None:
    page = watched.page
    page.goto(url)
    sparse = page.locator("#sparsity [data-variant=sparse]")
    for text in (
        "Modelsmollm2-135m-dense",
        "Directoryruns/demo/int8",
        "Perplexity54.8 before int8 (heldout-wiki.txt, 8,176 tokens)",
        "Zeros50 %",
        "Bits a weight5.02",
    ):
        expect(sparse).to_contain_text(text)
    dense = page.locator("#sparsity [data-variant=dense]")
    for text in ("Perplexitynot measured", "Zerosnot known", "Bits a weight16"):
        expect(dense).to_contain_text(text)
    expect(column(page, "sparse")).to_contain_text(
        "5.02 bits a weight, perplexity 54.8 before int8"
    )
    expect(column(page, "dense")).to_contain_text("16 bits a weight, perplexity not measured")


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
