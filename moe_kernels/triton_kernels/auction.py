"""A round of the auction by Triton; the reference is `moe_kernels.epsilon_auction.round_in_torch`.

Two launches per round. Scratch memory of ``8 * T * E`` bytes, twice that of float32 scores. Not tuned on a device.

Shapes: T tokens, E experts.
"""

import torch

from moe_kernels.epsilon_auction import AuctionState
from moe_kernels.triton_kernels.runtime import kernels, launch, next_power_of_2


class RoundsInTriton:
    """Computes rounds; keeps its scratch memory from one round to the next."""

    def __init__(self, scores_TE: torch.Tensor) -> None:
        num_tokens, num_experts = scores_TE.shape
        self.lists = torch.empty(2, num_experts, num_tokens + 1, dtype=torch.int32, device=scores_TE.device)
        block_e = next_power_of_2(num_experts)
        self.bid_meta = {"BLOCK_T": max(1, min(64, 4096 // block_e)), "BLOCK_E": block_e, "num_warps": 4}
        self.settle_meta = {"BLOCK": max(16, min(2048, next_power_of_2(num_tokens))), "num_warps": 8}

    def __call__(self, state: AuctionState, epsilon: int) -> None:
        """Change the state by one round."""
        num_tokens, num_experts = state.score_TE.shape
        device_code = kernels("auction")
        launch(
            device_code.bid_tokens, (-(-num_tokens // self.bid_meta["BLOCK_T"]),), state.score_TE, state.price_E,
            state.expert_T, state.bid_T, num_tokens, num_experts, epsilon, **self.bid_meta,
        )  # fmt: skip
        launch(
            device_code.settle_experts, (num_experts,), state.price_E, state.expert_T, state.bid_T, state.idle_E,
            self.lists[0], self.lists[1], num_tokens, state.places, **self.settle_meta,
        )  # fmt: skip
