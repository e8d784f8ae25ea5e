"""vLLM's sampling on CPUs -> the same without two faults that vLLM 0.32 has there."""

from functools import wraps
from typing import Any

import numpy as np
from torch import Tensor


def mend_sampling(runner: Any) -> None:
    """Mends it for one of vLLM's model runners, in this process.

    Without Triton, vLLM discards what its rejection sampling's `expand_kernel` computes (its
    #55005): once a request of a step has a temperature, all of them, greedy ones too, get one from
    uninitialised memory, as they do top_k and top_p, or the engine ends. That is to be removed
    once `_expand_kernel_impl` of cpu_triton_utils.py writes `output`.

    Args:
        runner: on a CPU, its model loaded.
    """
    if runner.speculative_config is not None:
        from vllm.triton_utils.dispatcher import KernelOverride
        from vllm.v1.sample.rejection_sampler import _expand

        # As `register_kernels` would, which fails where ngram has imported numba.
        _expand.kernel = KernelOverride(_expand.kernel, expand)
        vars(_expand).pop("_kernel_arg_names", None)
    if hasattr(runner, "_bookkeeping_sync"):
        seed_again(runner)


def expand(
    output: Tensor,
    values: Tensor,
    ends: Tensor,
    replace_from: float,
    replace_to: float,
    max_num_tokens: int,
) -> None:
    """Repeats each request's value for each token that was proposed for it.

    Args:
        output: [num_tokens], of the dtype of `values`; written.
        values: [num_requests].
        ends: [num_requests], integers, where the tokens of each request end in `output`.
        replace_from: value that is written as `replace_to`.
        max_num_tokens: of a request; unused.
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts))


def seed_again(runner: Any) -> None:
    """Has a seeded request begin at its seed again after each part of a long prompt.

    A step that reads part of a prompt samples a token too, and discards it. To take that back,
    vLLM lowers the offset of the request's generator; a CPU's has none, and the engine ends. What
    a preempted request draws when it is read again is not taken back.
    """
    keep_books = runner._bookkeeping_sync

    @wraps(keep_books)
    def without_offsets(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        is_discarded = runner.discard_request_mask.np[: batch.num_reqs]
        places = [int(i) for i in np.flatnonzero(is_discarded) if int(i) in batch.generators]
        generators = {place: batch.generators.pop(place) for place in places}
        for place, generator in generators.items():
            request = runner.requests[batch.req_ids[place]]
            if not request.output_token_ids:
                generator.manual_seed(request.sampling_params.seed)
        try:
            return keep_books(*args, **kwargs)
        finally:
            batch.generators.update(generators)

    runner._bookkeeping_sync = without_offsets
