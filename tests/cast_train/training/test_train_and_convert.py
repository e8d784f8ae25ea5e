"""`cast-train run --convert`, and the script that calls it: dense model and text to compressed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.record import SCALES_TRAINED
from cast_serve.errors import PushError
from cast_train.__main__ import app, repeat_text_flag
from cast_train.config import TrainConfig
from cast_train.training.run import train
from tests.fake_hub import fake_hub

SCRIPT = Path(__file__).parents[3] / "scripts/train-and-convert"


def call(*words):
    """As the script calls `cast-train run`, with its --out for --convert."""
    given = [str(word) for word in ("run", "--resume", *words)]
    given = ["--convert" if word == "--out" else word for word in given]
    return CliRunner().invoke(app, repeat_text_flag(given))


def call_script(*words):
    return subprocess.run([SCRIPT, *(str(word) for word in words)], capture_output=True, text=True)


def test_the_scripts_help_says_how_it_is_called():
    done = call_script("--help")
    assert done.returncode == 0
    assert (
        "--model DIR --text FILE... --out DIR [--quantize int8|int4 [--head int4|none]]"
        in done.stdout
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale-group 32", "--scale-group needs --convert DIR"),
        ("--train-quantized --quantize int8", "--train-quantized needs --convert DIR"),
        ("--private", "--private needs --convert DIR"),
        ("", "--out DIR is missing; --convert DIR alone trains DIR.gated"),
    ],
)
def test_what_is_of_the_conversion_needs_one(words, message, llama_dir, text_file):
    inputs = ["run", "--model", str(llama_dir), "--text", str(text_file)]
    done = CliRunner().invoke(app, [*inputs, *words.split()])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--set method=dense", "method dense makes no"),
        ("--set quantize=int8 --quantize int4", "--quantize int4 differs from quantize int8"),
        (
            "--set quantize=int4 --quantize int4 --scale-group 64",
            "--scale-group 64 differs from scale_group 128",
        ),
        ("--set quantize=int8 --scale-group 64", "--scale-group 64 is not served; it needs"),
    ],
)
def test_what_has_no_compressed_weights_is_not_trained(flag, named, llama_dir, text_file, tmp_path):
    words = ("--model", llama_dir, "--text", text_file, "--out", tmp_path / "out")
    done = call(*words, *flag.split())
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert named in done.stderr


def test_what_conversion_would_refuse_is_refused_before_training(
    llama_dir, text_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    words = ("--model", llama_dir, "--text", text_file, "--out", tmp_path / "out")
    for flags, message in (
        (("--quantize", "int2"), "'int2' is not one of"),
        (("--quantize", "int4", "--scale-group", "96"), "--scale-group 96 is not served"),
        (("--quantize", "int4", "--head", "int4"), "hidden size 32 is not a multiple of 64"),
        (("--push-to-hub", "tester/sparse"), "HF_HUB_OFFLINE is set; unset it"),
    ):
        done = call(*words, *flags)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_trains_a_hubs_model_and_pushes_the_result(
    llama_dir, text_file, settings_file, tmp_path, monkeypatch
):
    with fake_hub() as remote:
        remote.add("org/dense", llama_dir)
        for name, value in {**remote.environment, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        words = ["--model", "org/dense", "--text", text_file, "--out", tmp_path / "sparse"]
        words += ["--config", settings_file, "--steps", 1, "--push-to-hub", "tester/sparse"]
        done = call_script(*words, "--private")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["num_sparse_layers"] == 14
        written = {path.name: path.read_bytes() for path in (tmp_path / "sparse").iterdir()}
        assert remote.repos["tester/sparse"] == written
        assert remote.private == {"tester/sparse"}
        assert b"base_model: org/dense\n" in written["README.md"]


def test_a_push_that_fails_leaves_what_was_made(
    llama_dir, text_file, settings_file, tmp_path, monkeypatch
):
    """Repeated, the command only pushes."""
    pushed = []

    def push(folder, repo, is_private):
        pushed.append((folder, repo, is_private))
        if len(pushed) == 1:
            raise PushError(f"{folder} is complete, but it was not pushed")
        return "address"

    monkeypatch.setattr(hub, "check_push", lambda *_: None)
    monkeypatch.setattr(hub, "push", push)
    out = tmp_path / "sparse"
    words = ["--model", llama_dir, "--text", text_file, "--out", out, "--config", settings_file]
    words += ["--steps", 1, "--push-to-hub", "tester/sparse", "--private"]
    failed = call(*words)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert f"{out} is complete, but it was not pushed" in failed.stderr
    written = (out / "cast.json").stat().st_mtime_ns
    again = call(*words)
    assert json.loads(again.stdout)["pushed_to"] == "address"
    assert (out / "cast.json").stat().st_mtime_ns == written
    assert pushed == 2 * [(out, "tester/sparse", True)]

    # Without OUT.gated nothing says what OUT was made of.
    shutil.rmtree(tmp_path / "sparse.gated")
    refused = call(*words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"push it with: hf upload tester/sparse {out}" in " ".join(refused.stderr.split())


def test_trains_converts_and_goes_on_where_it_was(llama_dir, text_file, settings_file, tmp_path):
    out = tmp_path / "sparse"
    (tmp_path / "more.txt").write_text("Another text.\n")
    words = ["--model", llama_dir, "--text", text_file, tmp_path / "more.txt", "--out", out]
    words += ["--config", settings_file, "--steps", 3]
    done = call_script(*words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["kind"], summary["num_sparse_layers"]) == ("compressed", 14)
    cast = json.loads((out / "cast.json").read_text())
    assert cast["steps"] == 3

    written = (out / "cast.json").stat().st_mtime_ns
    again = call(*words)
    assert json.loads(again.stdout) == summary
    assert (out / "cast.json").stat().st_mtime_ns == written

    trained = (tmp_path / "sparse.gated/cast.json").stat().st_mtime_ns
    shutil.rmtree(out)
    assert json.loads(call(*words).stdout) == summary
    assert (tmp_path / "sparse.gated/cast.json").stat().st_mtime_ns == trained


def test_quantises(llama_dir, text_file, settings_file, tmp_path):
    out = tmp_path / "sparse"
    words = ["--model", llama_dir, "--text", text_file, "--out", out]
    words += ["--config", settings_file, "--steps", 1]
    int8 = ["--quantize", "int8"]
    done = call(*words, *int8)
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["quantized"], summary["head"]) == ("int8", "int8")
    other = call(*words)
    assert (other.exit_code, other.stdout) == (2, "")
    assert "with --quantize int8, but none is asked for" in other.stderr
    shutil.rmtree(tmp_path / "sparse.gated")
    assert json.loads(call(*words, *int8).stdout) == summary
    other = call(*words)
    assert (other.exit_code, other.stdout) == (2, "")
    assert "with --quantize int8, but none is asked for; choose another directory" in other.stderr


def test_integers_of_4_bits_are_chosen_by_the_text(llama_dir, text_file, settings_file, tmp_path):
    out = tmp_path / "sparse"
    words = ["--model", llama_dir, "--text", text_file, "--out", out, "--config", settings_file]
    words += ["--steps", 1, "--quantize", "int4", "--scale-group", 32]
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    found = [summary[key] for key in ("quantized", "head", "scale_group")]
    assert found == ["int4", "int8", 32]
    quantization = json.loads((out / "cast.json").read_text())["quantization"]
    assert quantization["calibration"]["text"][0]["name"] == text_file.name
    assert json.loads(call(*words).stdout) == summary  # nothing is done again
    other = call(*words[:-2])
    assert (other.exit_code, other.stdout) == (2, "")
    assert "with --scale-group 32, but 128 is asked for" in other.stderr


def test_the_head_may_have_fewer_bits_than_what_is_trained(
    words_dir, text_file, settings_file, tmp_path
):
    words = ["--model", words_dir, "--text", text_file, "--out", tmp_path / "sparse"]
    words += ["--config", settings_file, "--steps", 2, "--quantize", "int8", "--train-quantized"]
    words += ["--head", "int4", "--scale-group", 64]
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["quantized"], summary["head"], summary["scale_group"]) == ("int8", "int4", None)
    cast = json.loads((tmp_path / "sparse/cast.json").read_text())
    assert cast["quantization"]["scales"] == SCALES_TRAINED
    assert json.loads(call(*words).stdout) == summary  # nothing is done again
    other = call(*words[:-4])
    assert (other.exit_code, other.stdout) == (2, "")
    assert "with --head int4, but int8 is asked for" in other.stderr


def test_trains_the_last_steps_as_they_are_quantised(llama_dir, text_file, settings_file, tmp_path):
    words = ["--model", llama_dir, "--text", text_file, "--out", tmp_path / "sparse"]
    words += ["--config", settings_file, "--steps", 2, "--train-quantized"]
    refused = call(*words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--train-quantized needs --quantize int8 or int4" in refused.stderr
    done = call(*words, "--quantize", "int4", "--scale-group", 64)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["scale_group"] == 64
    cast = json.loads((tmp_path / "sparse/cast.json").read_text())
    assert cast["trained_as"] == {"quantize": "int4", "scale_group": 64, "num_steps": 1}
    assert cast["quantization"]["scales"] == SCALES_TRAINED


def test_what_is_there_must_be_of_the_same_inputs(llama_dir, text_file, settings_file, tmp_path):
    model, out, gated = tmp_path / "model", tmp_path / "sparse", tmp_path / "sparse.gated"
    shutil.copytree(llama_dir, model)
    words = ("--model", model, "--text", text_file, "--out", out, "--config", settings_file)
    train(model, [text_file], gated, TrainConfig.from_toml(settings_file))
    convert(gated, out)

    # OUT.gated was trained anew since.
    cast = json.loads((out / "cast.json").read_text())
    (out / "cast.json").write_text(json.dumps(cast | {"converted_from": {"model.safetensors": ""}}))
    other = call(*words)
    assert (other.exit_code, other.stdout) == (2, "")
    assert "was not converted from what" in other.stderr
    (out / "cast.json").write_text(json.dumps(cast))

    # Without OUT.gated OUT's own record is compared; nothing is trained again.
    gated.rename(tmp_path / "aside")
    again = call(*words)
    assert json.loads(again.stdout)["kind"] == "compressed"
    assert not gated.exists()

    # Weights trained anew under the same name: neither OUT nor OUT.gated is of them.
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    stale = [call(*words)]
    shutil.rmtree(out)
    (tmp_path / "aside").rename(gated)
    stale.append(call(*words))
    for done in stale:
        assert (done.exit_code, done.stdout) == (2, "")
        assert "is another run (source.model_sha256.model.safetensors is" in done.stderr
        assert "choose another --out or remove it" in done.stderr
    assert not out.exists()


def test_wrong_use(llama_dir, text_file, tmp_path):
    assert "Missing option '--text'" in call("--model", llama_dir).stderr
    missing = call("--model", tmp_path / "no", "--text", text_file, "--out", tmp_path / "out")
    assert missing.exit_code == 2
    assert str(tmp_path / "no") in missing.stderr
    inputs = ("--model", llama_dir, "--text", text_file, "--out", tmp_path / "out")
    unknown = call(*inputs, "--set", "stesp=3")
    assert (unknown.exit_code, "the nearest is steps" in unknown.stderr) == (2, True)
    assert list(tmp_path.glob("out*")) == []
