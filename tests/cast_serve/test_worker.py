from pathlib import Path

import pytest

from cast_serve import worker

REPORT = {"num_sparse_layers": 210, "weight_bytes": 9, "dense_weight_bytes": 16, "isa": "avx2"}


def test_the_ranks_report_as_one() -> None:
    whole = {**REPORT, "weight_bytes": 18, "dense_weight_bytes": 32}
    assert worker.check_reports([REPORT, REPORT], 210) == whole
    assert worker.check_reports([REPORT], 210) == REPORT


def test_a_silent_dense_fallback_is_refused_on_any_rank() -> None:
    dense = {**REPORT, "num_sparse_layers": 0}
    with pytest.raises(RuntimeError, match=r"210 layers are 2:4 .* but 0 run .* on rank 1"):
        worker.check_reports([REPORT, dense], 210)


@pytest.mark.parametrize(
    ("cores", "num_ranks", "dealt"),
    [([0], 1, "0"), ([4, 5], 1, "4,5"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([0, 1, 2], 2, "0|1,2")],
)
def test_cores_are_dealt_out_to_ranks(cores: list[int], num_ranks: int, dealt: str) -> None:
    assert worker.cores_of_ranks(cores, num_ranks) == dealt


def test_fewer_cores_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 cores for 2 ranks .*nobind"):
        worker.cores_of_ranks([7], 2)


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
