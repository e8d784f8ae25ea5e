"""Directories that are damaged, or made to have files of others read, are refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.record import CheckpointError, read_record, verify
from cast_serve.checkpoint.shard import check_contained, is_file_name
from tests.cast_serve.checkpoint.test_convert import edit_json

FIXTURES = Path(__file__).parent / "fixtures"
SHARD = "model.safetensors"
READERS: list[Callable[[Path], object]] = [
    count_sparse,
    inspect,
    lambda folder: convert(folder, folder.parent / "out"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("not yours")
    shutil.copy(FIXTURES / "int8-bitmask-static" / SHARD, tmp_path / "outside")
    return Path(shutil.copytree(FIXTURES / "int8-bitmask-static", tmp_path / "model"))


def refused(folder: Path, reason: str) -> None:
    for read in READERS:
        with pytest.raises(CheckpointError, match=reason):
            read(folder)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "notes.txt"])
def test_a_link_out_of_the_directory(folder: Path, name: str) -> None:
    target = folder.parent / "outside" / (SHARD if name == SHARD else "secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    refused(folder, f"{name} is a link to .*, outside its directory; copy the file itself there")


def test_a_link_that_leads_nowhere_or_to_itself(folder: Path) -> None:
    (folder / "extra.txt").symlink_to(folder / "extra.txt")
    refused(folder, "extra.txt is a broken link")
    (folder / "extra.txt").unlink()
    (folder / "extra.txt").symlink_to("missing")
    refused(folder, "extra.txt is a broken link")


def test_links_inside_are_followed(folder: Path) -> None:
    (folder / SHARD).rename(folder / "blob")
    (folder / SHARD).symlink_to("blob")
    check_contained(folder)
    assert convert(folder, folder.parent / "out")["num_sparse_layers"] == 7


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    blob = tmp_path / "models--org--name/blobs/1"
    blob.parent.mkdir()
    (snapshot / SHARD).rename(blob)
    (snapshot / SHARD).symlink_to("../../blobs/1")
    check_contained(snapshot)
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to("../../../outside/secret")
    with pytest.raises(CheckpointError, match="outside its directory"):
        check_contained(snapshot)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["other.safetensors", "cast.json"])
def test_a_pipe_for_a_file(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    refused(folder, f"{name} is not a file")
    with pytest.raises(CheckpointError, match="is not a file"):
        verify(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside/model.safetensors", 5])
def test_an_index_that_leads_elsewhere(folder: Path, name: object) -> None:
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, f"names {name!r}, which is not a file beside it")


def test_shards_of_two_versions(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "model-00001-of-00002.safetensors")
    refused(folder, "has .* in model-00001-of-00002.safetensors and in model.safetensors, so shard")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_shard_that_was_not_copied_whole(folder: Path, share: float) -> None:
    os.truncate(folder / SHARD, int((folder / SHARD).stat().st_size * share))
    refused(folder, "cannot be read as safetensors .* copy the directory again")


def test_more_layers_than_tensors(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=10**9)
    for read in READERS[1:]:
        with pytest.raises(CheckpointError, match=r"it has 1000000000 layers, but \d+ tensors"):
            read(folder)


def test_a_config_that_transformers_does_not_bear(folder: Path) -> None:
    edit_json(folder / "config.json", num_attention_heads={"a": 1})
    for read in READERS[1:]:
        with pytest.raises(CheckpointError, match="does not describe a model that can be built"):
            read(folder)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("sha256", {"../outside/secret": "0"}, "lists '../outside/secret', which is not a file"),
        ("sha256", {"/etc/passwd": "0"}, "lists '/etc/passwd', which is not a file"),
        ("sha256", ["a"], r"sha256 is \['a'\], but must be a dict"),
        ("targets", [5], "must be names of linears"),
        ("targets", "all", "targets is 'all', but must be a list"),
        ("n", 4, "4:4 is not N:M"),
        ("n", 0, "0:4 is not N:M"),
        ("n", -2, "-2:4 is not N:M"),
        ("m", 0, "2:0 is not N:M"),
        ("m", -4, "2:-4 is not N:M"),
        ("kept_of_64", {"q": 64}, "has a number from 1 to 63"),
        ("kept_of_64", {"q": "32"}, "has a number from 1 to 63"),
        ("m", "4", "m is '4', but must be a int"),
        ("quality", 5, "quality is 5, but must be a dict"),
    ],
)
def test_a_record_of_another_kind(folder: Path, field: str, value: object, reason: str) -> None:
    record = {"format_version": 1, "n": 2, "m": 4, "sha256": {}, field: value}
    (folder / "cast.json").write_text(json.dumps(record))
    for read in (read_record, verify, inspect):
        with pytest.raises(CheckpointError, match=reason):
            read(folder)


def test_names_of_files() -> None:
    assert is_file_name("model-00001-of-00002.safetensors")
    for name in ("", ".", "..", "/a", "a/b", "a\0", None, 5):
        assert not is_file_name(name)
