"""Debian's Prometheus scrapes the gateway before real workers; promtool reads what is ours."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.story.conftest import Served, complete, free_port

pytestmark = [pytest.mark.model, pytest.mark.server]

DTYPE = "bfloat16"
SCRAPES_S = 60


def program(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is missing; scripts/install-packages installs it"
    return path


def test_promtool_finds_nothing_wrong_with_our_metrics(served: Served) -> None:
    for name in ("dense", "sparse"):
        complete(served, name, "The sea", max_tokens=4)
    text = httpx.get(f"{served.url}/metrics").text
    ours = [line for line in text.splitlines() if "vllm:" not in line]
    assert any(line.startswith("cast_variant_info{") for line in ours)
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input="\n".join(ours) + "\n",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_prometheus_scrapes_without_a_warning(served: Served, tmp_path: Path) -> None:
    target = served.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "cast", "static_configs": [{"targets": [target]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = [program("prometheus"), f"--config.file={tmp_path}/prometheus.yml"]
    command += [f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        time.sleep(SCRAPES_S)

        def query(text: str) -> list[dict[str, object]]:
            found = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text})
            return list(found.json()["data"]["result"])

        assert [row["value"][1] for row in query("min_over_time(up[50s])")] == ["1"]  # type: ignore[index]
        assert len(query("cast_variant_info")) == 2
        assert len(query("vllm:num_requests_running")) == 2
    finally:
        process.terminate()
        process.wait(20)
    assert process.returncode == 0
    complaints = [
        line for line in log.read_text().splitlines() if "WARN" in line or "ERROR" in line
    ]
    assert not complaints
