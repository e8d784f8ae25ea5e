"""A compressed model answers through vLLM and the gateway as its dense twin does."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import psutil
import pytest
from pydantic import BaseModel, ConfigDict, Field

from cast_serve.ports import free_port
from tests.story.conftest import Served, command, logits_error, variant_infos

pytestmark = [pytest.mark.model, pytest.mark.server]

DTYPE = "bfloat16"
FLAGS = ("--logprobs-mode", "raw_logits")  # what `logits_error` compares


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_logits_equal_the_dense_twins(served: Served) -> None:
    assert logits_error(served) < 1e-2


def test_every_target_runs_the_sparse_kernel(served: Served) -> None:
    infos = variant_infos(served)
    assert infos["sparse"]["num_sparse_layers"] == "210"
    assert infos["sparse"]["num_dense_layers"] == "0"
    assert infos["sparse"]["kernel"] == "cast::linear24"
    assert int(infos["sparse"]["weight_bytes"]) == 0.5625 * int(
        infos["sparse"]["dense_weight_bytes"]
    )
    assert infos["dense"]["num_sparse_layers"] == "0"


def test_the_engines_weights_lie_in_large_pages(served: Served) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this machine gives no process large pages")
    tree = psutil.Process(served.process.pid).children(recursive=True)
    num_kb = [
        int(line.split()[1])
        for process in tree
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("AnonHugePages:")
    ]
    # Both engines; without asking there are none. How many there are is the kernel's affair.
    assert len([kb for kb in num_kb if kb > 50_000]) >= 2


def test_openai_client_with_everything(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "sparse", "prompt": "One, two, three,", "max_tokens": 6}
    found = client.completions.create(**asked, n=2, logprobs=3, seed=5, temperature=0.8)
    assert len(found.choices) == 2
    assert found.choices[0].logprobs is not None
    assert 1 <= len(found.choices[0].logprobs.tokens or []) <= 6
    again = client.completions.create(**asked, n=2, logprobs=3, seed=5, temperature=0.8)
    assert [c.text for c in again.choices] == [c.text for c in found.choices]

    greedy = client.completions.create(**asked, temperature=0).choices[0].text
    stop = greedy.split()[1][:1]
    stopped = client.completions.create(**asked, temperature=0, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == greedy[: greedy.index(stop)]
    echoed = client.completions.create(**asked, temperature=0, echo=True).choices[0].text
    assert echoed == "One, two, three," + greedy

    *_, last = client.completions.create(
        **asked,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    assert last.usage is not None
    assert last.usage.completion_tokens == 6
    both = client.completions.create(model="dense", prompt=["a", "b"], max_tokens=2)
    assert [choice.index for choice in both.choices] == [0, 1]

    chunks = client.chat.completions.create(
        model="sparse",
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=4,
        stream=True,
        logprobs=True,
        top_logprobs=2,
    )
    told = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
    assert 1 <= len(told) <= 4
    assert {len(token.top_logprobs) for each in told for token in each.content or []} == {2}


class City(BaseModel):
    # A model that was pruned without training writes spaces without end where it may.
    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})

    name: Annotated[str, Field(max_length=8)]
    inhabitants: Annotated[int, Field(ge=0, le=99)]


TAG = {
    "structures": [{"begin": "<a>", "schema": {"enum": [1]}, "end": "</a>"}],
    "triggers": ["<a>"],
}


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": r"[0-9]{4}-[0-9]{2}"}, r"\d{4}-\d{2}"),
        ({"choice": ["yes", 'a "no"']}, 'yes|a "no"'),
        ({"grammar": 'root ::= "a" b\nb ::= "b" | "c"'}, "a[bc]"),
        ({"json": {"enum": ["x", 17]}}, r'\s*("x"|17)\s*'),
        ({"json": '{"type": "boolean"}'}, r"\s*(true|false)\s*"),
        ({"structural_tag": json.dumps(TAG)}, "(?s)((?!<a>).)*(<a>1</a>.*)?"),
    ],
)
def test_structured_outputs(
    client: openai.OpenAI, name: str, asked: dict[str, Any], pattern: str
) -> None:
    found = client.completions.create(
        model=name, prompt="It is", max_tokens=40, extra_body={"structured_outputs": asked}
    )
    assert re.fullmatch(pattern, found.choices[0].text)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_openai_client_parses_an_answer(client: openai.OpenAI, name: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "Which city is it?"}]
    found = client.chat.completions.parse(
        model=name,
        messages=messages,
        response_format=City,
        max_tokens=120,
        temperature=0,
        metadata={"a": "b"},
        reasoning_effort="low",
    )
    assert isinstance(found.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(?=a)b"},
        {"json": {"type": "wizard"}},
        {"json": {"type": "array", "uniqueItems": True}},
        {"grammar": 'a ::= "b"'},
        {"structural_tag": '{"type": "structural_tag", "format": {"type": "any_text"}}'},
    ],
)
def test_a_constraint_that_cannot_be_followed_is_refused(
    client: openai.OpenAI, asked: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(
            model="sparse", prompt="a", max_tokens=2, extra_body={"structured_outputs": asked}
        )


def test_tools_without_a_parser_are_refused(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
        client.chat.completions.create(model="sparse", messages=messages, tools=tools)


def test_compare_refuses_logits_for_log_probabilities(served: Served) -> None:
    found = httpx.post(f"{served.url}/v1/compare", json={"prompt": "The city", "max_tokens": 4})
    assert (found.status_code, found.json()["error"]["code"]) == (503, "no_log_probabilities")


def test_a_worker_whose_engine_answers_nothing_is_not_served(twins: dict[str, Path]) -> None:
    """A model length of 1 leaves no token to answer with."""
    flags = ("--enforce-eager", "--max-model-len", 1)
    words = ("worker", twins["dense"], "--name", "dense", "--port", free_port(), "--", *flags)
    done = subprocess.run(
        command("cast_serve", *words), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 1
    said = "cast-serve: the engine did not answer a request of 1 prompt tokens during warm-up"
    assert any(line.startswith(said) for line in done.stderr.splitlines())
    assert "Starting vLLM server" not in done.stdout + done.stderr


def test_zz_ctrl_c_leaves_no_process(served: Served) -> None:
    """Runs last (by name, within this file): it ends the servers that the others use."""
    started = _descendants(served.process.pid)
    assert len(started) >= 4
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0
    assert json.loads(served.log.read_text().splitlines()[-1]) == {"stopped": ["sparse", "dense"]}
    assert not [pid for pid in started if _is_running(pid)]


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid for child in map(int, children) for pid in (child, *_descendants(child))]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, but not yet collected by init
