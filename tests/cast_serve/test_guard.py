"""Files of guard rails, read and refused."""

from pathlib import Path

import pytest

from cast_serve.guard import Guard

GUARD = """
min_speedup = {tpot_p50 = 1.2, throughput = 1.1}
max_slowdown = {ttft_p99 = 1.1}
max_error_rate = 0.01
min_token_agreement = 0.5
allow_void = false
"""


def test_a_file_is_read_and_goes_through_json(tmp_path: Path) -> None:
    path = tmp_path / "guard.toml"
    path.write_text(GUARD)
    guard = Guard.read(path)
    assert guard.min_speedup == {"tpot_p50": 1.2, "throughput": 1.1}
    assert (guard.max_error_rate, guard.min_token_agreement, guard.allow_void) == (0.01, 0.5, False)
    assert Guard.of(guard.about()) == guard


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_sped = 1", "unknown key 'min_sped'; known keys: min_speedup, max_slowdown"),
        ("min_speedup = {tpot = 1.2}", "min_speedup has unknown key 'tpot'; known keys: ttft_p50"),
        ("min_speedup = 1.2", "min_speedup is 1.2; write, for example,"),
        ("max_slowdown = {ttft_p99 = 0}", "max_slowdown.ttft_p99 is 0; give a number above 0"),
        ("max_slowdown = {ttft_p99 = true}", "is True; give a number above 0"),
        ("max_slowdown = {ttft_p99 = nan}", "is nan; give a number above 0"),
        ("max_error_rate = 1.5", "max_error_rate is 1.5; give a number from 0 to 1"),
        ("min_token_agreement = 'a'", "min_token_agreement is 'a'; give a number from 0 to 1"),
        ("max_accuracy_loss = -0.1", "max_accuracy_loss is -0.1; give a number from 0 to 1"),
        ("allow_void = 1", "allow_void is 1; give true or false"),
        ("min_speedup =", "Invalid value"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "guard.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"guard {path}: .*{message}"):
        Guard.read(path)
