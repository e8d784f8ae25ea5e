"""Problems -> questions; answers -> code; and the command against a server that knows the answers.

Of six problems dense solves five and sparse two, one of them in common: pass@1 5/6 and 2/6, and
McNemar's p is (1 + 5) / 2**5 * 2 = 0.375 over the five that only one solves.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner

from loadtest.__main__ import app as command
from loadtest.errors import UsageError
from loadtest.quality import sandbox
from loadtest.quality.sandbox import Outcome, check_sandbox
from loadtest.quality.tasks import Problem, code_of, question, read_problems
from tests.loadtest.conftest import ServeApp
from tests.programs import lack

HELPER = "from math import sqrt\n\n\ndef root(n):\n    return sqrt(n)\n\n\n"
NUM = 6


def problem(number: int) -> dict[str, str]:
    name = f"plus_{number}"
    return {
        "task_id": f"Plus/{number}",
        "prompt": f'{HELPER}def {name}(n):\n    """The root of n, plus {number}."""\n',
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(9) == root(9) + {number}\n",
    }


def right(number: int) -> str:
    """A whole function that needs the problem's import."""
    return f"def plus_{number}(n):\n    return sqrt(n) + {number}\n```"


ONE = Problem(**problem(1))
WRITTEN: dict[str, list[str]] = {
    "dense": [
        right(0),
        right(1),
        "    return root(n) + 2\n```",  # goes on after the prompt
        "```python\n" + right(3),  # begins again
        right(4).removesuffix("```") + "\nassert plus_4(9) == 0\n```",  # a wrong example
        "def plus_5(n):\n    return n\n```",
    ],
    "sparse": [
        right(0),
        "def plus_1(n):\n    return 0\n\nprint(plus_1(1))",
        "import sys\nclass Leave:\n    sys.exit(0)\ndef plus_2(n):\n    return 0\n```",
        "I do not know.",
        "",
        right(5),
    ],
}


