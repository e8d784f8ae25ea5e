import hashlib
from pathlib import Path

import pytest

from cast_serve.gateway.middleware.keys import load_keys
from tests.cast_serve.gateway.stack import running


def test_keys_from_the_setting_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    hashed = hashlib.sha256(b"three").hexdigest()
    file.write_text(f"# who\ntwo\n\nsha256:{hashed}\n")
    assert load_keys("one, ", file) == [
        hashlib.sha256(key).digest() for key in (b"one", b"two", b"three")
    ]
    assert load_keys("", None) == []


def test_keys_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the API keys in .*nowhere"):
        load_keys("", tmp_path / "nowhere")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ValueError, match="would leave the gateway open"):
        load_keys("", tmp_path / "empty")
    for text in (",", " ", " , ,"):  # as two unset variables make it
        with pytest.raises(ValueError, match="which holds no API key and would leave the gateway"):
            load_keys(text, None)
    with pytest.raises(ValueError, match="64 hex digits"):
        load_keys("sha256:abc", None)


def test_every_route_but_probes_and_the_page_wants_a_key() -> None:
    with running(api_keys="one,two") as stack:
        client = stack.client
        body = {"model": "dense", "prompt": "x"}
        for path in (
            *["/livez", "/readyz", "/startupz", "/health", "/", "/docs", "/dashboard/dashboard.js"],
        ):
            assert client.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/v1/comparison", "/version", "/openapi.json"):
            assert client.get(path).status_code == 401, path
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        for header in ("Bearer three", "Bearer", "one", "Basic one", "Bearer one two"):
            found = client.post("/v1/completions", json=body, headers={"Authorization": header})
            assert found.status_code == 401, header
        # the path decides, whatever the Host header says
        tricks = [{"Host": "x/livez"}, {"Host": "127.0.0.1/livez?"}, {"X-Original-URL": "/livez"}]
        for headers in tricks:
            assert client.get("/v1/models", headers=headers).status_code in (400, 401), headers
        for key in ("one", "two"):
            headers = {"Authorization": f"bearer {key}"}
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert not [b for b in stack.workers["dense"].state.bodies if "authorization" in str(b)]


def test_every_route_that_is_described_and_near_misses_of_the_open_ones_want_a_key() -> None:
    with running(api_keys="one") as stack:
        client, key = stack.client, {"Authorization": "Bearer one"}
        described = client.get("/openapi.json", headers=key).json()["paths"]
        open_paths = {"/livez", "/readyz", "/startupz", "/health"}
        assert described.keys() > {*open_paths, "/v1/completions", "/v1/models", "/metrics"}
        for path in described.keys() - open_paths:
            for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE"):
                assert client.request(method, path).status_code == 401, (method, path)
        near_misses = "/livez/ /livezx /LIVEZ /health/x /readyz%2F /docs/ /docsx /dashboard"
        for path in (*near_misses.split(), "/dashboardx", "/v1/nothing"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers=key).status_code == 404, path
        # Below the page's folder everything is open, but nothing else is found there.
        for path in ("/dashboard/nothing", "/dashboard/%2e%2e/v1/models"):
            assert client.get(path).status_code == 404, path
