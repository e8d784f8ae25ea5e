import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cast_serve import variants
from cast_serve.variants import Variant, local_variants


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_local_variants_have_cores_and_ports_of_their_own(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5})
    dense, sparse = local_variants({"dense": model, "sparse": model})
    assert (dense.cores, sparse.cores) == ((0, 1), (2, 3))
    assert dense.url != sparse.url


def test_more_variants_than_cores_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(ValueError, match="2 variants need a core each, but this process has 1"):
        local_variants({"dense": model, "sparse": model})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant dense: .* holds no model"):
        local_variants({"dense": tmp_path})


def test_stop_ends_the_whole_process_group_even_a_stubborn_one() -> None:
    script = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.stdout.close()
    variant = Variant("dense", "http://127.0.0.1:1", process=process)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(variants, "STOP_GRACE_S", 0.5)
        variants.stop([variant])
    assert process.returncode is not None
    deadline = time.monotonic() + 5
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
