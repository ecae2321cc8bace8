"""Operations with implementations to choose from: plain torch everywhere, Triton or CUDA where it pays."""

from umer1.ops.gather_hidden import gather_hidden, gather_hidden_at
from umer1.ops.infonce import infonce
from umer1.ops.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from umer1.ops.rank_margin_reward import rank_margin_reward, rank_margin_rewards

__all__ = [
    "gather_hidden",
    "gather_hidden_at",
    "infonce",
    "linear_cross_entropy",
    "linear_logprobs",
    "rank_margin_reward",
    "rank_margin_rewards",
]
