"""A peer's name -> llama.cpp with a file of that type: its Python server, or its own decode.

A name is TYPE, TYPE:native or TYPE:native+fa:

    q8_0            llama-cpp-python's OpenAI server
    q8_0:native     llama.cpp's own decode in a process of its own, without a server
    q8_0:native+fa  the same with flash attention

The files are of a given directory of Llama's layout, or of SmolLM2-135M: the 4-bit file that
scripts/data makes the demo's dense model of, and what llama.cpp's own quantiser makes of that file.
So bf16 has the dense model's weights, and the others are rounded twice: a measure of speed, not of
what their bits keep. Where a row is no multiple of 256 weights, which is most of this model, the
quantiser takes q5_0 and q8_0 for q4_k_m's types; `weights_by_type` tells.

llama.cpp is built from source into build/llama-cpp on the first run (20 minutes on one core).
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_serve.latency import RequestTiming

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "llama-cpp-python[server]==0.3.36"
PYTHON = ROOT / "build/llama-cpp/bin/python"
WORK = ROOT / "build/peers"
WORKER = Path(__file__).with_name("llama_decode.py")
SOURCE = "q4_1"  # the type of the file that the others are made of
FTYPES = {
    "q4_0": "MOSTLY_Q4_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q8_0": "MOSTLY_Q8_0",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
}
TYPES = (SOURCE, *FTYPES)
WAYS = {  # what stands after the colon -> the title
    "": "llama.cpp's server, {}",
    "native": "llama.cpp's decode, {}",
    "native+fa": "llama.cpp's decode, {}, flash attention",
}
ALL_BUT_F16 = ",".join(
    f"{name}:{way}" if way else name for name in TYPES if name != "f16" for way in WAYS
)
QUANTISE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.allow_requantize = 1, True
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


class PeerError(RuntimeError):
    """A server, or what it needs, failed; the message names the log."""


@dataclass(frozen=True)
class Decode:
    """llama.cpp's own decode of one model in a process of its own (loadtest/bench/llama_decode.py).

    Attributes:
        name: as in --peers.
        title: for people.
        weight_bytes: of the file.
        system_info: llama.cpp's line about its build and this CPU.
        process: reads and writes JSON lines.
        log: what it writes to stderr.
        core_shares: how much of its time the process had the core, by request.
        is_ours: no.
    """

    name: str
    title: str
    weight_bytes: int
    system_info: str
    process: "subprocess.Popen[str]"
    log: Path
    core_shares: list[float] = field(default_factory=list)
    is_ours: bool = False

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens it takes the prompt for.

        Raises:
            PeerError: if the process ends.
        """
        return int(self.answer(prompt, 1)["prompt_tokens"])

    def ask(self, prompt: str, num_tokens: int) -> RequestTiming:
        """Writes exactly so many tokens; timed inside the process, from its reading of the prompt.

        Raises:
            PeerError: if the process ends.
        """
        answer = self.answer(prompt, num_tokens)
        self.core_shares.append(answer["core_share"])
        times_s = tuple(answer["times_s"])
        return RequestTiming(0.0, times_s, times_s[-1], len(times_s))

    def answer(self, prompt: str, num_tokens: int) -> dict[str, Any]:
        """One request's answer; its keys as in loadtest/bench/llama_decode.py.

        Raises:
            PeerError: if the process ends.
        """
        assert self.process.stdin is not None
        request = {"prompt": prompt, "output_tokens": num_tokens}
        with suppress(BrokenPipeError):  # then nothing can be read either
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return _read_line(self.name, self.process, self.log)


def parse(name: str) -> tuple[str, str]:
    """A peer's name -> the file's type, and one of `WAYS`.

    Raises:
        PeerError: if either is not known.
    """
    kind, _, way = name.partition(":")
    if kind not in TYPES:
        raise PeerError(f"{kind!r} is no type of peer; choose from {', '.join(TYPES)}")
    if way not in WAYS or name.endswith(":"):
        raise PeerError(f"peer {name!r} is not known; write TYPE, TYPE:native or TYPE:native+fa")
    return kind, way


def title_of(name: str) -> str:
    """The peer's name for people."""
    kind, way = parse(name)
    return WAYS[way].format(kind)


