"""A model's name -> a directory, and a directory -> a hub, against a hub on 127.0.0.1."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from cast_serve.checkpoint.hub import check_push, fetch, name_of, push
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.errors import PushError
from tests.fake_hub import SHA, TOKEN, FakeHub

NEEDED = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "merges.txt": b"merges",
    "chat_template.jinja": b"template",
    "README.md": b"card",
    "LICENSE": b"terms",
}
USELESS = (
    "pytorch_model.bin",
    "model.gguf",
    "consolidated.safetensors",
    "onnx/config.json",
    "original/params.json",
    "plot.png",
)


@pytest.fixture
def model(hub: FakeHub) -> str:
    hub.repos["org/model"] = {**NEEDED, **dict.fromkeys(USELESS, b"x")}
    return "org/model"


def test_fetches_what_is_needed_and_only_once(hub: FakeHub, model: str) -> None:
    folder = fetch(model)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEEDED
    assert hub.fetched() == set(NEEDED)
    hub.asked.clear()
    assert fetch(f"{model}@main") == folder
    assert hub.fetched() == set()
    assert name_of(folder) == "org/model"


def test_a_revision(hub: FakeHub, model: str) -> None:
    assert fetch(f"{model}@{SHA}").name == SHA
    with pytest.raises(CheckpointError, match="has no revision 'v9' of org/model; correct it"):
        fetch(f"{model}@v9")


def test_a_directory_wins(
    hub: FakeHub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(model).mkdir(parents=True)
    assert fetch(model) == Path(model)
    assert hub.asked == []
    assert name_of(Path(model)) == "model"


@pytest.mark.parametrize("text", ["nowhere", "/org/model", "../org/model", "a/b/c", "org/mo del"])
def test_what_is_no_name_is_not_asked_for(hub: FakeHub, text: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a directory nor a model's name on a hub"):
        fetch(text)
    assert hub.asked == []


def test_what_cannot_be_fetched(
    hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="has no public model of that name"):
        fetch("org/other")
    hub.repos["org/bin"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors on the hub"):
        fetch("org/bin")
    hub.gated.add(model)
    with pytest.raises(CheckpointError, match=f"accept its terms first, at {hub.url}/{model}"):
        fetch(model)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set; unset it"):
        fetch(model)


def test_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        CheckpointError, match="cannot be fetched from http://127.0.0.1:1 .*refused"
    ):
        fetch("org/model")


def test_offline_what_was_fetched_is_used(
    hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(model) == folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    for name, content in NEEDED.items():
        (made / name).write_bytes(content)
    return made


@pytest.mark.parametrize("is_private", [False, True])
def test_push(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, is_private: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for _ in range(2):  # the second time it is there
        check_push("tester/sparse", is_private)
        assert push(folder, "tester/sparse", is_private) == f"{hub.url}/tester/sparse"
    assert hub.repos["tester/sparse"] == NEEDED
    assert ("tester/sparse" in hub.private) == is_private


def test_a_push_that_would_fail(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="needs a token; set HF_TOKEN"):
        check_push("tester/sparse", False)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(CheckpointError, match="does not accept the token; set HF_TOKEN"):
        check_push("tester/sparse", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for owner in ("stranger", "readers"):
        with pytest.raises(CheckpointError, match=f"may not write to {owner}; choose tester/spars"):
            check_push(f"{owner}/sparse", False)
    with pytest.raises(
        CheckpointError, match="'sparse' is not a model's name on a hub; write ORG/NAME"
    ):
        check_push("sparse", False)
    hub.repos["tester/sparse"] = {}
    with pytest.raises(CheckpointError, match="exists already and is public; leave --private out"):
        check_push("tester/sparse", True)
    hub.role = "read"
    with pytest.raises(CheckpointError, match="the token of tester is read-only"):
        check_push("tester/sparse", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not possible: HF_HUB_OFFLINE is set; unset it"):
        check_push("tester/sparse", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=r"cannot be reached .*push later \(`hf upload`\)"):
        check_push("tester/sparse", False)


def test_a_push_that_fails_says_how_to_repeat_it(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses_commits = True
    with pytest.raises(PushError, match=f"hf upload tester/sparse {folder} --private"):
        push(folder, "tester/sparse", True)
    assert {path.name for path in folder.iterdir()} == set(NEEDED)
