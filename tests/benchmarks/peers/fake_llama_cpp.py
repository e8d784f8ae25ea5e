"""llama_cpp's low-level calls as llama_decode.py makes them, over a model of sums.

A prompt's tokens are its bytes. The likeliest next token is the sum of all tokens so far that the
context holds of the sequence, modulo the vocabulary: its logit is 1, all others are 0. `answer_of`
tells the same without a context. What was asked is printed on stderr.
"""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

NUM_VOCAB = 31
LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED = 0, 1
llama_token = ctypes.c_int32


def answer_of(prompt: str, output_tokens: int) -> list[int]:
    tokens = list(prompt.encode())
    for _ in range(output_tokens):
        tokens.append(sum(tokens) % NUM_VOCAB)
    return tokens[-output_tokens:]


def llama_backend_init() -> None:
    pass


def llama_model_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_context_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_model_load_from_file(path: bytes, params: Any) -> str | None:
    return None if b"broken" in path else "model"


def llama_init_from_model(model: str, params: Any) -> SimpleNamespace:
    print(f"params: {sorted(vars(params).items())}", file=sys.stderr, flush=True)
    sequences: list[list[int]] = [[] for _ in range(params.n_seq_max)]
    return SimpleNamespace(sequences=sequences, num_batch=params.n_batch, logits={})


def llama_model_get_vocab(model: str) -> str:
    return "vocab"


def llama_vocab_n_tokens(vocab: str) -> int:
    return NUM_VOCAB


def llama_print_system_info() -> bytes:
    return b"FAKE = 1"


def llama_get_memory(context: SimpleNamespace) -> SimpleNamespace:
    return context


def llama_memory_clear(memory: SimpleNamespace, clears_data: bool) -> None:
    for tokens in memory.sequences:
        tokens.clear()


def llama_tokenize(
    vocab: str, text: bytes, length: int, tokens: Any, most: int, special: bool, parsed: bool
) -> int:
    assert length == len(text)
    assert special
    assert parsed
    print(f"prompt: {text.decode()!r}", file=sys.stderr, flush=True)
    if length > most:
        return -length
    tokens[:length] = text
    return length


def llama_batch_init(num_tokens: int, embedding: int, most_sequences: int) -> SimpleNamespace:
    assert (embedding, most_sequences) == (0, 1)
    numbers = {name: [0] * num_tokens for name in ("token", "pos", "n_seq_id", "logits")}
    return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(num_tokens)], **numbers)


def llama_decode(context: SimpleNamespace, batch: SimpleNamespace) -> int:
    if not 0 < batch.n_tokens <= context.num_batch:
        return -1
    print(f"batch: {batch.n_tokens}", file=sys.stderr, flush=True)
    context.logits = {}
    for index in range(batch.n_tokens):
        assert batch.n_seq_id[index] == 1
        tokens = context.sequences[batch.seq_id[index][0]]
        assert batch.pos[index] == len(tokens)
        tokens.append(batch.token[index])
        if batch.logits[index]:
            context.logits[index] = sum(tokens) % NUM_VOCAB
    return 0


def llama_get_logits_ith(context: SimpleNamespace, index: int) -> Any:
    logits = (ctypes.c_float * NUM_VOCAB)()
    logits[context.logits[index]] = 1.0
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
