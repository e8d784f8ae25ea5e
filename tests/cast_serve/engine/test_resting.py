"""A draft that rests, against a cache that remembers which tokens its draft has read."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cast_serve.engine.resting import RestingDraft, rest

backend = pytest.importorskip("vllm.v1.attention.backend", reason="comes with vLLM")

BLOCK, STEP = 4, 8  # tokens of a block of the cache, and of a step


class Draft:
    """Stands for vLLM's proposer: a pass writes what it reads, and one token more, to a cache.

    Attributes:
        cache: the token that the draft read last, by place.
        num_read: tokens, by pass, without the one more.
    """

    block_size, max_num_tokens = BLOCK, STEP

    def __init__(self) -> None:
        self.cache: dict[int, int] = {}
        self.num_read: list[int] = []

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        next_token_ids: Tensor,
        common_attn_metadata: Any,
        **_: Any,
    ) -> Tensor:
        metadata = common_attn_metadata
        tokens, positions = target_token_ids.tolist(), target_positions.tolist()
        self.num_read.append(len(tokens))
        assert len(tokens) < STEP
        bounds = metadata.query_start_loc.tolist()
        for row, (begin, end) in enumerate(pairwise(bounds)):
            assert metadata.seq_lens[row] == positions[end - 1] + 1
            blocks = metadata.block_table_tensor[row].tolist()
            read = [*tokens[begin:end], int(next_token_ids[row])]
            for position, token in enumerate(read, positions[begin]):
                self.cache[blocks[position // BLOCK] * BLOCK + position % BLOCK] = token
        return torch.ones(metadata.num_reqs, num_speculative_tokens, dtype=torch.int64)


class Engine:
    """Steps of a served model over requests whose tokens are known beforehand.

    Attributes:
        texts: all tokens of each request, one more than it ever computes.
        blocks: of each request.
        num_computed: tokens of each request.
    """

    def __init__(self, texts: list[list[int]], blocks: Sequence[Sequence[int]]) -> None:
        self.texts, self.blocks = texts, blocks
        self.num_computed = [0] * len(texts)
        self.draft = Draft()
        self.resting = RestingDraft(self.draft, 16 * BLOCK, torch.device("cpu"))

    def step(self, num_speculative_tokens: int, num_tokens: dict[int, int]) -> Tensor:
        """Computes so many tokens of those requests."""
        firsts = {request: self.num_computed[request] for request in num_tokens}
        for request, number in num_tokens.items():
            self.num_computed[request] += number
        positions = [
            place
            for request, first in firsts.items()
            for place in range(first, self.num_computed[request])
        ]
        owners = [request for request, number in num_tokens.items() for _ in range(number)]
        both = list(zip(owners, positions, strict=True))
        bounds = torch.tensor([0, *accumulate(num_tokens.values())], dtype=torch.int32)
        metadata = backend.CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=torch.tensor([self.num_computed[r] for r in num_tokens], dtype=torch.int32),
            num_reqs=len(num_tokens),
            num_actual_tokens=len(positions),
            max_query_len=max(num_tokens.values()),
            max_seq_len=max(self.num_computed),
            block_table_tensor=torch.tensor(
                [self.blocks[request] for request in num_tokens], dtype=torch.int32
            ),
            slot_mapping=torch.tensor([self.place(*each) for each in both]),
        )
        return self.resting.propose(
            num_speculative_tokens=num_speculative_tokens,
            target_token_ids=torch.tensor([self.texts[r][p] for r, p in both], dtype=torch.int32),
            target_positions=torch.tensor(positions),
            target_hidden_states=torch.empty(0),
            next_token_ids=torch.tensor(
                [self.texts[request][self.num_computed[request]] for request in num_tokens],
                dtype=torch.int32,
            ),
            token_indices_to_sample=None,
            common_attn_metadata=metadata,
            sampling_metadata=None,
        )

    def place(self, request: int, position: int) -> int:
        return self.blocks[request][position // BLOCK] * BLOCK + position % BLOCK

    def num_known(self, request: int) -> int:
        """Tokens of the request that the draft has read, from the first without a gap."""
        for position in range(self.num_computed[request]):
            if self.draft.cache.get(self.place(request, position)) != self.texts[request][position]:
                return position
        return self.num_computed[request]


@pytest.fixture
def engine() -> Engine:
    """Two requests; the second begins with the first one's first block."""
    first, second = (list(range(start, start + 25)) for start in (100, 200))
    second[:BLOCK] = first[:BLOCK]
    return Engine([first, second], [[3, 1, 4, 5, 9, 2, 6], [3, 8, 7, 10, 11, 12, 13]])


