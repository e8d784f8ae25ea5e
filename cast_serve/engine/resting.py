"""Steps that ask a draft for no token -> no work for it, until it is asked again.

vLLM 0.32 runs the draft in such steps too, so that its KV cache holds all that was written. Here it
rests, prompts included, and reads what it missed once it has to propose: which tokens those are is
kept by their place in the cache, where another request with the same prefix finds them too.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def rest(runner: Any) -> None:
    """Lets the draft of one of vLLM's model runners rest, where some steps ask it for nothing.

    Args:
        runner: its models loaded, its KV cache made; changed in place.
    """
    draft = runner.get_draft_model()
    if draft is None or not runner.speculative_config.uses_dynamic_speculative_decoding():
        return
    proposer = runner.drafter
    num_slots = runner.kv_cache_config.num_blocks * proposer.block_size
    proposer.propose = RestingDraft(proposer, num_slots, runner.device).propose


class RestingDraft:
    """vLLM's `propose` of a draft model, which keeps what is left to read.

    Args:
        proposer: of vLLM.
        num_slots: tokens that the draft's KV cache has room for.
        device: of the draft.

    Attributes:
        tokens: int64 [num_slots], what the served model last wrote there.
        is_unread: bool [num_slots], whether the draft has still to read it.
    """

    def __init__(self, proposer: Any, num_slots: int, device: torch.device) -> None:
        self._propose = proposer.propose
        self._block_size = proposer.block_size
        self._max_tokens = proposer.max_num_tokens - 1  # a pass has one more, the next token
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.is_unread = torch.zeros(num_slots, dtype=torch.bool, device=device)

    def propose(self, num_speculative_tokens: int, **inputs: Any) -> Tensor:
        """As vLLM's, but that the draft first reads what it missed, one step's tokens at most.

        Where some is left, it guesses badly, and what it reads meanwhile is read again.

        Returns:
            [num_requests, num_speculative_tokens], int64.
        """
        metadata, new = inputs["common_attn_metadata"], inputs["target_token_ids"]
        places = metadata.slot_mapping[: len(new)].long()
        self.tokens[places] = new.long()
        self.is_unread[places] = True
        if num_speculative_tokens == 0:
            num_requests = metadata.batch_size()
            return torch.empty(num_requests, 0, dtype=torch.int64, device=places.device)
        bounds = metadata.query_start_loc.tolist()
        budget = self._max_tokens
        for request, (begin, end) in enumerate(pairwise(bounds)):
            num_before = int(inputs["target_positions"][begin])
            own = self._places(metadata.block_table_tensor[request], num_before + 1)
            missed = self.is_unread[own[:-1]].nonzero()
            if len(missed):
                first = int(missed[0])
                last = min(first + budget, num_before)
                self._read(request, own, first, last, inputs)
                budget -= last - first
                if last < num_before:
                    continue
            self.is_unread[places[begin:end]] = False
        return self._propose(num_speculative_tokens, **inputs)

    def _places(self, blocks: Tensor, num_tokens: int) -> Tensor:
        """Of a request's first tokens, int64 [num_tokens].

        Args:
            blocks: of the request, [num_blocks].
        """
        positions = torch.arange(num_tokens, device=blocks.device)
        return blocks[positions // self._block_size].long() * self._block_size + (
            positions % self._block_size
        )

    def _read(
        self, request: int, own: Tensor, first: int, last: int, inputs: dict[str, Any]
    ) -> None:
        """Has the draft read tokens first to last - 1 of a request, in a pass of their own.

        Args:
            request: its row.
            own: `_places` of its tokens, to this step's first.
            inputs: of `propose`.
        """
        if first == last:
            return
        metadata = inputs["common_attn_metadata"]
        places = own[first:last]
        bounds = metadata.query_start_loc.new_tensor([0, last - first])
        alone = metadata.replace(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds.cpu(),
            seq_lens=metadata.seq_lens.new_tensor([last]),
            num_reqs=1,
            num_actual_tokens=last - first,
            max_query_len=last - first,
            max_seq_len=last,
            block_table_tensor=metadata.block_table_tensor[request : request + 1],
            slot_mapping=places.to(metadata.slot_mapping.dtype),
            positions=None,
            is_prefilling=None,
            seq_lens_cpu_upper_bound=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        self._propose(
            0,
            target_token_ids=self.tokens[places].to(inputs["target_token_ids"].dtype),
            target_positions=torch.arange(
                first, last, dtype=inputs["target_positions"].dtype, device=places.device
            ),
            target_hidden_states=None,  # which a draft model does not take
            next_token_ids=self.tokens[own[last : last + 1]].to(inputs["next_token_ids"].dtype),
            token_indices_to_sample=None,
            common_attn_metadata=alone,
            sampling_metadata=inputs["sampling_metadata"],
        )
        self.is_unread[places] = False
