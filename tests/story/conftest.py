"""The demo model, pruned and compressed, served beside its dense twin by `cast-serve up`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from cast_serve.ports import free_port

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "data/models/smollm2-135m-dense"
MAX_MODEL_LEN = 1024
FLAGS = ["--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
NUM_TOKENS = 32
PROMPTS = [
    *("The capital of France is", "Water boils at", "In 1969, the first man", "def fibonacci(n):"),
    *("The opposite of hot is", "Once upon a time", "The sun rises in the", "My favourite food is"),
    *("Two plus two equals", "Shakespeare wrote", "The largest ocean is", "Photosynthesis is"),
    *("A triangle has three", "Bread is made from", "The president said that", "Music can"),
    *(
        "Cats and dogs are",
        "The fastest animal is",
        "Computers store data in",
        "Long ago, in China,",
    ),
]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", *(str(word) for word in words)]


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model pruned by magnitude: compressed, and with the same zeros stored densely."""
    assert MODEL.is_dir(), f"{MODEL} is missing; run scripts/data"
    folder = tmp_path_factory.mktemp("story")
    pruned, sparse, dense = (folder / name for name in ("pruned", "sparse", "dense"))
    oneshot = ("oneshot", "--model", MODEL, "--method", "magnitude", "--out", pruned)
    subprocess.run(command("cast_train", *oneshot), check=True)
    convert = ("convert", pruned, sparse, "--dense-twin", dense)
    subprocess.run(command("cast_serve", *convert), check=True)
    return {"sparse": sparse, "dense": dense}


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    twins: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Both twins behind the gateway, in the test module's DTYPE and, if it has FLAGS, with them."""
    flags = [*FLAGS, *getattr(request.module, "FLAGS", ()), "--dtype", request.module.DTYPE]
    with serving(twins, flags, tmp_path_factory.mktemp("logs") / "up.log") as served:
        yield served


@contextmanager
def serving(
    models: Mapping[str, Path], flags: Sequence[str], log: Path, config: Path | None = None
) -> Iterator[Served]:
    """Model directories by variant's name, or a file of them, behind `cast-serve up`, ready."""
    port = free_port()
    variants = [part for name, path in models.items() for part in ("--variant", f"{name}={path}")]
    variants += [] if config is None else ["--config", str(config)]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command("cast_serve", "up", *variants, "--port", port, "--", *flags),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, "CAST_STARTUP_TIMEOUT_S": "400"},
        )
    served = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        while not _is_ready(served.url):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, with their command lines."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                parents[int(folder.name)] = (int(fields[1]), words)
    found: dict[int, str] = {}
    below = {pid}
    while below:
        below = {child for child, (parent, _) in parents.items() if parent in below}
        found |= {child: parents[child][1] for child in below}
    return found


def worker(served: Served, name: str) -> int:
    """The process id of a variant's worker."""
    for pid, words in descendants(served.process.pid).items():
        if "worker" in words and f"--name {name} " in words:
            return pid
    raise AssertionError(f"no worker {name} below {served.process.pid}")


def complete(served: Served, name: str, prompt: str, **more: Any) -> dict[str, Any]:
    """The first choice of a greedy completion."""
    body = {"model": name, "prompt": prompt, "temperature": 0, "ignore_eos": True, **more}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def variant_infos(served: Served) -> dict[str, dict[str, str]]:
    """What the gateway's metrics say that each variant runs: the labels of cast_variant_info."""
    families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
    return {
        sample.labels["variant"]: sample.labels
        for family in families
        if family.name == "cast_variant_info"
        for sample in family.samples
    }


def distance_to(served: Served, name: str, model: Any, num_tokens: int = 64) -> float:
    """A variant's relative error against a model in memory, whose vocabulary has 256 tokens.

    Of each of `num_tokens` positions vLLM's 20 highest raw logits are compared.
    """
    tokens = [37 * place % 256 for place in range(num_tokens)]
    with torch.no_grad():
        expected: Tensor = model(torch.tensor([tokens])).logits[0]
    body = {"model": name, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 20}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    pairs = [
        (found["logprob"], float(expected[place, int(token)]))
        for place, likeliest in enumerate(response.json()["choices"][0]["prompt_logprobs"][1:])
        for token, found in likeliest.items()
    ]
    assert len(pairs) >= 20 * (num_tokens - 1)
    found, wanted = torch.tensor(pairs).T
    return float((found - wanted).norm() / wanted.norm())


def logits_error(served: Served) -> float:
    """The sparse variant's relative error against its dense twin.

    The twin's greedy text is fed to both; the 20 highest logits of every step are compared. bf16
    rounds every layer's output, so single steps may differ by more than the whole does.
    """
    errors: list[float] = []
    expected: list[float] = []
    for prompt in PROMPTS:
        whole = prompt + complete(served, "dense", prompt, max_tokens=NUM_TOKENS)["text"]
        dense, sparse = (
            complete(served, name, whole, max_tokens=1, prompt_logprobs=20)["prompt_logprobs"][1:]
            for name in ("dense", "sparse")
        )
        for left, right in zip(dense, sparse, strict=True):
            shared = left.keys() & right.keys()
            assert len(shared) >= 10
            expected += [left[token]["logprob"] for token in shared]
            errors += [right[token]["logprob"] - left[token]["logprob"] for token in shared]
    assert len(errors) > len(PROMPTS) * NUM_TOKENS * 10
    return _norm(errors) / _norm(expected)


def _norm(values: list[float]) -> float:
    return sum(value * value for value in values) ** 0.5


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False
