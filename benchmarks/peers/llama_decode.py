"""A GGUF file -> llama.cpp's own decode without a server, asked by JSON lines on stdin.

Runs in the environment of llama-cpp-python, started by process.py; imports nothing of this project.
Greedy, no sampler: the next token is the argmax of the logits.

    stdout, once the model is loaded:
        {"about": llama.cpp's line about its build and this CPU}
    stdin, a line each:
        {"prompts": [TEXT, ...], "output_tokens": NUMBER}
        {"blocks": [[TOKEN, ...], ...]}
    stdout, a line for each:
        {"prompt_tokens": [of each], "tokens": [[of each answer], ...],
         "times_s": [when a token of every answer was known, ...],
         "core_share": how much of that time, times threads, this process had}
        {"nats": [the negative log likelihood of each block, without its first token]}

Prompts are read one after the other, each as one batch; then a batch has the next token of every
answer. Times count from the call that reads the first prompt; the text was made tokens before, and
the cache emptied. A token that would end the text does not end the answer. What llama.cpp logs
goes to stderr; anything that fails is a traceback there and exit code 1.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # only in the other environment
import numpy as np  # which llama-cpp-python needs itself


class Decoder:
    """A model, and a context of some sequences.

    Args:
        path: of the GGUF file.
        num_context: tokens that a sequence holds, prompt and answer.
        num_sequences: most prompts at once.
        num_threads: that compute.
        use_flash_attention: else llama.cpp's attention in separate steps.

    Raises:
        RuntimeError: if llama.cpp cannot load the file or make the context.
    """

    def __init__(
        self,
        path: str,
        num_context: int,
        num_sequences: int,
        num_threads: int,
        use_flash_attention: bool,
    ) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}; its log is above")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_context * num_sequences
        params.n_batch = params.n_ubatch = num_context
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if use_flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._num_context, self._num_threads = num_context, num_threads
        self._num_sequences = num_sequences
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._batch = llama_cpp.llama_batch_init(num_context, 0, 1)

    def answers(self, prompts: Sequence[str], output_tokens: int) -> dict[str, Any]:
        """Reads prompts and writes exactly so many tokens for each; see the module.

        Raises:
            RuntimeError: if they do not fit into the context, or llama.cpp's call fails.
        """
        if len(prompts) > self._num_sequences:
            raise RuntimeError(f"{len(prompts)} prompts, but --sequences {self._num_sequences}")
        read = [self._tokenize(prompt) for prompt in prompts]
        for tokens in read:
            if len(tokens) + output_tokens - 1 > self._num_context:
                raise RuntimeError(
                    f"{len(tokens)} tokens of prompt and {output_tokens} of output do not fit into "
                    f"a context of {self._num_context}; give a larger --context"
                )
        self._clear()
        answers: list[list[int]] = []
        began_cpu_s, began_s = time.process_time(), time.perf_counter()
        for sequence, tokens in enumerate(read):
            places = [(token, place, sequence) for place, token in enumerate(tokens)]
            self._decode(places, {len(places) - 1})
            answers.append([self._likeliest(len(places) - 1)])
        times_s = [time.perf_counter() - began_s]
        while len(times_s) < output_tokens:
            places = [
                (answer[-1], len(read[sequence]) + len(answer) - 1, sequence)
                for sequence, answer in enumerate(answers)
            ]
            self._decode(places, set(range(len(places))))
            for index, answer in enumerate(answers):
                answer.append(self._likeliest(index))
            times_s.append(time.perf_counter() - began_s)
        return {
            "prompt_tokens": [len(tokens) for tokens in read],
            "tokens": answers,
            "times_s": times_s,
            "core_share": (time.process_time() - began_cpu_s) / times_s[-1] / self._num_threads,
        }

    def nats(self, block: Sequence[int]) -> float:
        """The negative log likelihood of a block of tokens, without its first.

        Raises:
            RuntimeError: if it does not fit into the context, or llama.cpp's call fails.
        """
        if len(block) > self._num_context:
            raise RuntimeError(f"a block of {len(block)} tokens, but --context {self._num_context}")
        self._clear()
        places = [(token, place, 0) for place, token in enumerate(block)]
        self._decode(places, set(range(len(block) - 1)))
        total = 0.0
        for index, token in enumerate(block[1:]):
            logits = self._logits(index).astype(np.float64)
            total += float(np.logaddexp.reduce(logits) - logits[token])
        return total

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def _tokenize(self, prompt: str) -> list[int]:
        text = prompt.encode()
        tokens = (llama_cpp.llama_token * self._num_context)()
        found = llama_cpp.llama_tokenize(
            self._vocab, text, len(text), tokens, self._num_context, True, True
        )
        if found < 1:
            raise RuntimeError(
                f"the prompt has {-found} tokens, but the context takes 1 to {self._num_context}"
            )
        return list(tokens[:found])

    def _decode(self, places: Sequence[tuple[int, int, int]], wanted: set[int]) -> None:
        """Runs the model on (token, position, sequence) of each; logits for the wanted indices."""
        batch = self._batch
        batch.n_tokens = len(places)
        for index, (token, position, sequence) in enumerate(places):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index in wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _logits(self, index: int) -> Any:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._num_vocab,)
        )

    def _likeliest(self, index: int) -> int:
        return int(self._logits(index).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--context", type=int, default=2048, help="tokens, prompt and answer")
    parser.add_argument("--sequences", type=int, default=1, help="most prompts at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flash-attention", action="store_true")
    args = parser.parse_args()
    decoder = Decoder(args.model, args.context, args.sequences, args.threads, args.flash_attention)
    print(json.dumps({"about": llama_cpp.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "blocks" in request:
            answer = {"nats": [decoder.nats(block) for block in request["blocks"]]}
        else:
            answer = decoder.answers(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
