import pytest
from hypothesis import given
from hypothesis import strategies as st

from cast_train.config import Gates
from cast_train.gates.schedules import phase_at, ramp


@pytest.mark.parametrize(
    ("shape", "values"),
    [("constant", (1, 1, 1, 1)), ("linear", (0, 0.25, 0.5, 1)), ("cosine", (0, 0.1464466, 0.5, 1))],
)
def test_ramps(shape, values):
    found = [ramp(shape, progress) for progress in (0, 0.25, 0.5, 2)]
    assert found == pytest.approx(values)


def test_an_unknown_ramp_is_refused():
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        ramp("square", 0.5)


@given(st.integers(2, 500))
def test_a_run_starts_dense_cools_and_ends_hard(steps):
    config = Gates(steps=steps, blend_end_fraction=0.05)
    phases = [phase_at(step, config) for step in range(steps)]
    assert phases[0].blend == 0
    assert not phases[0].is_hard
    assert phases[-1].is_hard
    for earlier, later in zip(phases, phases[1:], strict=False):
        assert earlier.tau >= later.tau
        assert earlier.blend <= later.blend
        assert earlier.is_hard <= later.is_hard
    assert phase_at(steps, config).tau == pytest.approx(config.tau_end)


def test_tau_falls_geometrically_and_lambda_rises():
    config = Gates(
        steps=100,
        tau_start=1.0,
        tau_end=0.01,
        tau_end_fraction=0.4,
        hard_fraction=0.5,
    )
    assert phase_at(20, config).tau == pytest.approx(0.1)
    assert phase_at(25, config).penalty_weight == pytest.approx(config.penalty_weight / 2)
    assert phase_at(50, config).penalty_weight == 0
