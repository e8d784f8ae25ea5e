"""scripts/train-and-convert: one command from a dense model and text to a compressed checkpoint."""

import json
import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "scripts/train-and-convert"


def call(*words):
    return subprocess.run([SCRIPT, *(str(word) for word in words)], capture_output=True, text=True)


def test_trains_converts_and_goes_on_where_it_was(llama_dir, text_file, settings_file, tmp_path):
    out = tmp_path / "sparse"
    words = ("--model", llama_dir, "--text", text_file, text_file, "--out", out)
    words += ("--config", settings_file, "--steps", 3)
    done = call(*words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
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


def test_wrong_use(llama_dir, text_file, tmp_path):
    assert "are needed" in call("--model", llama_dir).stderr
    missing = call("--model", tmp_path / "no", "--text", text_file, "--out", tmp_path / "out")
    assert missing.returncode == 2
    assert str(tmp_path / "no") in missing.stderr
    assert list(tmp_path.glob("out*")) == []
