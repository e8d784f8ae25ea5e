"""A model -> files of llama.cpp's types, and the environments of the libraries that run them.

The files are of a given directory of Llama's layout, of a given GGUF file, or of SmolLM2-135M: the
4-bit file that scripts/data makes the demo's dense model of, and what llama.cpp's own quantiser
makes of that file. So bf16 has the dense model's weights, and the others are rounded twice, as are
those of a given file of few bits. Where a row is no multiple
of 256 weights, which is most of this model, the quantiser takes q5_0 and q8_0 for q4_k_m's types;
`weights_by_type` tells.

llama.cpp is built from source into build/llama-cpp on the first run (20 minutes on one core),
OpenVINO GenAI is installed into build/openvino.
"""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.peers.names import FTYPES, GIVEN, SOURCE, PeerError, check_kind, parse
from cast_serve.checkpoint.record import sha256

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"llama": "llama-cpp-python==0.3.36", "openvino": "openvino-genai==2026.4.1.0"}
MODULES = {"llama": "llama_cpp", "openvino": "openvino_genai"}
PYTHONS = {
    "llama": ROOT / "build/llama-cpp/bin/python",
    "openvino": ROOT / "build/openvino/bin/python",
}
WORK = ROOT / "build/peers"
QUANTISE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.allow_requantize = 1, True
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def install(names: Iterable[str]) -> None:
    """Installs what the peers need in environments of their own, unless it is there.

    llama.cpp is needed for every peer, as its quantiser makes the files.

    Raises:
        PeerError: if that fails.
    """
    ways = [parse(name)[1] for name in names]
    WORK.mkdir(parents=True, exist_ok=True)
    for library in ["llama"] * bool(ways) + ["openvino"] * ("openvino" in ways):
        environment = PYTHONS[library].parent.parent
        if not PYTHONS[library].exists():
            _call(sys.executable, "-m", "venv", environment)
        if not list(environment.glob(f"lib/*/site-packages/{MODULES[library]}")):
            _call(PYTHONS[library], "-m", "pip", "install", PACKAGES[library])


def file_of(kind: str, model: Path | None = None) -> Path:
    """A model's file of that type; it is fetched or made if it is not there.

    Args:
        kind: of `names.TYPES`.
        model: a directory of Llama's layout, or a GGUF file; None: the demo's model.

    Raises:
        PeerError: if that fails, or the type is not known.
    """
    check_kind(kind)
    source, prefix = SOURCE, ""
    if model is not None:
        source = GIVEN if model.is_file() else "f16"
        prefix = f"{model.name}-{_digest(model)}-"
    if kind == GIVEN:
        if model is None or source != GIVEN:
            raise PeerError(f"{kind} is the very file that is given; give --peers-of FILE.gguf")
        return model
    path = WORK / f"{prefix}{kind}.gguf"
    if path.exists():
        return path
    new = path.with_suffix(".new")
    if kind != source and kind == SOURCE:
        raise PeerError(f"{kind} is made by llama.cpp of no other type; leave it out")
    if kind != source:
        _call(PYTHONS["llama"], "-c", QUANTISE, file_of(source, model), new, FTYPES[kind])
    elif model is not None:
        _write_gguf(model, new)
    else:
        _call(sys.executable, ROOT / "scripts/data", "--gguf", new)
    new.rename(path)
    return path


def _digest(model: Path) -> str:
    """Of the files that a model's file is made of: a model trained again has another."""
    files = [*sorted(model.glob("*.safetensors")), model / "config.json"]
    if model.is_file():
        files = [model]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:12]


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
        raise PeerError(f"{model} is not a model of type llama with tied embeddings; give another")
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


def show(words: Sequence[str]) -> None:
    """Prints a command that is going to run to stderr, at most 90 characters of it."""
    print("$", " ".join(words)[:90], file=sys.stderr)


def _call(*command: object) -> None:
    words, log = [str(word) for word in command], WORK / "setup.log"
    show(words)
    with log.open("ab") as file:
        if subprocess.run(words, stdout=file, stderr=file).returncode:
            raise PeerError(f"this failed; see {log}")
