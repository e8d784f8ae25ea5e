"""A compressed directory in vLLM itself, as its users start it, without `cast-serve up`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.story.conftest import MAX_MODEL_LEN, PROMPTS, command, free_port

pytestmark = [pytest.mark.model, pytest.mark.server]

ACTIVE = re.compile(r"2:4 is active: 210 linears run cast::linear24 on \w+")
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
# As README has it, but for what makes a test short.
SCRIPT = f"""
import json, pathlib, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len={MAX_MODEL_LEN})
    plan = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = [llm.generate([prompt], plan)[0].outputs[0].text for prompt in {PROMPTS[:2]!r}]
    pathlib.Path(sys.argv[2]).write_text(json.dumps(answers))
"""


def test_llm_and_the_command_line_run_the_kernel(twins: dict[str, Path], tmp_path: Path) -> None:
    folder = twins["sparse"]
    script, answers = tmp_path / "script.py", tmp_path / "answers.json"
    script.write_text(SCRIPT)
    words = [sys.executable, *map(str, (script, folder, answers))]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert ACTIVE.search(done.stdout + done.stderr)
    served = served_by_the_command_line(folder, tmp_path / "serve.log")
    assert served == json.loads(answers.read_text())


def served_by_the_command_line(folder: Path, log: Path) -> list[str]:
    """What `cast-serve vllm serve` completes the same prompts with."""
    port = free_port()
    words = ("vllm", "serve", folder, "--port", port, "--host", "127.0.0.1", "--enforce-eager")
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command("cast_serve", *words, "--max-model-len", MAX_MODEL_LEN),
            stdout=stream,
            stderr=stream,
            env=ENVIRONMENT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_healthy(url):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        answers = []
        for prompt in PROMPTS[:2]:
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
            body["model"] = str(folder)
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            answers.append(answer.raise_for_status().json()["choices"][0]["text"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert ACTIVE.search(log.read_text())
    return answers


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_the_command_line_s_own_help_and_version(tmp_path: Path) -> None:
    done = subprocess.run(
        command("cast_serve", "vllm", "--version"), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout.strip().startswith("0.32.")
