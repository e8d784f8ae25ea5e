import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cast_serve.checkpoint.record import (
    CheckpointError,
    check_listed,
    check_new,
    check_room,
    new_directory,
    read_json,
    read_record,
    sha256,
    verify,
    write_record,
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory of two shards and no model."""
    with new_directory(tmp_path / "out") as folder:
        for name in ("a", "b"):
            save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
        write_record(
            folder,
            {"kind": "pruned", "format_version": 0, "sha256": {"old.safetensors": ""}},
            config={"model_type": "none"},
            weight_map={name: f"{name}.safetensors" for name in ("a", "b")},
        )
    return tmp_path / "out"


def edit(written: Path, **changes: object) -> None:
    record = json.loads((written / "cast.json").read_text()) | changes
    (written / "cast.json").write_text(json.dumps(record))


def test_a_new_directory_is_whole_and_readable_by_all(written: Path) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["out"]
    record = verify(written)
    assert list(record) == ["format_version", "kind", "sha256"]
    assert (record["format_version"], record["kind"]) == (1, "pruned")
    assert record["sha256"] == {
        f"{n}.safetensors": sha256(written / f"{n}.safetensors") for n in "ab"
    }
    assert read_json(written / "config.json") == {"model_type": "none"}
    index = read_json(written / "model.safetensors.index.json")
    assert index["weight_map"] == {"a": "a.safetensors", "b": "b.safetensors"}
    shards = (written / "a.safetensors", written / "b.safetensors")
    num_bytes = sum(t.nbytes for shard in shards for t in load_file(shard).values())
    assert index["metadata"] == {"total_size": num_bytes}
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()} == {0o644}
    assert stat.S_IMODE(written.stat().st_mode) == 0o755


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_refused(written: Path) -> None:
    before = sorted(written.parent.rglob("*"))
    with pytest.raises(CheckpointError, match="out exists already"), new_directory(written):
        pass
    assert sorted(written.parent.rglob("*")) == before


def test_a_changed_shard_is_named(written: Path) -> None:
    shard = written / "b.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"b\.safetensors has sha256 .* changed or damaged"):
        verify(written)


def test_a_missing_shard_is_named(written: Path) -> None:
    (written / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds the shards \['a.safetensors'\], but"):
        verify(written)
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing, but .* lists it"):
        check_listed(written, read_record(written))


def test_an_extra_shard_is_named(written: Path) -> None:
    save_file({"x": torch.zeros(1)}, written / "more.safetensors")
    check_listed(written, read_record(written))
    with pytest.raises(CheckpointError, match=r"more\.safetensors"):
        verify(written)


def test_an_unknown_format_version_is_named(written: Path) -> None:
    edit(written, format_version=7)
    with pytest.raises(CheckpointError, match="format_version 7, but this program reads 1"):
        read_record(written)


@pytest.mark.parametrize("content", [None, "{broken", "[]", "{}"])
def test_what_is_no_record_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "cast.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint's record"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{broken", "not readable JSON"), ("[]", "holds list, not a JSON")]
)
def test_what_is_no_object_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left(error: Exception, tmp_path: Path) -> None:
    told = pytest.raises(
        CheckpointError, match=r"the disk is full: .*out takes more than the .* GB"
    )
    with told, new_directory(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    out = tmp_path / "none" / "out"
    check_room(out, 1000, "a model")
    with pytest.raises(
        CheckpointError, match=r"out needs about 1000000000\.0 GB for a model, but .* GB are free"
    ):
        check_room(out, 10**18, "a model")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as root, who may write everywhere but on a disk that is mounted to be read."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CheckpointError, match=f"cannot be made: {tmp_path} cannot be written"):
        check_new(tmp_path / "a" / "out")


def test_a_link_to_nothing_is_taken_too(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="out exists already"):
        check_new(tmp_path / "out")


def test_work_is_kept_if_the_name_was_taken_meanwhile(tmp_path: Path) -> None:
    taken = pytest.raises(CheckpointError, match="can no longer be created")
    with taken as raised, new_directory(tmp_path / "out") as folder:
        (folder / "model").write_text("hours of work")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/other").touch()
    assert f"everything is in {folder}: move it" in str(raised.value)
    assert (folder / "model").read_text() == "hours of work"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_as": "int4"}, "trained_as is 'int4', but must be a dict"),
        ({"trained_as": {"quantize": "int4"}}, "trained_as lacks quantize or scale_group"),
        ({"converted_from": []}, r"converted_from is \[\], but must be a dict"),
    ],
)
def test_a_field_of_another_kind_is_named(
    changes: dict[str, object], message: str, written: Path
) -> None:
    edit(written, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_record(written)
