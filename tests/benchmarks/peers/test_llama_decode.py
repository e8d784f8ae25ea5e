"""llama.cpp's own decode as a process that is asked by lines; its library is a fake here."""

import math
import re
from pathlib import Path

import pytest

from benchmarks.peers import files, process
from benchmarks.peers.names import PeerError
from tests.benchmarks.peers import fake_llama_cpp

pytestmark = pytest.mark.usefixtures("fake_library")


def logged(decode: process.Process, word: str) -> list[str]:
    lines = decode.log.read_text().splitlines()
    return [line.removeprefix(word) for line in lines if line.startswith(word)]


def test_it_writes_greedily_from_one_batch_and_from_an_empty_context(
    decode: process.Process,
) -> None:
    for prompt, num_tokens in (("Hello, Wörld", 5), ("Hello, Wörld", 5), ("Hi", 1)):
        answer = decode.answer(prompts=[prompt], output_tokens=num_tokens)
        assert answer["tokens"] == [fake_llama_cpp.answer_of(prompt, num_tokens)]
        assert answer["prompt_tokens"] == [len(prompt.encode())]
        assert len(answer["times_s"]) == num_tokens
        assert answer["times_s"] == sorted(answer["times_s"])
        assert answer["core_share"] > 0
    assert logged(decode, "batch: ") == ["13", *"1111", "13", *"1111", "2"]
    assert decode.prompt_tokens("Hello") == 5
    assert decode.about == "FAKE = 1"
    assert (decode.weight_bytes, decode.is_ours) == (4, False)


def test_a_timing_has_every_token(decode: process.Process) -> None:
    timing = decode.ask("Hello", 4)
    assert (timing.output_tokens, len(timing.token_events_s)) == (4, 4)
    assert timing.ttft_s is not None
    assert timing.tpot_s is not None
    assert len(decode.core_shares) == 1
    assert timing.e2e_s == pytest.approx(timing.ttft_s + 3 * timing.tpot_s)


def test_several_prompts_at_once_are_answered_as_each_alone(decode: process.Process) -> None:
    prompts = ["Hello", "Hi, Wörld", "a"]
    answer = decode.answer(prompts=prompts, output_tokens=4)
    assert answer["tokens"] == [fake_llama_cpp.answer_of(prompt, 4) for prompt in prompts]
    assert len(answer["times_s"]) == 4
    assert logged(decode, "batch: ") == ["5", "10", "1", *"333"]
    assert decode.ask_at_once(prompts, 2) > 0
    with pytest.raises(PeerError, match="ended with 1"):
        decode.ask_at_once([*prompts, "b"], 2)
    assert "4 prompts, but --sequences 3" in decode.log.read_text()


def test_the_likelihood_of_a_block_leaves_out_its_first_token(decode: process.Process) -> None:
    """Logits are 1 for the sum of the tokens before, else 0: 7 follows 7, and 5 does not."""
    norm = math.log(math.e + fake_llama_cpp.NUM_VOCAB - 1)
    assert decode.nats_of([7, 7]) == pytest.approx(norm - 1)
    assert decode.nats_of([7, 5, 12]) == pytest.approx(2 * norm - 1)
    assert decode.nats_of([9]) == 0.0
    with pytest.raises(PeerError, match="ended with 1"):
        decode.nats_of([1] * 257)
    assert "a block of 257 tokens, but --context 256" in decode.log.read_text()


@pytest.mark.parametrize(("name", "kind"), [("q8_0:native", 0), ("q8_0:native+fa", 1)])
def test_its_name_says_whether_with_flash_attention(
    model: Path, core: int, name: str, kind: int
) -> None:
    with process.running(name, model, [core], 64, 2) as decode:
        found = logged(decode, "params: ")
    assert len(found) == 1
    assert f"('flash_attn_type', {kind})" in found[0]
    for key, value in {"n_ctx": 128, "n_seq_max": 2, "n_batch": 64, "n_threads": 1}.items():
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
    decode: process.Process, prompt: str, num_tokens: int, message: str
) -> None:
    decode.ask("a" * 250, 7)  # just fits
    for _ in range(2):  # and what is asked after that
        with pytest.raises(PeerError, match=re.escape(f"ended with 1; see {decode.log}")):
            decode.ask(prompt, num_tokens)
    assert message in decode.log.read_text()


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, core: int) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"GGUF")
    with (
        pytest.raises(PeerError, match=r"q8_0:native ended with 1; see .*q8_0:native\.log"),
        process.running("q8_0:native", model, [core], 64),
    ):
        pass
    assert "llama.cpp cannot load" in (files.WORK / "q8_0:native.log").read_text()
