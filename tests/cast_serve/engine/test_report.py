"""What the ranks of a server report together, and which reports it refuses."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Check = Callable[..., dict[str, Any]]

WHOLE = {
    "num_sparse_layers": 210,
    "num_dense_layers": 0,
    "weight_bytes": 9,
    "dense_weight_bytes": 16,
    "kernel": "cast::linear24",
    "isa": "avx2",
    "pattern": "2:4",
    "head": "",
}
"""What is reported of a whole model on one rank."""


def rank(pipeline_rank: int = 0, tensor_rank: int = 0, **changes: object) -> dict[str, Any]:
    return {"pipeline_rank": pipeline_rank, "tensor_rank": tensor_rank, **WHOLE, **changes}


@pytest.fixture
def check_reports() -> Check:
    from cast_serve.engine import report

    return report.check_reports


def test_tensor_parallel_ranks_each_have_a_share_of_every_layer(check_reports: Check) -> None:
    assert check_reports([rank()], 210) == WHOLE
    both = {**WHOLE, "weight_bytes": 18, "dense_weight_bytes": 32}
    assert check_reports([rank(), rank(tensor_rank=1)], 210) == both


def test_a_dense_draft_is_told_from_a_dense_model(check_reports: Check) -> None:
    with pytest.raises(RuntimeError, match="^of the draft, 14 layers are sparse on disk"):
        check_reports([rank(num_sparse_layers=0)], 14, "of the draft, ")


@pytest.mark.parametrize("num_tensor_ranks", [1, 2])
def test_pipeline_ranks_have_some_layers_each(check_reports: Check, num_tensor_ranks: int) -> None:
    reports = [
        rank(stage, share, num_sparse_layers=layers, num_dense_layers=stage, isa=isa)
        for stage, (layers, isa) in enumerate([(0, None), (112, "avx2"), (98, "avx2")])
        for share in range(num_tensor_ranks)
    ]
    num_ranks = 3 * num_tensor_ranks
    assert check_reports(reports, 210) == {
        **WHOLE,
        "num_dense_layers": 3,
        "weight_bytes": 9 * num_ranks,
        "dense_weight_bytes": 16 * num_ranks,
    }


@pytest.mark.parametrize("dense", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_silent_dense_fallback_is_refused_on_any_rank(
    check_reports: Check, dense: tuple[int, int]
) -> None:
    """Two pipeline stages of two tensor-parallel ranks; one of the four runs dense."""
    places = [(stage, share) for stage in range(2) for share in range(2)]
    reports = [
        rank(*place, num_sparse_layers=0 if place == dense else 105, num_dense_layers=0)
        for place in places
    ]
    stage, share = dense
    message = rf"210 layers are sparse .* rank {share} .* runs .*\b0 at pipeline rank {stage}\b"
    with pytest.raises(RuntimeError, match=message):
        check_reports(reports, 210)
