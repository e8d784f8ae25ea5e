"""What a record says about its origin."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from typer.testing import CliRunner

from loadtest.provenance import command_of, directories_at, hashes_of, served_at
from tests.loadtest.conftest import ServeApp

METRICS = """# TYPE cast_variant_info gauge
cast_variant_info{variant="sparse",kernel="cast",num_sparse_layers="210"} 1
# TYPE other gauge
other{variant="sparse"} 3
"""


def test_the_command_without_defaults_and_secrets() -> None:
    app, found = typer.Typer(), []

    @app.command()
    def run(
        context: typer.Context,
        url: str = "",
        api_key: Annotated[str | None, typer.Option(envvar="KEY")] = None,
        is_loud: Annotated[bool, typer.Option("--loud")] = False,
        seed: int = 0,
    ) -> None:
        found.append(command_of(context))

    arguments = ["--url", "http://a b", "--api-key", "hush", "--loud"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [], env={"KEY": "hush"}).exit_code == 0
    assert found == [
        "cast-loadtest run --url 'http://a b' --api-key SECRET --loud",
        "cast-loadtest run",
    ]


def keyed(key: str, status: int) -> FastAPI:
    """A gateway's /metrics, behind a key."""
    app = FastAPI()

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {key}":
            return Response('{"error": {}}', status)
        return PlainTextResponse(METRICS)

    return app


def test_what_our_gateway_tells_about_its_variants(serve_app: ServeApp) -> None:
    app = FastAPI()
    app.add_api_route("/metrics", lambda: PlainTextResponse(METRICS))
    assert served_at(serve_app(app)) == {"sparse": {"kernel": "cast", "num_sparse_layers": "210"}}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(("api_key", "is_told"), [("right", True), ("wrong", False), (None, False)])
def test_a_gateway_with_keys(
    serve_app: ServeApp,
    capsys: pytest.CaptureFixture[str],
    status: int,
    api_key: str | None,
    is_told: bool,
) -> None:
    found = served_at(serve_app(keyed("right", status)), api_key)
    said = capsys.readouterr().err
    if is_told:
        assert found == {"sparse": {"kernel": "cast", "num_sparse_layers": "210"}}
        assert said == ""
    else:
        assert found == {}
        assert f"/metrics answered {status}, so" in said
        assert "--api-key (CAST_LOADTEST_API_KEY)" in said


def test_other_servers_tell_nothing(
    serve_app: ServeApp, capsys: pytest.CaptureFixture[str]
) -> None:
    app = FastAPI()
    app.add_api_route("/metrics", lambda: PlainTextResponse("{no metrics"))
    assert served_at(serve_app(app)) == {}
    assert served_at(serve_app(FastAPI())) == {}
    assert served_at("http://127.0.0.1:1") == {}
    assert capsys.readouterr().err == ""


def test_the_hashes_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    wanted = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    assert hashes_of(tmp_path) == wanted


def test_what_our_gateway_tells_about_directories(serve_app: ServeApp) -> None:
    app = FastAPI()
    content: dict[str, Any] = {"models": {"sparse": {"path": "runs/sparse"}, "other": 3}}

    @app.get("/v1/comparison")
    def comparison(request: Request) -> Response:
        is_known = request.headers.get("authorization") == "Bearer hush"
        return JSONResponse(content if is_known else {}, 200 if is_known else 401)

    url = serve_app(app)
    assert directories_at(url, "hush") == {"sparse": {"path": "runs/sparse"}}
    assert directories_at(url) == {}
    content["models"] = "others"
    assert directories_at(url, "hush") == {}
    assert directories_at("http://127.0.0.1:9") == {}
