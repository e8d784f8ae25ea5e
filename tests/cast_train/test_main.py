import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.provenance import versions
from cast_train import precision
from cast_train.__main__ import app, repeat_text_flag
from cast_train.checkpoint.models import load_dense, load_tokenizer
from cast_train.errors import StoppedError
from cast_train.evaluate import evaluation
from cast_train.evaluate.perplexity import Perplexity, perplexity
from cast_train.precision import arithmetic
from cast_train.tokens import read_tokens, to_blocks


@pytest.fixture
def cast_train(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def last_json(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_commands_take_denormal_numbers_for_zero(cast_train, llama_dir, monkeypatch):
    calls = []
    monkeypatch.setattr(precision, "flush_denormals", lambda: calls.append("flushed"))
    last_json(cast_train("plan", "--model", llama_dir, "--memory-gb", 24))
    assert calls == ["flushed"]


def test_train_then_measure(
    cast_train, llama_dir, text_file, heldout_file, settings_file, monkeypatch
):
    # In bf16, with AMX, the two batch shapes round 1.04e-4 apart.
    monkeypatch.setattr(precision, "_cpu_prefers_bf16", lambda capabilities: False)
    trained = last_json(
        cast_train(
            *("run", "--model", llama_dir, "--text", text_file, "--out", "gated"),
            *("--config", settings_file, "--steps", 5, "--heldout", heldout_file),
        )
    )
    assert (trained["steps"], trained["tokens_seen"], trained["num_targets"]) == (5, 640, 14)
    found = last_json(
        cast_train("eval", "gated", "--text", text_file, "--context", 32, "--tokens", 128)
    )
    assert (found["kind"], found["num_tokens"], found["context_tokens"]) == ("gated", 124, 32)
    assert found["perplexity_hard"] == pytest.approx(trained["perplexity_hard"], rel=1e-4)


def test_tokenise_then_train_by_weights(cast_train, llama_dir, text_file, settings_file, tmp_path):
    rows = [{"body": f"Row {i} of a data set.\n" * 9} for i in range(60)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tokenized = cast_train(
        *("tokenize", "--model", llama_dir, "--text", "rows.jsonl", "--text-field", "body"),
        *("--tokens", 9000, "--out", "tokens"),
    )
    assert "tokens: 9,000 tokens in 1 files" in tokenized.stdout
    assert last_json(tokenized) == {"out": "tokens", "num_tokens": 9000, "num_files": 1}
    cast_train("tokenize", "--model", llama_dir, "--text", text_file, "--out", "more")
    trained = cast_train(
        *("run", "--model", llama_dir, "--text", "tokens=0.3", "--text", "more=0.7"),
        *("--out", "gated", "--config", settings_file, "--steps", 2),
    )
    assert last_json(trained)["steps"] == 2
    refused = cast_train("run", "--model", llama_dir, "--text", "rows.jsonl", "--out", "other")
    assert refused.exit_code == 2
    assert "rows.jsonl has no field 'text', only body" in refused.stderr


def test_prune_then_measure(cast_train, llama_dir, text_file):
    pruned = last_json(
        cast_train("oneshot", "--model", llama_dir, "--method", "magnitude", "--out", "pruned")
    )
    assert pruned["num_targets"] == 14
    blocks = to_blocks(read_tokens([text_file], load_tokenizer(llama_dir)), 32)
    measured = []
    for folder, kind in ((llama_dir, "dense"), (Path("pruned"), "pruned")):
        found = last_json(cast_train("eval", folder, "--text", text_file, "--context", 32))
        assert found["kind"] == kind
        expected = perplexity(load_dense(folder, arithmetic()), blocks).perplexity
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        measured.append(expected)
    assert abs(measured[1] / measured[0] - 1) > 1e-3  # so that one cannot pass for the other


def test_measure_beside_a_compressed_directory(
    cast_train, llama_dir, text_file, settings_file, tmp_path
):
    """What int8 costs is asked of a quantised directory beside the one it was made from."""
    cast_train("oneshot", "--model", llama_dir, "--method", "magnitude", "--out", "pruned")
    convert(Path("pruned"), tmp_path / "bf16")
    convert(Path("pruned"), tmp_path / "int8", quantization=Quantization("int8"))
    asked = ("--text", text_file, "--context", 32)
    measured = {}
    for name in ("bf16", "int8"):
        found = last_json(
            cast_train("eval", tmp_path / name, *asked, "--reference", tmp_path / "int8")
        )
        measured[name] = math.log(found["perplexity"]), found["nats_above_reference"]
    assert measured["int8"][1] == 0
    assert measured["bf16"][1] != 0
    difference = measured["bf16"][0] - measured["int8"][0]
    assert measured["bf16"][1] == pytest.approx(difference, rel=1e-3)
    settings = ("--config", settings_file, "--steps", 1)
    last_json(
        cast_train("run", "--model", llama_dir, "--text", text_file, *settings, "--out", "gated")
    )
    refused = cast_train("eval", llama_dir, *asked, "--reference", "gated")
    assert (refused.exit_code, "gated is a gated checkpoint; give the" in refused.stderr) == (
        2,
        True,
    )
    other = tmp_path / "other"
    shutil.copytree(llama_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    refused = cast_train("eval", llama_dir, *asked, "--reference", other)
    assert refused.exit_code == 2
    assert "has a vocabulary of 256 tokens and --reference" in refused.stderr


def test_permute_then_measure(cast_train, large_weights_dir, text_file, monkeypatch):
    # In bf16, the order of the channels shows in the sums.
    monkeypatch.setattr(precision, "_cpu_prefers_bf16", lambda capabilities: False)
    asked = ("permute", "--model", large_weights_dir, "--text", text_file, "--out", "permuted")
    found = last_json(cast_train(*asked))
    assert found["kept_share"].keys() == {"residual", "inner", "values"}
    assert all(after >= before for before, after in found["kept_share"].values())
    given, written = (
        load_file(folder / "model.safetensors") for folder in (large_weights_dir, Path("permuted"))
    )
    for name, weight in written.items():
        assert not torch.equal(weight.float(), given[name]), name
        assert torch.equal(*(w.float().flatten().sort().values for w in (weight, given[name])))
    before, after = (
        last_json(cast_train("eval", folder, "--text", text_file, "--context", 32))["perplexity"]
        for folder in (large_weights_dir, "permuted")
    )
    assert after == pytest.approx(before, rel=1e-4)
    again = cast_train(*asked)
    assert (again.exit_code, "permuted exists already; remove it" in again.stderr) == (2, True)


def test_the_losses_that_are_written_give_the_perplexity(cast_train, llama_dir, text_file):
    asked = ("eval", llama_dir, "--text", text_file, "--context", 32, "--tokens", 128)
    found = last_json(cast_train(*asked, "--losses", "losses.json"))
    written = json.loads(Path("losses.json").read_text())
    losses, origin = written.pop("losses"), written.pop("origin")
    assert written == {**found, "text": [str(text_file)]}
    assert origin["versions"] == versions()
    assert len(losses) == 4
    assert math.exp(statistics.fmean(losses)) == pytest.approx(found["perplexity"])
    measured = Perplexity(found["perplexity"], found["num_tokens"], 32, tuple(losses))
    assert measured.stderr_nats == pytest.approx(found["stderr_nats"])


def test_the_losses_are_written_with_the_load_before_they_were_measured(
    cast_train, llama_dir, text_file, monkeypatch
):
    loads = [0.5]
    evaluate = evaluation.evaluate

    def loaded(*arguments):
        loads.append(9.0)
        return evaluate(*arguments)

    monkeypatch.setattr(os, "getloadavg", lambda: (loads[-1], 0.0, 0.0))
    monkeypatch.setattr(evaluation, "evaluate", loaded)
    asked = ("eval", llama_dir, "--text", text_file, "--context", 32, "--tokens", 128)
    assert cast_train(*asked, "--losses", "losses.json").exit_code == 0
    origin = json.loads(Path("losses.json").read_text())["origin"]
    assert origin["machine"]["load_average"] == 0.5


def test_the_whole_text_is_measured_unless_told(cast_train, llama_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All of it.\n" * 3000)
    found = last_json(cast_train("eval", llama_dir, "--text", text, "--context", 512))
    assert found["num_tokens"] > 16384
    asked = ("eval", llama_dir, "--text", text, "--context", 512, "--tokens", 1024)
    assert last_json(cast_train(*asked))["num_tokens"] == 2 * 511


def test_bits_are_a_budget(cast_train, words_dir, text_file, settings_file, tmp_path):
    asked = ("--model", words_dir, "--text", text_file, "--sparsity", "32:64", "--bits")
    run = ("--config", settings_file, "--method", "fixed", "--steps", 2)
    found = last_json(
        cast_train("run", *asked, 4.5, *run, "--convert", "sparse", "--quantize", "int8")
    )
    assert found["zeros"] == pytest.approx(9 / 16, abs=0.01)
    assert 4.4 < found["bits_per_weight"] < 4.5 + 16 / 64  # the scale of a row of 64 columns
    pruned = ("oneshot", *asked, 3.375, "--quantize", "int4", "--method", "magnitude")
    last_json(cast_train(*pruned, "--out", "pruned"))
    record = json.loads(Path("pruned/cast.json").read_text())
    assert (record["n"], record["m"]) == (36, 64)  # 4 * 36 / 64 and 1.125
    assert len(set(record["kept_of_64"].values())) > 1


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("run", ("--bits", 5), "bits 5 is a budget for N of 64, but sparsity is 2:4"),
        ("run", ("--bits", 5, "--zeros", 0.4), "--bits 5 and --zeros 0.4 both set the budget"),
        (
            "run",
            ("--bits", 9, "--set", "zeros=0.3"),
            "--bits 9 and --zeros 0.3 both set the budget",
        ),
        ("oneshot", ("--bits", 20, "--sparsity", "32:64"), "takes 2 (4:64) to 15 (56:64) bits"),
        ("oneshot", ("--quantize", "int8"), "--quantize int8 needs --bits N here"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(
    command, flags, message, cast_train, llama_dir, text_file, tmp_path
):
    method = ("--method", "magnitude") if command == "oneshot" else ()
    asked = ("--model", llama_dir, "--text", text_file, "--out", "out")
    refused = cast_train(command, *asked, *method, *flags)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert not list(tmp_path.iterdir())


def test_prune_and_solve(cast_train, llama_dir, text_file):
    asked = ("oneshot", "--model", llama_dir, "--method", "magnitude", "--text", text_file)
    last_json(cast_train(*asked, "--out", "pruned"))
    last_json(cast_train(*asked, "--out", "solved", "--solve"))
    records = [json.loads(Path(d, "cast.json").read_text()) for d in ("pruned", "solved")]
    assert [record["solved"] for record in records] == [False, True]
    pruned, solved = (load_file(f"{folder}/model.safetensors") for folder in ("pruned", "solved"))
    for name in records[0]["targets"]:
        weights = pruned[f"{name}.weight"], solved[f"{name}.weight"]
        assert torch.equal(*(weight != 0 for weight in weights)), name
        assert not torch.equal(*weights), name


def test_prune_by_the_mask_of_another_directory(
    cast_train, llama_dir, large_weights_dir, text_file, tmp_path
):
    asked = ("oneshot", "--model", large_weights_dir, "--method", "mask", "--out", "out")
    refused = cast_train(*asked)
    assert refused.exit_code == 2
    assert "needs a directory to take the mask from" in refused.stderr
    assert not list(tmp_path.iterdir())
    last_json(cast_train("oneshot", "--model", llama_dir, "--method", "magnitude", "--out", "of"))
    assert last_json(cast_train(*asked, "--mask", "of"))["method"] == "mask"
    given, mask_of, written = (
        load_file(folder / "model.safetensors")
        for folder in (large_weights_dir, Path("of"), Path("out"))
    )
    for name in json.loads(Path("of/cast.json").read_text())["targets"]:
        kept = given[f"{name}.weight"] * (mask_of[f"{name}.weight"] != 0)
        assert torch.equal(written[f"{name}.weight"].float(), kept), name


def test_quantize_to_the_bits_that_are_asked_for(cast_train, llama_dir, text_file):
    last_json(
        cast_train("oneshot", "--model", llama_dir, "--method", "magnitude", "--out", "pruned")
    )
    asked = ("quantize", "--model", "pruned", "--text", text_file, "--blocks", 1)
    refused = cast_train(*asked, "--out", "out", "--bits", 5)
    assert refused.exit_code == 2
    assert "--bits 5 is not served; give 4 or 8" in refused.stderr
    assert not Path("out").exists()
    for flags, kind in ((("--bits", 8), "int8"), (("--bits", 4), "int4"), ((), "int4")):
        found = last_json(cast_train(*asked, "--out", f"{kind}-{len(flags)}", *flags))
        assert found["quantized"] == kind


@pytest.mark.parametrize(
    ("flags", "seeds"),
    [
        ((), [0, 1, 2]),
        (("--seeds", 2), [0, 1]),
        (("--first-seed", 3), [3, 4, 5]),
        (("--first-seed", 3, "--seeds", 1), [3]),
    ],
)
def test_the_seeds_of_a_study(cast_train, tmp_path, monkeypatch, flags, seeds):
    asked = []

    def run(*_, **settings):
        asked.append(settings["seeds"])
        return {"model": "m", "text": ["t"], "heldout": "h", "summary": {}}

    monkeypatch.setattr("benchmarks.studies.study.run", run)
    words = ("study", "--model", tmp_path, "--text", "t", "--heldout", "h", "--out", "out")
    assert last_json(cast_train(*words, *flags)) == {"out": "out", "summary": {}}
    assert [list(each) for each in asked] == [seeds]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model": "gone"}, "gone is neither a directory nor a model's name on a hub"),
        ({"--text": "gone.txt"}, "cannot read the text gone.txt"),
        (
            {"--method": "magic"},
            "method is 'magic', but must be gates, fixed, ste, adams or dense",
        ),
        ({"--method": "fixed", "--selector": "gumbel"}, "method fixed has no setting selector"),
        ({"--config": "gone.toml"}, "cannot read the settings gone.toml"),
        ({"--config": None}, "tokens in whole blocks, but"),
    ],
)
def test_wrong_use_is_one_line_exit_2_and_nothing_left(
    cast_train, llama_dir, text_file, settings_file, tmp_path, flags, message
):
    used = {
        "--model": llama_dir,
        "--text": text_file,
        "--config": settings_file,
        "--out": "out",
    } | flags
    arguments = [
        part for flag, value in used.items() if value is not None for part in (flag, value)
    ]
    result = cast_train("run", *arguments)
    assert result.exit_code == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("cast-train: ")]
    assert len(said) == 1
    assert message in said[0]
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", [ValueError, RuntimeError, FileNotFoundError])
def test_a_fault_of_our_own_keeps_its_traceback(cast_train, text_file, monkeypatch, fault):
    def broken(*_):
        raise fault("ours")

    monkeypatch.setattr(evaluation, "evaluate", broken)
    result = cast_train("eval", "dense", "--text", text_file)
    assert (result.exit_code, type(result.exception)) == (1, fault)


def test_a_hubs_name_is_taken_as_a_directory_is(
    cast_train, llama_dir, text_file, settings_file, hub
):
    hub.add("org/dense", llama_dir)
    asked = ("--model", "org/dense", "--text", text_file)
    last_json(cast_train("run", *asked, "--out", "gated", "--config", settings_file, "--steps", 1))
    assert json.loads(Path("gated/cast.json").read_text())["source"]["model"] == "org/dense"
    last_json(cast_train("oneshot", *asked, "--method", "magnitude", "--out", "pruned"))
    last_json(cast_train("permute", *asked, "--out", "permuted"))
    words = ("--text", text_file, "--context", 32, "--tokens", 128)
    found = last_json(cast_train("eval", "org/dense", *words, "--reference", "org/dense"))
    assert (found["directory"], found["kl_nats_per_token"]) == ("org/dense", 0.0)
    assert "model.safetensors" in hub.fetched()
    hub.asked.clear()
    last_json(cast_train("eval", llama_dir, *words))
    assert hub.asked == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --out text/out", "text/out cannot be made: {tmp_path}/text is a file"),
        ("run --out out --tensorboard logs", "--tensorboard needs the package tensorboard"),
        ("run --out text", "text exists and is not a run's result; choose another --out"),
        ("run --out out --config bad.toml", "'(' is not a regular expression"),
        ("run --out out --heldout gone.txt", "cannot read the text gone.txt"),
        ("oneshot --out text/out --method wanda", "text/out cannot be made"),
        ("oneshot --out out --method wanda --exclude (", "'(' is not a regular expression"),
        ("permute --out text/out", "text/out cannot be made"),
        ("study --out out --heldout text", "reports need matplotlib"),
        ("eval . --losses .", "--losses . cannot be written; name another file"),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_said_before_the_model_is_loaded(
    cast_train, llama_dir, text_file, tmp_path, monkeypatch, words, message
):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    for name in ("AutoModelForCausalLM.from_pretrained", "AutoModelForCausalLM.from_config"):
        monkeypatch.setattr(f"cast_train.checkpoint.models.{name}", load)
    for name in ("tensorboard", "torch.utils.tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "text").write_bytes(text_file.read_bytes())
    (tmp_path / "bad.toml").write_text('include = ["("]')
    command, *rest = words.split()
    model = [] if command == "eval" else ["--model", llama_dir]
    done = cast_train(command, *model, "--text", text_file, *rest)
    assert done.exit_code == 2, done.output
    assert message.format(tmp_path=tmp_path) in " ".join(done.stderr.split())
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bad.toml"}


def test_a_result_of_other_settings_is_named_before_the_text_is_read(
    cast_train, llama_dir, text_file, settings_file, tmp_path, monkeypatch
):
    words = ("run", "--model", llama_dir, "--text", text_file, "--config", settings_file)
    last_json(cast_train(*words, "--out", "out", "--steps", 1))
    (tmp_path / "new.partial").mkdir()
    record = json.loads(Path("out/cast.json").read_text())
    (tmp_path / "new.partial/run.json").write_text(json.dumps(record))

    def read(*_):
        raise AssertionError("the text was read")

    monkeypatch.setattr("cast_train.training.run.read_blocks", read)
    for out, is_what in (("out", "out exists and is another run"), ("new", "is another run")):
        done = cast_train(*words, "--out", out, "--steps", 2, "--resume")
        assert done.exit_code == 2
        assert f"{is_what} (config.steps is 1, not 2)" in " ".join(done.stderr.split())


def test_help_is_there_without_torch():
    code = "import sys; from cast_train.__main__ import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    help_ = subprocess.run(
        [sys.executable, "-m", "cast_train", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in help_.stdout for command in ("run", "eval", "oneshot"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("run --text a b --out c", "run --text a --text b --out c"),
        ("eval d --text a", "eval d --text a"),
        ("run --text a --text b --resume", "run --text a --text b --resume"),
        ("run --text --out c", "run --text --out c"),
    ],
)
def test_text_takes_several_files(given, expected):
    assert repeat_text_flag(given.split()) == expected.split()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StoppedError("stopped after step 3"), "cast-train: stopped after step 3"),
        (KeyboardInterrupt(), "cast-train: stopped; nothing was saved since"),
    ],
)
def test_a_stop_is_told_in_one_line(error, message, cast_train, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("cast_train.training.run.train", stop)
    done = cast_train("run", "--model", tmp_path, "--text", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
