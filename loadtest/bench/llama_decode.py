"""A GGUF file -> llama.cpp's own decode without a server, asked by JSON lines on stdin.

Runs in the environment of llama-cpp-python, started by loadtest/bench/llama.py; imports nothing of
this project. One thread, greedy, no sampler: the next token is the argmax of the logits.

    stdout, once the model is loaded:
        {"system_info": llama.cpp's line about its build and this CPU}
    stdin, a line each:
        {"prompt": TEXT, "output_tokens": NUMBER}
    stdout, a line for each:
        {"prompt_tokens": NUMBER, "tokens": [the answer's], "times_s": [when each was known],
         "core_share": how much of that time this process had the core}

Times count from the call that reads the prompt, which is one batch; the text was made tokens
before, and the cache emptied. A token that would end the text does not end the answer. What
llama.cpp logs goes to stderr; anything that fails is a traceback there and exit code 1.
"""

import argparse
import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # only in the other environment
import numpy as np  # which llama-cpp-python needs itself


class Decoder:
    """A model, and a context of one sequence.

    Args:
        path: of the GGUF file.
        num_context: tokens that the context holds, prompt and answer.
        use_flash_attention: else llama.cpp's attention in separate steps.

    Raises:
        RuntimeError: if llama.cpp cannot load the file or make the context.
    """

    def __init__(self, path: str, num_context: int, use_flash_attention: bool) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}; its log is above")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = num_context
        params.n_seq_max = params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if use_flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {num_context} tokens")
        self._num_context = num_context
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def answer(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """Reads a prompt and writes exactly so many tokens; what is returned: see the module.

        Raises:
            RuntimeError: if they do not fit into the context, or llama.cpp's call fails.
        """
        tokens, prompt_tokens = self._tokenize(prompt)
        if prompt_tokens + output_tokens - 1 > self._num_context:
            raise RuntimeError(
                f"{prompt_tokens} tokens of prompt and {output_tokens} of output do not fit into "
                f"a context of {self._num_context}; give a larger --context"
            )
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        answer, times_s = [], []
        began_cpu_s, began_s = time.process_time(), time.perf_counter()
        token = self._next(llama_cpp.llama_batch_get_one(tokens, prompt_tokens))
        answer.append(token)
        times_s.append(time.perf_counter() - began_s)
        last = (llama_cpp.llama_token * 1)()
        while len(answer) < output_tokens:
            last[0] = token
            token = self._next(llama_cpp.llama_batch_get_one(last, 1))
            answer.append(token)
            times_s.append(time.perf_counter() - began_s)
        return {
            "prompt_tokens": prompt_tokens,
            "tokens": answer,
            "times_s": times_s,
            "core_share": (time.process_time() - began_cpu_s) / times_s[-1],
        }

    def _tokenize(self, prompt: str) -> tuple["ctypes.Array[Any]", int]:
        text = prompt.encode()
        tokens = (llama_cpp.llama_token * self._num_context)()
        found = llama_cpp.llama_tokenize(
            self._vocab, text, len(text), tokens, self._num_context, True, True
        )
        if found < 1:
            raise RuntimeError(
                f"the prompt has {-found} tokens, but the context takes 1 to {self._num_context}"
            )
        return tokens, found

    def _next(self, batch: Any) -> int:
        """Runs the model on a batch; the likeliest token after its last one."""
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._num_vocab,)).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--context", type=int, default=2048, help="tokens, prompt and answer")
    parser.add_argument("--flash-attention", action="store_true")
    args = parser.parse_args()
    decoder = Decoder(args.model, args.context, args.flash_attention)
    print(json.dumps({"system_info": llama_cpp.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decoder.answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