def install() -> None:
    """Builds llama-cpp-python in an environment of its own, unless it is there.

    Raises:
        PeerError: if that fails.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    environment = PYTHON.parent.parent
    if not PYTHON.exists():
        _call(sys.executable, "-m", "venv", environment)
    if not list(environment.glob("lib/*/site-packages/llama_cpp")):
        _call(PYTHON, "-m", "pip", "install", PACKAGE)


def file_of(kind: str, model: Path | None = None) -> Path:
    """A model's file of that type; it is fetched or made if it is not there.

    Args:
        kind: of `TYPES`.
        model: a directory of Llama's layout; None: the demo's model.

    Raises:
        PeerError: if that fails, or the type is not known.
    """
    parse(kind)
    source, prefix = SOURCE, ""
    if model is not None:
        source, prefix = "f16", "-".join(model.resolve().parts[-2:]) + "-"
    path = WORK / f"{prefix}{kind}.gguf"
    if path.exists():
        return path
    new = path.with_suffix(".new")
    if kind != source and kind == SOURCE:
        raise PeerError(f"{kind} is made by llama.cpp of no other type; leave it out")
    if kind != source:
        _call(PYTHON, "-c", QUANTISE, file_of(source, model), new, FTYPES[kind])
    elif model is not None:
        _write_gguf(model, new)
    else:
        _call(sys.executable, ROOT / "scripts/data", "--gguf", new)
    new.rename(path)
    return path


def _write_gguf(model: Path, out: Path) -> None:
    """Writes a directory of Llama's layout, with tied embeddings, as fp16.

    llama.cpp rotates neighbouring rows of q_proj and k_proj, transformers the halves of a head.

    Raises:
        PeerError: if it is of another layout.
    """
    import gguf
    import numpy as np
    from transformers import AutoTokenizer

    from cast_serve.checkpoint.directory import ModelDirectory

    directory = ModelDirectory(model)
    config = directory.config
    if config.get("model_type") != "llama" or not config.get("tie_word_embeddings"):
        raise PeerError(f"{model} is no model of type llama with tied embeddings; give another")
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config["vocab_size"])))
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    if config["eos_token_id"] is not None:
        writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    num_heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name in directory.files:
        weight = directory.get(name).float().numpy()
        if (linear := name.split(".")[-2]) in num_heads:
            halves = weight.reshape(config[num_heads[linear]], 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        dtype = np.float32 if weight.ndim == 1 else np.float16
        writer.add_tensor(names.get_name(name, (".weight",)), weight.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_by_type(path: Path) -> dict[str, int]:
    """How many weights a GGUF file has of each type, most first."""
    import gguf  # reading it needs the file, and who only asks for times has none

    counts: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(counts.most_common())


@contextmanager
def decoding(name: str, model: Path, core: int, num_context: int) -> Iterator[Decode]:
    """Runs llama.cpp's own decode of a GGUF file on the core.

    Args:
        name: the peer's, which says whether with flash attention.
        model: the file.
        core: the CPU it may use.
        num_context: tokens that it holds, prompt and answer.

    Raises:
        PeerError: if the process ends before the model is loaded.
    """
    log = WORK / f"{name}.log"
    words = ["taskset", "-c", str(core), str(PYTHON), str(WORKER), str(model)]
    words += ["--context", str(num_context)]
    if parse(name)[1] == "native+fa":
        words += ["--flash-attention"]
    print("$", *words, file=sys.stderr)
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    with process:
        try:
            info = str(_read_line(name, process, log)["system_info"])
            yield Decode(name, title_of(name), model.stat().st_size, info, process, log)
        finally:
            process.terminate()
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # a request that a dead process did not take
                process.stdin.close()


def _read_line(name: str, process: "subprocess.Popen[str]", log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise PeerError(f"{name} ended with {process.wait()}; see {log}")
    return dict(json.loads(line))


def _call(*command: object) -> None:
    words, log = [str(word) for word in command], WORK / "setup.log"
    print("$", " ".join(words)[:90], file=sys.stderr)
    with log.open("ab") as file:
        if subprocess.run(words, stdout=file, stderr=file).returncode:
            raise PeerError(f"this failed; see {log}")
