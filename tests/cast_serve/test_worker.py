from pathlib import Path

import pytest

from cast_serve import worker

REPORT = {"num_sparse_layers": 210}


def test_a_silent_dense_fallback_is_refused() -> None:
    worker.check_report(REPORT, 210)
    with pytest.raises(RuntimeError, match="210 layers are 2:4 on disk, but 0 run the sparse"):
        worker.check_report({"num_sparse_layers": 0}, 210)


def test_a_flag_given_by_the_user_replaces_ours() -> None:
    given = ["--kv_cache_memory_bytes=5", "--port", "1"]
    flags = worker.all_flags(Path("m"), "sparse", "127.0.0.1", 8001, given)
    assert flags[-3:] == given
    assert "--kv-cache-memory-bytes" not in flags
    assert flags.count("--port") == 1
    assert flags[flags.index("--served-model-name") + 1] == "sparse"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        worker.run(tmp_path, "sparse")
