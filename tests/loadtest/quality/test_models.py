"""What a report says of each model, from what the record has of it."""

from typing import Any

import pytest

from loadtest.quality.models import rows
from loadtest.report.result import result_of
from tests.loadtest.recordings import two_pairs

QUALITY = {"perplexity": 54.8058, "text": "a.txt", "num_tokens": 8176}
DIRECTORY = {"path": "runs/int8", "model": "tiny", "bits_per_weight": 5.0234, "quantized": "int8"}
LABELS = {"dtype": "bfloat16", "weight_bytes": "9", "dense_weight_bytes": "16"}


def cells(directory: dict[str, Any], labels: dict[str, str]) -> dict[str, str]:
    run = two_pairs(directories={"sparse": directory}, served={"sparse": labels})
    found = rows(result_of(run))
    assert {dense for _, dense, _ in found} == {"not recorded", "unknown"}
    return {name: sparse for name, _, sparse in found}


@pytest.mark.parametrize(("is_before", "before"), [(True, " before int8"), (False, "")])
def test_of_a_directory_all_is_known(is_before: bool, before: str) -> None:
    quality = {**QUALITY, "is_before_quantizing": is_before}
    assert cells({**DIRECTORY, "zeros": 0.5, "quality": quality}, LABELS) == {
        "model": "tiny",
        "bits per weight": "5.02",
        "zeros": "50%",
        "perplexity": f"54.81{before} (a.txt, 8,176 tokens)",
        "directory": "runs/int8",
    }


def test_what_was_not_measured_is_told_from_what_was_not_recorded() -> None:
    assert cells({**DIRECTORY, "quality": None}, {})["perplexity"] == "not measured"
    infinite = {**DIRECTORY, "quality": {"perplexity": None}}
    assert cells(infinite, {})["perplexity"] == "infinite"
    found = cells({}, LABELS)  # served by URL
    assert (found["perplexity"], found["bits per weight"]) == ("not recorded", "9")
    assert cells({}, {**LABELS, "dense_weight_bytes": "0"})["bits per weight"] == "unknown"
    assert cells({}, {**LABELS, "dtype": "other"})["bits per weight"] == "unknown"


def test_what_was_accepted_of_drafts_is_told_where_there_are_some() -> None:
    found = rows(result_of(two_pairs(draft_acceptance={"sparse": 0.926})))
    assert found[-1] == ("draft tokens accepted", "no draft", "93%")
    assert len(rows(result_of(two_pairs(draft_acceptance={})))) == len(found) - 1
