"""Model directories made to hurt: read, converted, or refused by name; nothing outside is read."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.record import CheckpointError, verify
from cast_serve.gateway.compare.models import describe_directory
from cast_serve.sparsity.pattern import PatternError
from tests.fuzz.target import Target

FIXTURES = Path(__file__).parents[1] / "cast_serve/checkpoint/fixtures"
STORED = (
    *("int8-zeros", "int8-bitmask", "float8-zeros", "float8-bitmask", "int4-packed"),
    *("bf16-ragged", "int8-ragged"),
)
MADE = ("ours", "gated", "wide")
SAME_SIZE = (  # dtypes that a header may swap without the file's size saying so
    *(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), ("BF16", "F16", "I16", "U16")),
    ("F32", "I32", "U32"),
)
SHARD = "model.safetensors"
SECRET = b"a secret of another directory"
SHA256 = hashlib.sha256(SECRET).hexdigest()
HUGE = [2**31, 2**40, 2**62, 10**30, -1, 0]
VALUES: list[Any] = [
    *HUGE,
    1e308,
    None,
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    True,
    "../x",
    "/etc/passwd",
]
KEYS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "architectures"),
    *("num_attention_heads", "model_type", "torch_dtype", "dtype", "tie_word_embeddings"),
    *("auto_map", "quantization_config", "compression_config", "rope_parameters", "head_dim"),
)
QUANTIZATION = ("quant_method", "format", "config_groups", "sparsity_config", "kv_cache_scheme")
RECORD = (
    *("format_version", "kind", "n", "m", "targets", "sha256", "method", "kept_dense"),
    *("quantization", "quality", "source", "config", "kept_of_64"),
)
SPARSITY = ("format", "sparsity_structure", "kept_of_64", "targets")
PATTERNS = ["2:4", "32:64", "44:64", "0:64", "64:64", "5:3", "sparse-24-bitmask", "sparse-bitmask"]
RAW = [
    b"---\ntags: 5\n---\nx",
    b"---\n[\n---\n",
    b"---\ntags: {a: [b]}\n---\n",
    b"",
    b"[" * 100_000,
    b"\xff\xfe",
    b"5",
    b'{"a": 1e999}',
    b"\0" * 4096,
    b"1" * 5000,
]
NAMES = (
    *("config.json", "cast.json", "model.safetensors.index.json", "tokenizer.json"),
    *("README.md", SHARD),
)

Act = tuple[Any, ...]
ACTS = some.one_of(
    some.tuples(some.just("cut"), some.floats(0, 1)),
    some.tuples(some.just("flip"), some.integers(0, 6000), some.integers(1, 255)),
    some.tuples(some.just("length"), some.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 10**8])),
    some.tuples(
        some.just("header"),
        some.integers(0, 40),
        some.sampled_from(["shape", "dtype", "data_offsets"]),
        some.sampled_from(
            [*VALUES, [2**62, 2**62], [-1, 2], [2**32, 2**32], [0, 2**63], "I8", "BF16", [5, 1]]
        ),
    ),
    some.tuples(some.just("reshape"), some.integers(0, 60), some.integers(0, 5)),
    some.tuples(some.just("retype"), some.integers(0, 60), some.integers(0, 4)),
    some.tuples(some.just("config"), some.sampled_from(KEYS), some.sampled_from(VALUES)),
    some.tuples(
        some.just("quantization"), some.sampled_from(QUANTIZATION), some.sampled_from(VALUES)
    ),
    some.tuples(
        some.just("sparsity"),
        some.sampled_from(SPARSITY),
        some.sampled_from([*VALUES, *PATTERNS, {"model.layers.0.mlp.up_proj": 32}]),
    ),
    some.tuples(
        some.just("record"),
        some.sampled_from(RECORD),
        some.sampled_from([*VALUES, "gated", "compressed", "pruned", "dense", ["lm_head"]]),
    ),
    some.tuples(
        some.just("hashes"), some.sampled_from(["../secret", "SECRET", "/dev/zero", "a\0"])
    ),
    some.tuples(some.just("raw"), some.sampled_from(NAMES), some.sampled_from(RAW)),
    some.tuples(
        some.just("link"),
        some.sampled_from(NAMES),
        some.sampled_from(["SECRET", "SHARD", "/dev/zero", "itself", "nowhere", "fifo", "folder"]),
    ),
    some.tuples(some.just("index"), some.sampled_from(["SHARD", "../outside/model.safetensors"])),
)
# What an act raises where an act before it left nothing that it could change.
UNFIT = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration),
    *(RecursionError, ZeroDivisionError),
)


@cache
def made() -> Path:
    """A folder with what `convert` wrote, and with a gated directory."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    convert(FIXTURES / "int8-zeros", place / "ours")
    convert(FIXTURES / "bf16-ragged", place / "wide")
    gated = Path(shutil.copytree(FIXTURES / "int8-zeros", place / "gated"))
    config = json.loads((gated / "config.json").read_text())
    del config["quantization_config"]
    (gated / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(gated / SHARD).items():
        if tensor.dtype == torch.int8:
            linear = name.removesuffix(".weight")
            tensors[f"{linear}.gate"] = torch.rand(tensor.shape)
            tensors[f"{linear}.scale"] = torch.ones(tensor.shape[0], 2)
        if not name.endswith("weight_scale"):
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, gated / SHARD)
    targets = [name.removesuffix(".gate") for name in tensors if name.endswith(".gate")]
    record = {"format_version": 1, "kind": "gated", "method": "gates", "n": 2, "m": 4}
    (gated / "cast.json").write_text(json.dumps({**record, "targets": targets, "sha256": {}}))
    assert convert(gated, place / "check")["num_sparse_layers"] == len(targets)
    return place


