"""What was made from other files is not taken for what is asked for, whatever their names are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cast_serve.checkpoint.record import CheckpointError
from cast_train.checkpoint import identity
from cast_train.config import TrainConfig
from cast_train.training import prepare
from cast_train.training.run import train
from tests.cast_train.settings import changed


@pytest.fixture
def config(settings_file):
    return TrainConfig.from_toml(settings_file, steps=5)


@pytest.fixture
def inputs(llama_dir, text_file, tmp_path):
    """`train`'s inputs in a folder of their own, to be changed."""
    folder = tmp_path / "inputs"
    for name in ("model", "teacher"):
        shutil.copytree(llama_dir, folder / name)
    for name in ("a.txt", "b.txt", "heldout.txt"):
        (folder / name).write_text(f"{text_file.read_text()}{name}\n")
    return {
        "model_dir": folder / "model",
        "texts": [folder / "a.txt", folder / "b.txt"],
        "heldout_file": folder / "heldout.txt",
        "teacher_dir": folder / "teacher",
    }


def train_anew(directory):
    """Other weights of the same shapes in files of the same names and sizes."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})


def other_vocabulary(directory):
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["ignore_merges"] = True
    file.write_text(json.dumps(content))


CHANGES = {
    "weights": (lambda of: train_anew(of["model_dir"]), "model_sha256.model.safetensors is"),
    "tokenizer": (lambda of: other_vocabulary(of["model_dir"]), "model_sha256.tokenizer.json is"),
    "teacher": (lambda of: train_anew(of["teacher_dir"]), "teacher_sha256.model.safetensors is"),
    "text": (lambda of: of["texts"][1].write_text("other\n" * 999), r"text\[1\].sha256 is"),
    "order": (lambda of: of["texts"].reverse(), r"text\[0\].name is 'a.txt', not 'b.txt'"),
    "heldout": (lambda of: of["heldout_file"].write_text("other\n" * 999), "heldout.sha256 is"),
    "role": (
        lambda of: of["texts"].append(of.pop("heldout_file")),
        "text is .*heldout is only there",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_run_of_other_files_is_refused(change, inputs, config, tmp_path, monkeypatch):
    alter, message = CHANGES[change]
    record = train(**inputs, out=tmp_path / "out", config=config)
    monkeypatch.setattr(prepare, "load_any", None)  # nothing is loaded to see that all is done
    assert train(**inputs, out=tmp_path / "out", config=config) == record
    alter(inputs)
    with pytest.raises(CheckpointError, match=f"is another run .*{message}.*; choose another"):
        train(**inputs, out=tmp_path / "out", config=config)


def test_an_unfinished_run_of_other_weights_is_refused(
    inputs, config, tmp_path, train_until, monkeypatch
):
    out = tmp_path / "out"
    train_until(4, inputs["model_dir"], inputs["texts"], out, config)
    train_anew(inputs["model_dir"])
    monkeypatch.setattr(prepare, "load_any", None)
    with pytest.raises(
        CheckpointError, match="partial is another run .*model_sha256.*or remove it"
    ):
        train(inputs["model_dir"], inputs["texts"], out, config, is_resume=True)


def test_a_record_of_an_earlier_release_says_what_it_lacks(inputs, config, tmp_path):
    out = tmp_path / "out"
    train(**inputs, out=out, config=config)
    record = json.loads((out / "cast.json").read_text())
    del record["source"]["model_sha256"]
    record["source"]["model_config_sha256"] = "0" * 64
    (out / "cast.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"source\.model_sha256 is missing.*or remove it"):
        train(**inputs, out=out, config=config)


def test_settings_differ_by_name(inputs, config, tmp_path):
    train(**inputs, out=tmp_path / "out", config=config)
    other = changed(config, steps=6, exclude=("o_proj",))
    with pytest.raises(CheckpointError, match=r"exclude is \[\], not \['o_proj'\]") as error:
        train(**inputs, out=tmp_path / "out", config=other)
    assert "config.steps is 5, not 6" in str(error.value)


def test_a_directory_is_known_by_all_that_is_read(llama_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "README.md").write_text("not read")
    (folder / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    found = identity.of_directory(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
    assert not {"README.md", "pytorch_model.bin"} & set(found)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in identity.of_directory(folder)
    with pytest.raises(CheckpointError, match="is not a directory"):
        identity.of_directory(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "heldout", "message"),
    [
        (["a.txt", "a.txt"], None, "--text has a.txt twice"),
        (
            ["a.txt", "b.txt"],
            "copy.txt",
            "--heldout copy.txt is among the training texts, as b.txt",
        ),
    ],
)
def test_what_is_measured_on_is_not_trained_on(
    text, heldout, message, inputs, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "load_any", lambda *_: pytest.fail("was loaded"))
    folder = inputs["model_dir"].parent
    shutil.copy(folder / "b.txt", folder / "copy.txt")
    inputs["texts"] = [folder / name for name in text]
    inputs["heldout_file"] = folder / heldout if heldout else None
    with pytest.raises(ValueError, match=message):
        train(**inputs, out=tmp_path / "out", config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_a_long_list_of_differences_is_cut():
    found, wanted = ({"files": {str(i): value for i in range(9)}} for value in ("a" * 64, "b" * 64))
    with pytest.raises(CheckpointError, match="OUT is another .* and 5 more.; remove it") as error:
        identity.check(found, wanted, "OUT is another", "remove it")
    assert len(str(error.value)) < 400
    assert "a" * 64 not in str(error.value)
    identity.check({**found, "more": 1}, found, "OUT is another", "remove it")