def server(written: dict[str, list[str]], seen: list[dict[str, Any]]) -> FastAPI:
    """Streams what is written to the problem that is asked, three characters a chunk."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": name} for name in written]}

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    def answer(body: dict[str, Any]) -> Response:
        seen.append(body)
        is_chat = "messages" in body
        asked = body["messages"][1]["content"] if is_chat else body["prompt"]
        number = int(asked.partition("plus_")[2][0])
        text = written[body["model"]][number]
        if text == "broken":
            return JSONResponse({"error": {"message": "too long"}}, 400)

        def stream() -> Iterator[str]:
            for start in range(0, len(text), 3):
                piece = text[start : start + 3]
                yield chunk({"delta": {"content": piece}} if is_chat else {"text": piece})
            last: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
            yield chunk({**last, "finish_reason": "stop" if text else "length"})
            usage = {"prompt_tokens": 7, "completion_tokens": len(text)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        def chunk(choice: dict[str, Any]) -> str:
            return f"data: {json.dumps({'choices': [choice]})}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "plus.jsonl"
    path.write_text("".join(json.dumps(problem(number)) + "\n" for number in range(NUM)))
    return path


@pytest.fixture
def has_sandbox() -> None:
    try:
        check_sandbox()
    except UsageError as error:
        lack(f"no sandbox here: {error}")


def invoke(url: str, problems: Path, *flags: str) -> Any:
    return CliRunner().invoke(command, ["tasks", "--url", url, "--tasks", str(problems), *flags])


def last_line(result: Any) -> dict[str, Any]:
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.usefixtures("has_sandbox")
def test_two_variants(serve_app: ServeApp, problems: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    out = tmp_path / "out"
    result = invoke(serve_app(server(WRITTEN, seen)), problems, "--out", str(out))
    assert result.exit_code == 0, result.output
    found = last_line(result)
    assert found == json.loads((out / "tasks.json").read_text())
    assert found["is_complete"]
    assert found["num_problems"] == NUM
    dense, sparse = found["variants"]["dense"], found["variants"]["sparse"]
    assert (dense["num_passed"], dense["pass_at_1"]) == (5, pytest.approx(5 / 6))
    assert (dense["low"], dense["high"]) == pytest.approx((0.4365, 0.9699), abs=5e-5)
    assert sparse["num_passed"] == 2
    assert sparse["outcomes"] == {"passed": 2, "failed": 3, "left_early": 1}
    assert sparse["num_cut_off"] == 1
    assert dense["ttft_s"]["n"] == dense["tpot_s"]["n"] == NUM
    assert sparse["ttft_s"]["n"] == NUM - 1
    pairs = found["pairs"]["sparse"]
    counts = ("both", "only_baseline", "only_candidate", "neither")
    assert [pairs[name] for name in counts] == [1, 4, 1, 0]
    assert pairs["p_mcnemar"] == 0.375
    assert pairs["difference"]["mean"] == pytest.approx(-0.5)
    assert "83.3% (5)" in result.stdout
    assert "sparse - dense: -50.0 points" in result.stdout
    assert {"date", "versions", "machine", "command", "served", "source_sha256"} <= set(found)

    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * NUM
    by_place = {(one["task_id"], one["variant"]): one for one in answers}
    assert by_place["Plus/1", "sparse"]["error"] == "AssertionError"
    assert by_place["Plus/0", "dense"]["text"] == right(0)
    assert by_place["Plus/0", "dense"]["output_tokens"] == len(right(0))
    assert {body["model"] for body in seen} == {"dense", "sparse"}
    for body in seen:
        assert body["temperature"] == 0
        assert body["messages"][2] == {"role": "assistant", "content": "```python\n"}
        assert body["continue_final_message"]
        assert not body["add_generation_prompt"]

    result = invoke("http://127.0.0.1:9", problems, "--out", str(out))
    assert result.exit_code == 2
    assert f"--out {out} exists already" in result.stderr


@pytest.mark.usefixtures("has_sandbox")
def test_one_variant_without_a_chat_template(serve_app: ServeApp, problems: Path) -> None:
    seen: list[dict[str, Any]] = []
    written = {"base": ["    return root(n) + 0\n\nprint(1)", "    return 0"]}
    url = serve_app(server(written, seen))
    flags = ("--variants", "base", "--completions", "--limit", "2", "--concurrency", "1")
    result = invoke(url, problems, *flags)
    assert result.exit_code == 0, result.output
    found = last_line(result)
    assert found["variants"]["base"]["pass_at_1"] == 0.5
    assert found["pairs"] == {}
    assert [body["prompt"] for body in seen] == [problem(number)["prompt"] for number in (0, 1)]
    assert seen[0]["stop"] == ["\nclass", "\ndef", "\n#", "\nif"]  # at most four


@pytest.mark.usefixtures("has_sandbox")
def test_what_was_written_before_a_failed_request_is_kept(
    serve_app: ServeApp, problems: Path, tmp_path: Path
) -> None:
    written = {**WRITTEN, "sparse": [*WRITTEN["sparse"][:2], "broken", "", "", ""]}
    out = tmp_path / "out"
    flags = ("--concurrency", "1", "--out", str(out))
    result = invoke(serve_app(server(written, [])), problems, *flags)
    assert result.exit_code == 2
    assert "Plus/2, variant sparse: http://127.0.0.1:" in result.stderr
    assert "/v1/chat/completions gave http_400; see the server's log" in result.stderr
    assert "INCOMPLETE: 2 problems" in result.stdout
    found = json.loads((out / "tasks.json").read_text())
    assert (found["is_complete"], found["num_problems"]) == (False, 2)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [one["task_id"] for one in answers][-1] == "Plus/2"
    assert all(one["outcome"] for one in answers)

    broken = {name: ["broken"] for name in WRITTEN}
    flags = ("--limit", "1", "--out", str(tmp_path / "empty"))
    assert invoke(serve_app(server(broken, [])), problems, *flags).exit_code == 2
    assert not (tmp_path / "empty").exists()


@pytest.mark.usefixtures("has_sandbox")
def test_wrong_use(serve_app: ServeApp, problems: Path) -> None:
    url = serve_app(server(WRITTEN, []))
    for flags, message in (
        (("--candidate", "other"), r"variant 'other' is not served at"),
        (("--variants", "dense", "--baseline", "dense"), "no effect beside --baseline"),
        (("--variants", "dense,dense"), "give each a name of its own"),
    ):
        result = invoke(url, problems, *flags)
        assert result.exit_code == 2
        assert message in result.stderr


def test_nothing_is_asked_without_a_sandbox(
    monkeypatch: pytest.MonkeyPatch, serve_app: ServeApp, problems: Path
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(sandbox, "run", lambda _: Outcome("failed", "no libpython"))
    result = invoke(serve_app(server(WRITTEN, seen)), problems)
    assert result.exit_code == 2
    assert "an empty program failed in the sandbox: no libpython" in result.stderr
    assert seen == []


@pytest.mark.parametrize(
    ("text", "is_chat", "code"),
    [
        (right(1), True, f"{HELPER}def plus_1(n):\n    return sqrt(n) + 1\n"),
        (f"{right(1)}\nIt adds.", True, f"{HELPER}def plus_1(n):\n    return sqrt(n) + 1\n"),
        ("    return 2\n```", True, f"{ONE.prompt}    return 2"),
        ("\treturn 2", True, f"{ONE.prompt}    return 2"),
        ("    return 2\nprint(1)", False, f"{ONE.prompt}    return 2"),
        ("    return '```'", False, f"{ONE.prompt}    return '```'"),
        ("def plus_1(n):\n    return (", True, f"{HELPER}def plus_1(n):\n    return ("),
        (
            "def plus_1(n):\n    return 1\nplus_1(2)",
            True,
            f"{HELPER}def plus_1(n):\n    return 1\n",
        ),
    ],
)
def test_the_code_of_an_answer(text: str, is_chat: bool, code: str) -> None:
    assert code_of(ONE, text, is_chat) == code


def test_a_published_question() -> None:
    path, asked = question(ONE, is_chat=True)
    assert path == "/v1/chat/completions"
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant"]
    assert asked["messages"][1]["content"] == (
        f"Can you complete the following Python function?\n```python\n{ONE.prompt.strip()}\n```\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text("{}"), r"line 1: '\{\}' is not a problem; .* task_id"),
        (lambda path: path.write_text(path.read_text() * 2), "2 problems 'Plus/0'"),
    ],
)
def test_files_that_are_not_problems(
    problems: Path, change: Callable[[Path], object], message: str
) -> None:
    change(problems)
    with pytest.raises(UsageError, match=message):
        read_problems(problems)


def test_problems_are_read_in_order(problems: Path) -> None:
    assert read_problems(problems, 2) == [Problem(**problem(number)) for number in (0, 1)]
