"""What is mended in vLLM's sampling on CPUs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cast_serve.engine import sampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_each_requests_value_is_repeated(dtype: torch.dtype) -> None:
    values = torch.tensor([0.7, 0, 5], dtype=dtype)
    output = torch.full((5,), -1, dtype=dtype)
    sampling.expand(output, values, torch.tensor([2, 4, 5], dtype=torch.int32), 0, 1, 32)
    first = 0.7 if dtype.is_floating_point else 1
    assert torch.equal(output, torch.tensor([first, first, 1, 1, 5], dtype=dtype))


# What vLLM's own imports warn of, and its search for the function in every module.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_vllms_sampling_gets_what_it_expands() -> None:
    """Once it does so without `mend_sampling`, that can be removed."""
    pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        pytest.skip("vLLM's function for GPUs is right")
    current_platform.register_triton_kernel_overrides()
    sampling.mend_sampling(SimpleNamespace(speculative_config={}))
    temperature, ends = torch.tensor([0.7, 0.0, 2.0]), torch.tensor([1, 3, 4], dtype=torch.int32)
    found = rejection_sampler.expand_batch_to_tokens(temperature, ends, 4, 0, 1)
    assert torch.equal(found, torch.tensor([0.7, 1, 1, 2]))


def test_a_prompt_in_parts_leaves_the_seed_as_it_was() -> None:
    """vLLM's own bookkeeping would move the offset of every generator that it finds."""

    def request(seed: int, *tokens: int) -> SimpleNamespace:
        params = SimpleNamespace(seed=seed)
        return SimpleNamespace(sampling_params=params, output_token_ids=list(tokens))

    generators = {place: torch.Generator().manual_seed(place) for place in (0, 1, 3)}
    fresh = {place: one.get_state() for place, one in generators.items()}
    for one in generators.values():
        torch.rand(1, generator=one)
    drawn = {place: one.get_state() for place, one in generators.items()}
    found = []

    def keep_books(name: str) -> str:
        found.append(dict(runner.input_batch.generators))
        return name

    runner = SimpleNamespace(
        speculative_config=None,
        input_batch=SimpleNamespace(
            num_reqs=4, generators=dict(generators), req_ids=["a", "b", "c", "d"]
        ),
        discard_request_mask=SimpleNamespace(np=np.array([True, False, True, True, True])),
        requests={"a": request(0), "b": request(1), "c": request(2), "d": request(3, 7)},
        _bookkeeping_sync=keep_books,
    )
    sampling.mend_sampling(runner)
    assert runner._bookkeeping_sync("step") == "step"
    assert found == [{1: generators[1]}]
    assert runner.input_batch.generators == generators
    assert torch.equal(generators[0].get_state(), fresh[0])
    for place in (1, 3):  # one sampled what it keeps, the other had written a token before
        assert torch.equal(generators[place].get_state(), drawn[place])
