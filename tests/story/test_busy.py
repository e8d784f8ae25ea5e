"""On a machine that others keep busy, workers that are ready answer, and none is taken for hung."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.story.conftest import Served, complete

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(1200)]

DTYPE = "bfloat16"
NUM_BUSY = 3


@pytest.fixture(scope="module", autouse=True)
def busy_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that only count, and an empty cache of compiled functions, as on a new machine."""
    count = [sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"]
    processes = [subprocess.Popen(count) for _ in range(NUM_BUSY)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            cache = tmp_path_factory.mktemp("compiled")
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
            yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_first_requests_are_answered_and_no_worker_is_restarted(served: Served) -> None:
    """With log-probabilities: vLLM compiles a function for the first request that wants them."""
    for name in ("dense", "sparse"):
        assert complete(served, name, "The sea", max_tokens=4, logprobs=2)["logprobs"]
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    restarts = re.findall(r'^cast_variant_restarts_total\{variant="(\w+)"\} (\S+)$', text, re.M)
    assert sorted(restarts) == [("dense", "0.0"), ("sparse", "0.0")]
    steps_s = re.findall(r"^cast_worker_step_seconds\{.*\} (\S+)$", text, re.M)
    assert len(steps_s) == 2
    assert all(float(step_s) > 0 for step_s in steps_s)
