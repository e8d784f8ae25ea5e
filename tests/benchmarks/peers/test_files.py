"""Files of llama.cpp's types, made of a directory."""

import json
import re
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import files
from benchmarks.peers.names import PeerError

pytestmark = pytest.mark.usefixtures("fake_library")


def test_set_up_that_fails_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files.PYTHONS, "llama", Path(sys.executable))
    (files.WORK / "q4_1.gguf").write_bytes(b"")
    with pytest.raises(PeerError, match=re.escape(f"failed; see {files.WORK / 'setup.log'}")):
        files.file_of("q8_0")  # the fake library has no quantiser
    assert "llama_model_quantize_default_params" in (files.WORK / "setup.log").read_text()


def test_a_directory_becomes_a_file_with_its_weights(llama_dir: Path) -> None:
    """Read back, and q_proj's rows are in llama.cpp's order: halves of a head interleaved."""
    config = json.loads((llama_dir / "config.json").read_text())
    path = files.file_of("f16", llama_dir)
    assert path.parent == files.WORK
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    weights = load_file(llama_dir / "model.safetensors")
    assert len(tensors) == len(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = weights[name].to(torch.float16).numpy()
    assert (tensors["blk.1.ffn_down.weight"] == expected).all()
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    q_proj = weights["model.layers.0.self_attn.q_proj.weight"].to(torch.float16).numpy()
    assert (tensors["blk.0.attn_q.weight"][0] == q_proj[0]).all()
    assert (tensors["blk.0.attn_q.weight"][1] == q_proj[half]).all()
    assert files.file_of("f16", llama_dir) == path  # made once
    again = Path(shutil.copytree(llama_dir, files.WORK / llama_dir.name))
    assert files.file_of("f16", again) == path  # of the same weights
    weights[name][0, 0] += 1
    save_file(weights, again / "model.safetensors", metadata={"format": "pt"})
    assert files.file_of("f16", again) != path  # it was trained again


def test_only_llamas_become_files(llama_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeerError, match="is not a model of type llama with tied embeddings"):
        files.file_of("f16", other)
    with pytest.raises(PeerError, match="q4_1 is made by llama.cpp of no other type"):
        files.file_of("q4_1", other)


def test_a_given_file_is_taken_as_it_is(llama_dir: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.gguf"
    given.write_bytes(b"GGUF")
    assert files.file_of("file", given) == given
    for other in (None, llama_dir):
        with pytest.raises(PeerError, match="give --peers-of FILE.gguf"):
            files.file_of("file", other)
