"""What is asked of vLLM for a draft, and what is told of it."""

import argparse
import json
import math
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from cast_serve.engine import draft


def flags(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{**dict.fromkeys(draft.OF_VLLM), **given})


def test_vllm_is_asked_for_a_draft_model() -> None:
    args = flags()
    draft.speculate(args, Path("sparse"), 3, None, has_zeros=False)
    wanted = {"method": "draft_model", "model": "sparse", "num_speculative_tokens": 3}
    assert args.speculative_config == wanted
    args = flags()
    draft.speculate(args, Path("sparse"), 3, None, has_zeros=True)
    assert args.speculative_config == {**wanted, "quantization": "cast_sparse24"}


def test_vllm_is_asked_to_propose_nothing_above_some_requests() -> None:
    args = flags()
    draft.speculate(args, Path("sparse"), 3, 2, has_zeros=False)
    schedule = args.speculative_config["num_speculative_tokens_per_batch_size"]
    assert schedule == [[1, 2, 3], [3, 3, 0]]
    utils = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils", reason="vLLM's own reading")
    assert utils.build_dynamic_sd_schedule_lookup(schedule, 5, 3)[1:] == [3, 3, 0, 0, 0]


@pytest.mark.parametrize("name", draft.OF_VLLM)
def test_a_second_speculation_is_refused(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} and --draft sparse both .*; leave one out"):
        draft.speculate(flags(**{name: "x"}), Path("sparse"), 3, None, has_zeros=False)


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
