"""What a record says about its origin."""

from typing import Annotated

import pytest
import typer
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from typer.testing import CliRunner

from loadtest.provenance import acceptance_at, command_of, directories_at, given_in, served_at
from tests.loadtest.conftest import ServeApp

METRICS = """# TYPE cast_variant_info gauge
cast_variant_info{variant="sparse",kernel="cast",num_sparse_layers="210"} 1
# TYPE cast_draft_acceptance_ratio gauge
cast_draft_acceptance_ratio{variant="lossless",replica="0"} 0.5
cast_draft_acceptance_ratio{variant="lossless",replica="1"} 0.75
cast_draft_acceptance_ratio{variant="lossless",replica="2"} NaN
cast_draft_acceptance_ratio{variant="idle",replica="0"} NaN
# TYPE other gauge
other{variant="sparse"} 3
"""


def test_the_command_without_secrets_and_what_was_not_given() -> None:
    app, found = typer.Typer(), []

    @app.command()
    def run(
        context: typer.Context,
        url: str = "",
        api_key: Annotated[str | None, typer.Option(envvar="KEY")] = None,
        is_loud: Annotated[bool, typer.Option("--loud")] = False,
        seed: int = 0,
    ) -> None:
        found.append((command_of(context), given_in(context)))

    arguments = ["--url", "http://a b", "--api-key", "hush", "--loud", "--seed", "0"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [], env={"KEY": "hush"}).exit_code == 0
    assert found == [
        (
            "cast-loadtest run --url 'http://a b' --api-key SECRET --loud --seed 0",
            {"url", "api_key", "is_loud", "seed"},
        ),
        ("cast-loadtest run", set()),
    ]


def gateway(status: int) -> FastAPI:
    """Our gateway's /metrics and /v1/comparison, which open to the key "right"."""
    app = FastAPI()
    models = {"models": {"sparse": {"path": "runs/sparse"}, "other": 3}}
    answers = {"/metrics": PlainTextResponse(METRICS), "/v1/comparison": JSONResponse(models)}

    @app.get("/{path:path}")
    def tell(request: Request) -> Response:
        is_known = request.headers.get("authorization") == "Bearer right"
        return answers[request.url.path] if is_known else Response('{"error": {}}', status)

    return app


@pytest.mark.parametrize(
    ("status", "api_key", "is_told"), [(401, "right", True), (401, None, False), (403, "no", False)]
)
def test_a_gateway_with_keys(
    serve_app: ServeApp,
    capsys: pytest.CaptureFixture[str],
    status: int,
    api_key: str | None,
    is_told: bool,
) -> None:
    url = serve_app(gateway(status))
    served, directories = served_at(url, api_key), directories_at(url, api_key)
    said = capsys.readouterr().err
    if is_told:
        assert served == {"sparse": {"kernel": "cast", "num_sparse_layers": "210"}}
        assert directories == {"sparse": {"path": "runs/sparse"}}
        assert said == ""
    else:
        assert served == directories == {}
        assert f"/metrics answered {status}" in said
        assert "--api-key (CAST_LOADTEST_API_KEY)" in said


def test_what_was_accepted_of_drafts(serve_app: ServeApp) -> None:
    url = serve_app(gateway(401))
    assert acceptance_at(url, "right") == {"lossless": 0.625}
    assert acceptance_at(url) == {}


def test_other_servers_tell_nothing(
    serve_app: ServeApp, capsys: pytest.CaptureFixture[str]
) -> None:
    app = FastAPI()
    app.add_api_route("/metrics", lambda: PlainTextResponse("{no metrics"))
    app.add_api_route("/v1/comparison", lambda: {"models": "others"})
    for url in (serve_app(app), serve_app(FastAPI()), "http://127.0.0.1:1"):
        assert served_at(url) == directories_at(url) == {}
        assert acceptance_at(url) == {}
    assert capsys.readouterr().err == ""
