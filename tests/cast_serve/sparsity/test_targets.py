import pytest
from torch import nn

from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, PatternError
from cast_serve.sparsity.targets import find_targets, not_by_vllm


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(8, 8),
            "q_proj": nn.Linear(8, 4),
            "gate_proj": nn.Linear(8, 4),
            "gate": nn.Linear(8, 2),
            "odd": nn.Linear(6, 4),
            "lm_head": nn.Linear(8, 8),
        }
    )


def test_targets_are_the_linears_of_the_blocks() -> None:
    targets, dense = find_targets(model(), TWO_FOUR)
    assert list(targets) == ["q_proj", "gate_proj"]
    assert dense == {
        "gate": "not a target",
        "odd": "in_features 6 is not a multiple of 4",
        "lm_head": "not a target",
    }


def test_words_of_64_columns_decide_for_every_other_pattern() -> None:
    linears = nn.ModuleDict({"up": nn.Linear(128, 4), "down": nn.Linear(96, 4)})
    targets, dense = find_targets(linears, Pattern(4, 8))
    assert list(targets) == ["up"]
    assert dense == {"down": "in_features 96 is not a multiple of 64"}


def test_targets_can_be_named() -> None:
    assert list(find_targets(model(), TWO_FOUR, include=["lm_head"])[0]) == ["lm_head"]
    assert list(find_targets(model(), TWO_FOUR, exclude=["^q_"])[0]) == ["gate_proj"]
    with pytest.raises(PatternError, match="odd is named as a target"):
        find_targets(model(), TWO_FOUR, include=["odd"])
    with pytest.raises(PatternError, match="no linear of the model can be 2:4"):
        find_targets(nn.Embedding(4, 4), TWO_FOUR)


def test_linears_that_vllm_merges_with_targets_are_found() -> None:
    dense = ["l.1.q_proj", "l.1.o_proj", "l.2.k_proj", "l.3.up_proj", "up_proj", "lm_head"]
    targets = ["l.1.v_proj", "l.2.o_proj", "l.2.gate_proj", "l.3.gate_proj", "gate_proj"]
    reason = not_by_vllm(targets, dense)
    assert reason is not None
    assert "here 3 of them stay dense beside sparse ones, such as l.1.q_proj;" in reason
    for name in ("l.1.q_proj", "l.3.up_proj", "up_proj"):
        assert name in (not_by_vllm(targets, [name]) or "")
    assert not_by_vllm(targets, ["l.1.o_proj", "l.2.k_proj", "lm_head"]) is None