def write(folder: Path, outside: Path, act: Act) -> None:
    """Does one thing to a directory."""
    kind, *details = act
    shard, config = folder / SHARD, folder / "config.json"
    if kind == "cut":
        os.truncate(shard, int(shard.stat().st_size * details[0]))
    elif kind == "flip":
        content = bytearray(shard.read_bytes())
        content[details[0] % len(content)] ^= details[1]
        shard.write_bytes(content)
    elif kind == "length":
        shard.write_bytes(details[0].to_bytes(8, "little") + shard.read_bytes()[8:])
    elif kind in ("header", "reshape", "retype"):
        _edit_header(shard, kind, *details)
    elif kind in ("config", "quantization", "sparsity"):
        found = json.loads(config.read_text())
        inner = found if kind == "config" else found.setdefault("quantization_config", {})
        inner = inner.setdefault("sparsity_config", {}) if kind == "sparsity" else inner
        inner[details[0]] = details[1]
        config.write_text(json.dumps(found))
    elif kind in ("record", "hashes"):
        path = folder / "cast.json"
        record = json.loads(path.read_text()) if path.exists() else {"format_version": 1}
        record = {"n": 2, "m": 4, "sha256": {}, **record}
        if kind == "record":
            record[details[0]] = details[1]
        else:
            name = details[0].replace("SECRET", str(outside / "secret"))
            record["sha256"] = {name: "0" * 64}
        path.write_text(json.dumps(record))
    elif kind == "raw":
        (folder / details[0]).write_bytes(details[1])
    elif kind == "index":
        target = details[0].replace("SHARD", str(outside / SHARD))
        index = {"metadata": {}, "weight_map": {"lm_head.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "link":
        _replace(folder / details[0], outside, details[1])


def _edit_header(shard: Path, kind: str, place: int, *details: Any) -> None:
    content = shard.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    tensor = header[sorted(header)[place % len(header)]]
    if kind == "header":
        tensor[details[0]] = details[1]
    elif kind == "reshape":
        shape = tensor["shape"]
        flat = math.prod(shape)
        ways = (shape[::-1], [flat], [*shape, 1], [1, *shape], [flat, 1], [1, flat])
        tensor["shape"] = ways[details[0]]
    else:
        kinds = next(each for each in SAME_SIZE if tensor["dtype"] in each)
        tensor["dtype"] = kinds[details[0] % len(kinds)]
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def _replace(path: Path, outside: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    if target == "fifo":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    else:
        names = {"SECRET": outside / "secret", "SHARD": outside / SHARD, "itself": path}
        path.symlink_to(names.get(target, Path(target)))


def check_directory(drawn: tuple[str, list[Act]]) -> None:
    """As the commands read it."""
    base, acts = drawn
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder, outside = Path(place) / "model", Path(place) / "outside"
        shutil.copytree(made() / base if base in MADE else FIXTURES / base, folder)
        outside.mkdir()
        (outside / "secret").write_bytes(SECRET)
        shutil.copy(FIXTURES / "int8-zeros" / SHARD, outside)
        for act in acts:
            if any(path.is_fifo() or path.is_char_device() for path in folder.iterdir()):
                break  # to write to the one would wait for a reader, the other's bytes never end
            try:
                write(folder, outside, act)
            except UNFIT:
                continue  # what an act before it left does not take this one
        out = Path(place) / "out"
        told: list[str] = []
        for read in (count_sparse, inspect, verify, lambda path: convert(path, out)):
            try:
                read(folder)
            except (CheckpointError, PatternError) as error:
                told.append(str(error))
        assert not [text for text in told if not text or SHA256 in text]
        if out.is_dir():
            assert not [path for path in out.iterdir() if SECRET in path.read_bytes()]
            check_converted(folder, out)
        described = describe_directory(folder)
        json.dumps(described, allow_nan=False)


TARGETS = (
    Target(
        "directories",
        some.tuples(some.sampled_from([*STORED, *MADE]), some.lists(ACTS, min_size=1, max_size=3)),
        check_directory,
    ),
)
