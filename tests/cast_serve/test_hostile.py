"""Everything in tests/hostile.py against the gateway; the same against vLLM is in tests/story."""

import httpx

from cast_serve.proxy import GENERATING
from tests import hostile
from tests.cast_serve.stack import running


def test_no_hostile_request_brings_a_5xx_or_reaches_a_worker_unchecked() -> None:
    cases = list(hostile.requests(("dense", "sparse")))
    assert len(cases) >= 200
    wrong = []
    with running(max_body_bytes=4 << 20) as stack:
        for name, method, path, headers, content in cases:
            try:
                found = stack.client.request(method, path, headers=headers, content=content)
            except httpx.HTTPError as error:  # closed before all of a body too large was sent
                if len(content) <= 1 << 20 and "header" not in name:
                    wrong.append((name, 0, repr(error)))
                continue
            is_error_object = found.status_code < 400 or _is_openai_error(found)
            if found.status_code >= 500 or not is_error_object:
                wrong.append((name, found.status_code, found.text[:100]))
        assert not wrong
        assert stack.complete(model="dense").status_code == 200
        for worker in stack.workers.values():
            for body in worker.state.bodies:
                assert "chat_template" not in body
                assert "prompt_embeds" not in body
                assert body.get("n") in (None, *range(9))


def _is_openai_error(found: httpx.Response) -> bool:
    if found.request.method == "HEAD":
        return True
    if "application/json" not in found.headers.get("content-type", ""):
        return found.request.url.path not in GENERATING or "Invalid HTTP" in found.text
    return set(found.json().get("error", {})) >= {"message"}
