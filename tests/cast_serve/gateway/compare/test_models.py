"""What the gateway says of a directory is what `inspect` says, and never stops it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import inspect
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import SCALES_TRAINED
from cast_serve.gateway.compare.models import describe, describe_directory
from cast_serve.gateway.upstream.replica import Replica, Variant
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama

FIXTURES = Path(__file__).parents[2] / "checkpoint/fixtures"
QUALITY = {
    "text": "heldout.txt",
    "perplexity_soft": 20.0,
    "perplexity_hard": 21.5,
    "num_tokens": 4096,
    "context_tokens": 512,
}


@pytest.mark.parametrize(
    ("quantize", "head"), [(None, None), ("int8", None), ("int4", None), ("int8", "int4")]
)
def test_a_compressed_directory_as_inspect_has_it(
    save_gated: Save, tmp_path: Path, quantize: Any, head: Any
) -> None:
    gated = save_gated(tiny_llama(128), quality=QUALITY, source={"model": "tiny"})
    out = tmp_path / "out"
    convert(gated, out, quantization=Quantization.asked(quantize, head=head))
    found, inspected = describe_directory(out), inspect(out)
    assert found["bits_per_weight"] == pytest.approx(inspected["bits_per_weight"], abs=1e-4)
    assert found["zeros"] == pytest.approx(inspected["zeros"], abs=1e-4)
    for key in ("kind", "pattern", "quantized"):
        assert found[key] == inspected[key]
    assert (found["model"], found["path"], found["problem"]) == ("tiny", str(out), None)
    assert found["quality"] == {
        "perplexity": 21.5,
        "text": "heldout.txt",
        "num_tokens": 4096,
        "context_tokens": 512,
        "is_before_quantizing": quantize is not None,
    }
    record = json.loads((out / "cast.json").read_text())
    for head, is_before in ((None, False), ("int8", quantize is not None)):
        record["quantization"] = {"quantize": quantize, "head": head, "scales": SCALES_TRAINED}
        (out / "cast.json").write_text(json.dumps(record))
        assert describe_directory(out)["quality"]["is_before_quantizing"] is is_before
    (out / "cast.json").unlink()  # as another program's
    foreign = describe_directory(out)
    assert foreign["bits_per_weight"] == found["bits_per_weight"]
    assert (foreign["zeros"], foreign["quality"]) == (0.5, None)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_n_of_64_of_one_and_of_several_n(tmp_path: Path, quantize: Any) -> None:
    for name in ("bf16-ragged-16-32", "bf16-ragged"):
        out = tmp_path / name
        convert(FIXTURES / name, out, quantization=Quantization.asked(quantize))
        found, inspected = describe_directory(out), inspect(out)
        assert found["pattern"] == inspected["pattern"]
        for key in ("zeros", "bits_per_weight"):
            assert found[key] == pytest.approx(inspected[key], abs=1e-4)
    assert "-" in found["pattern"]


def test_what_stays_dense_counts(save_gated: Save, tmp_path: Path) -> None:
    gated = save_gated(tiny_llama())
    record = json.loads((gated / "cast.json").read_text())
    kept = record["targets"].pop()
    (gated / "cast.json").write_text(json.dumps({**record, "kept_dense": [kept]}))
    convert(gated, tmp_path / "out")
    found, inspected = describe_directory(tmp_path / "out"), inspect(tmp_path / "out")
    assert found["zeros"] == pytest.approx(inspected["zeros"], abs=1e-4)
    assert 0 < found["zeros"] < 0.5
    assert found["bits_per_weight"] == pytest.approx(inspected["bits_per_weight"], abs=1e-4)


def test_of_a_dense_directory_only_the_bits_are_known(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    found = describe_directory(tmp_path / "dense")
    assert found.pop("path") == str(tmp_path / "dense")
    assert (found.pop("model"), found.pop("bits_per_weight")) == ("dense", 16)
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    "cast",
    [
        '{"format_version": 2}',
        "[]",
        '{"format_version": 1, "n": 2}',
        '{"format_version": 1, "n": 2, "m": 4, "quality": 3}',
        '{"format_version": 1, "n": 2, "m": 4, "quality": {"perplexity_hard": "high"}}',
        '{"format_version": 1, "n": 2, "m": 4, "targets": 3}',
        "[" * 100_000,
        "",
    ],
)
def test_a_record_that_cannot_be_read_is_told(tmp_path: Path, cast: str) -> None:
    (tmp_path / "cast.json").write_text(cast)
    (tmp_path / "config.json").write_text("{}")
    found = describe_directory(tmp_path)
    assert found["quality"] is None
    assert str(tmp_path) in found["problem"]


def shard_of(tensor: object) -> bytes:
    header = json.dumps({"a.compressed": tensor}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"short", b"\xff" * 64, (9).to_bytes(8, "little") + b"{"),
        *map(shard_of, ({}, {"shape": "x", "data_offsets": [0]}, 3)),
    ],
)
def test_a_broken_shard_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    assert describe_directory(tmp_path)["problem"]


def test_an_infinite_perplexity_is_none_for_json_has_none(tmp_path: Path) -> None:
    quality = {"perplexity_hard": math.inf}
    record = {"format_version": 1, "n": 2, "m": 4, "quality": quality}
    (tmp_path / "cast.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text("{}")
    found = describe_directory(tmp_path)
    assert found["quality"]["perplexity"] is None
    json.dumps(found, allow_nan=False)


def test_a_variant_by_url_has_no_directory(tmp_path: Path) -> None:
    remote = Variant("dense", [Replica("dense", "http://127.0.0.1:1")])
    local = Variant("sparse", [Replica("sparse", "http://127.0.0.1:2", tmp_path)])
    found = describe([remote, local])
    assert found["dense"] == {}
    assert found["sparse"]["path"] == str(tmp_path)
