"""What is asked of vLLM for a draft, what is mended in it, and what is told of it."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter

from cast_serve.engine import draft


def flags(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{**dict.fromkeys(draft.OF_VLLM), **given})


def test_vllm_is_asked_for_a_draft_model() -> None:
    args = flags()
    draft.speculate(args, Path("sparse"), 3, has_zeros=False)
    wanted = {"method": "draft_model", "model": "sparse", "num_speculative_tokens": 3}
    assert args.speculative_config == wanted
    args = flags()
    draft.speculate(args, Path("sparse"), 3, has_zeros=True)
    assert args.speculative_config == {**wanted, "quantization": "cast_sparse24"}


@pytest.mark.parametrize("name", draft.OF_VLLM)
def test_a_second_speculation_is_refused(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} and --draft sparse both .*; leave one out"):
        draft.speculate(flags(**{name: "x"}), Path("sparse"), 3, has_zeros=False)


def test_vllm_has_these_flags() -> None:
    pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
    from vllm.engine.arg_utils import EngineArgs

    assert set(draft.OF_VLLM) <= set(EngineArgs.__dataclass_fields__)


def test_vocabularies_are_compared_where_both_are_known(tmp_path: Path) -> None:
    for name, config in (
        ("model", {"text_config": {"vocab_size": 8}, "vocab_size": 9}),
        ("same", {"vocab_size": 8}),
        ("other", {"vocab_size": 9}),
        ("unknown", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for name in ("same", "unknown"):
        draft.check_vocabularies(tmp_path / "model", tmp_path / name)
    with pytest.raises(ValueError, match="other has a vocabulary of 9 tokens, but .*model has 8"):
        draft.check_vocabularies(tmp_path / "model", tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_each_requests_value_is_repeated(dtype: torch.dtype) -> None:
    values = torch.tensor([0.7, 0, 5], dtype=dtype)
    output = torch.full((5,), -1, dtype=dtype)
    draft.expand(output, values, torch.tensor([2, 4, 5], dtype=torch.int32), 0, 1, 32)
    first = 0.7 if dtype.is_floating_point else 1
    assert torch.equal(output, torch.tensor([first, first, 1, 1, 5], dtype=dtype))


# What vLLM's own imports warn of, and its search for the function in every module.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_vllms_sampling_gets_what_it_expands() -> None:
    """Once it does so without `mend_sampling`, that can be removed."""
    pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        pytest.skip("vLLM's function for GPUs is right")
    current_platform.register_triton_kernel_overrides()
    draft.mend_sampling()
    temperature, ends = torch.tensor([0.7, 0.0, 2.0]), torch.tensor([1, 3, 4], dtype=torch.int32)
    found = rejection_sampler.expand_batch_to_tokens(temperature, ends, 4, 0, 1)
    assert torch.equal(found, torch.tensor([0.7, 1, 1, 2]))


def test_the_acceptance_is_vllms_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    proposed, accepted = (
        Counter(name, "vLLM's", ["engine"], registry=registry)
        for name in (draft.PROPOSED, draft.ACCEPTED)
    )
    draft.publish_acceptance("lossless")
    asked = ("cast_draft_acceptance_ratio", {"variant": "lossless"})
    before = registry.get_sample_value(*asked)
    assert before is not None
    assert math.isnan(before)
    for engine, counts in (("0", (8, 3)), ("1", (2, 1))):
        proposed.labels(engine).inc(counts[0])
        accepted.labels(engine).inc(counts[1])
    assert registry.get_sample_value(*asked) == 0.4
