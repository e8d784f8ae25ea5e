"""A gateway before local workers that say their directory's name, for tests of rolls."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.gateway.app import Gateway, create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.control import request_roll
from cast_serve.gateway.upstream.replica import Replica
from cast_serve.gateway.upstream.variants import local_variants
from tests.cast_serve.gateway.stack import Servers, wait_until
from tests.cast_serve.gateway.upstream.scripted_worker import is_running


@dataclass
class Rolled:
    """A gateway before local workers dense and sparse, and what it told of its rolls."""

    url: str
    gateway: Gateway
    folder: Path
    socket: Path
    said: list[str] = field(default_factory=list)

    def model(self, name: str) -> Path:
        return new_model(self.folder, name)

    def roll(self, name: str = "sparse", model: Path | str | None = None) -> dict[str, Any]:
        given = None if model is None else str(model)
        return request_roll(self.socket, name, given, self.said.append)

    def replica(self, name: str = "sparse") -> Replica:
        (replica,) = self.gateway.variants[name].replicas
        return replica

    def complete(self, name: str = "sparse") -> str:
        body = {"model": name, "prompt": "a"}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"]).strip()

    def stream(self, name: str = "sparse") -> list[str]:
        """Every word of a stream, and how it ended."""
        body = {"model": name, "prompt": "a", "stream": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        *chunks, last = [line[6:] for line in answer.text.splitlines() if line]
        return [json.loads(chunk)["choices"][0]["text"].strip() for chunk in chunks] + [last]

    def counter(self, outcome: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        name = f'cast_variant_rolls_total{{outcome="{outcome}",variant="sparse"}} '
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        return float(line.removeprefix(name))


def new_model(folder: Path, name: str) -> Path:
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def processes(*models: Path) -> list[int]:
    """The workers of these directories that run."""
    files = [model / "pids" for model in models if (model / "pids").exists()]
    pids = [int(line) for file in files for line in file.read_text().split()]
    return [pid for pid in pids if is_running(pid)]


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[Rolled]:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    workers = {name: WorkerConfig(dir=new_model(folder, name)) for name in ("dense", "sparse")}
    defaults = {"control_socket": folder / "s", "health_interval_s": 0.05, "shutdown_grace_s": 1}
    app = create_app(local_variants(workers), GatewaySettings(**(defaults | settings)))
    gateway = app.state.gateway
    with Servers() as servers:
        url = servers.start(app)
        wait_until(lambda: gateway.is_ready, 30)
        yield Rolled(url, gateway, folder, gateway.control.path)
    assert not processes(*folder.iterdir())
