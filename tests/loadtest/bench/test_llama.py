"""llama.cpp's own decode as a process that is asked by lines; its library is a fake here."""

import json
import re
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from loadtest.bench import llama
from tests.cast_train.conftest import llama_dir
from tests.loadtest.bench import fake_llama_cpp

__all__ = ["llama_dir"]

pytestmark = pytest.mark.usefixtures("fake_library")


def logged(decode: llama.Decode, word: str) -> list[str]:
    lines = decode.log.read_text().splitlines()
    return [line.removeprefix(word) for line in lines if line.startswith(word)]


def test_it_writes_greedily_from_one_batch_and_from_an_empty_context(decode: llama.Decode) -> None:
    for prompt, num_tokens in (("Hello, Wörld", 5), ("Hello, Wörld", 5), ("Hi", 1)):
        answer = decode.answer(prompt, num_tokens)
        assert answer["tokens"] == fake_llama_cpp.answer_of(prompt, num_tokens)
        assert answer["prompt_tokens"] == len(prompt.encode())
        assert len(answer["times_s"]) == num_tokens
        assert answer["times_s"] == sorted(answer["times_s"])
        assert answer["core_share"] > 0
    assert logged(decode, "batch: ") == ["13", *"1111", "13", *"1111", "2"]
    assert decode.prompt_tokens("Hello") == 5
    assert decode.system_info == "FAKE = 1"
    assert (decode.weight_bytes, decode.is_ours) == (4, False)


def test_a_timing_has_every_token(decode: llama.Decode) -> None:
    timing = decode.ask("Hello", 4)
    assert (timing.output_tokens, len(timing.token_events_s)) == (4, 4)
    assert timing.ttft_s is not None
    assert timing.tpot_s is not None
    assert len(decode.core_shares) == 1
    assert timing.e2e_s == pytest.approx(timing.ttft_s + 3 * timing.tpot_s)


@pytest.mark.parametrize(("name", "kind"), [("q8_0:native", 0), ("q8_0:native+fa", 1)])
def test_its_name_says_whether_with_flash_attention(
    tmp_path: Path, core: int, name: str, kind: int
) -> None:
    model = tmp_path / "q8_0.gguf"
    model.write_bytes(b"GGUF")
    with llama.decoding(name, model, core, 64) as decode:
        found = logged(decode, "params: ")
    assert len(found) == 1
    assert f"('flash_attn_type', {kind})" in found[0]
    for key, value in {"n_ctx": 64, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}.items():
        assert f"('{key}', {value})" in found[0]
    assert "('n_threads_batch', 1)" in found[0]
    assert decode.process.returncode is not None


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "message"),
    [
        ("a" * 250, 8, "250 tokens of prompt and 8 of output do not fit into a context of 256"),
        ("a" * 257, 1, "the prompt has 257 tokens, but the context takes 1 to 256"),
    ],
)
def test_a_process_that_dies_is_named_with_its_log(
    decode: llama.Decode, prompt: str, num_tokens: int, message: str
) -> None:
    decode.ask("a" * 250, 7)  # just fits
    for _ in range(2):  # and what is asked after that
        with pytest.raises(llama.PeerError, match=re.escape(f"ended with 1; see {decode.log}")):
            decode.ask(prompt, num_tokens)
    assert message in decode.log.read_text()


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, core: int) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"GGUF")
    with (
        pytest.raises(llama.PeerError, match=r"q8_0:native ended with 1; see .*q8_0:native\.log"),
        llama.decoding("q8_0:native", model, core, 64),
    ):
        pass
    assert "llama.cpp cannot load" in (llama.WORK / "q8_0:native.log").read_text()


def test_names_of_peers() -> None:
    assert llama.parse("q4_k_m") == ("q4_k_m", "")
    assert llama.parse("q8_0:native+fa") == ("q8_0", "native+fa")
    assert llama.title_of("bf16") == "llama.cpp's server, bf16"
    assert llama.title_of("bf16:native+fa") == "llama.cpp's decode, bf16, flash attention"
    assert len(llama.ALL_BUT_F16.split(",")) == 15
    for name in llama.ALL_BUT_F16.split(","):
        llama.parse(name)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(llama.PeerError, match="'q5' is no type of peer; choose from q4_1, q4_0"):
        llama.parse("q5:native")
    with pytest.raises(llama.PeerError, match="'q5' is no type of peer"):
        llama.file_of("q5")
    for name in ("q8_0:fa", "q8_0:", "q8_0:native+"):
        with pytest.raises(llama.PeerError, match=re.escape(f"{name!r} is not known; write TYPE")):
            llama.parse(name)


def test_set_up_that_fails_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "PYTHON", Path(sys.executable))
    (llama.WORK / "q4_1.gguf").write_bytes(b"")
    with pytest.raises(llama.PeerError, match=re.escape(f"failed; see {llama.WORK / 'setup.log'}")):
        llama.file_of("q8_0")  # the fake library has no quantiser
    assert "llama_model_quantize_default_params" in (llama.WORK / "setup.log").read_text()


def test_a_directory_becomes_a_file_with_its_weights(llama_dir: Path) -> None:
    """Read back, and q_proj's rows are in llama.cpp's order: halves of a head interleaved."""
    config = json.loads((llama_dir / "config.json").read_text())
    path = llama.file_of("f16", llama_dir)
    assert path == llama.WORK / f"{llama_dir.parent.name}-{llama_dir.name}-f16.gguf"
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
    assert llama.file_of("f16", llama_dir) == path  # made once


def test_only_llamas_become_files(llama_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(llama.PeerError, match="is no model of type llama with tied embeddings"):
        llama.file_of("f16", other)
    with pytest.raises(llama.PeerError, match="q4_1 is made by llama.cpp of no other type"):
        llama.file_of("q4_1", other)