def test_a_draft_that_always_proposes_reads_nothing_twice(engine: Engine) -> None:
    engine.step(3, {0: 6})
    assert engine.step(3, {0: 1}).shape == (1, 3)
    assert engine.draft.num_read == [6, 1]
    assert engine.num_known(0) == 7


def test_what_was_missed_is_read_before_the_next_proposal(engine: Engine) -> None:
    engine.step(3, {0: 3})
    engine.step(0, {0: 2})
    assert engine.step(0, {0: 1}).shape == (1, 0)
    assert engine.num_known(0) == 4  # with the one more
    assert engine.step(3, {0: 1}).shape == (1, 3)
    assert engine.draft.num_read == [3, 3, 1]
    assert engine.num_known(0) == 7


def test_a_long_text_is_read_a_step_at_a_time(engine: Engine) -> None:
    for _ in range(3):
        engine.step(0, {0: 6})
    for known in (8, 15, 21):
        engine.step(3, {0: 1})
        assert engine.num_known(0) == known
    assert engine.draft.num_read == [7, 1, 7, 1, 6, 1]  # of the last, two a second time
    engine.step(3, {0: 1})
    assert engine.draft.num_read[6:] == [1]


def test_two_requests_share_the_tokens_of_a_step(engine: Engine) -> None:
    engine.step(0, {0: 5})
    engine.step(0, {1: 8})
    engine.step(3, {0: 1, 1: 1})
    assert (engine.num_known(0), engine.num_known(1)) == (6, 7)
    engine.step(3, {0: 1, 1: 1})
    assert (engine.num_known(0), engine.num_known(1)) == (7, 10)
    assert engine.draft.num_read == [5, 2, 2, 3, 2]


def test_a_prefix_that_another_request_left_unread_is_read(engine: Engine) -> None:
    engine.step(0, {0: 6})
    engine.num_computed[1] = BLOCK  # found in the cache
    engine.step(3, {1: 3})
    assert engine.num_known(1) == BLOCK + 3
    assert engine.draft.num_read == [BLOCK, 3]


def test_rejected_tokens_are_forgotten(engine: Engine) -> None:
    engine.step(3, {0: 4})
    right, engine.texts[0][5:7] = engine.texts[0][5:7], [7, 7]
    engine.step(0, {0: 3})  # the last two are rejected
    engine.num_computed[0] -= 2
    engine.texts[0][5:7] = right
    engine.step(0, {0: 1})
    engine.step(3, {0: 1})
    assert engine.num_known(0) == 7


@pytest.mark.parametrize(("draft", "rests"), [("a model", True), ("a model", False), (None, True)])
def test_only_a_draft_model_that_may_be_asked_for_nothing_rests(
    draft: str | None, rests: bool
) -> None:
    proposer = Draft()
    runner = SimpleNamespace(
        get_draft_model=lambda: draft,
        drafter=proposer,
        speculative_config=SimpleNamespace(uses_dynamic_speculative_decoding=lambda: rests),
        kv_cache_config=SimpleNamespace(num_blocks=2),
        device=torch.device("cpu"),
    )
    vllms = proposer.propose
    rest(runner)
    assert (proposer.propose == vllms) is not bool(draft and rests)
