"""RLOO and REINFORCE++: other advantage estimators in place of GRPO's.

    python baselines/estimators.py --config configs.toml:tiny_rloo
    accelerate launch baselines/estimators.py --config configs.toml:qwen3_4b_reinforce_pp

RLOO (arXiv 2402.14740) subtracts the mean reward of the other rollouts of the group. REINFORCE++
(arXiv 2501.03262) whitens the rewards over all tokens of a step; groups play no part.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import processes


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class EstimatorConfig(oisd.Config):
    program: ClassVar[str] = "baselines/estimators.py"
    table: ClassVar[str] = "tiny_rloo"
    # Estimator
    estimator: Literal["rloo", "reinforce_pp"] = "rloo"  # of the advantages


def whiten(values: Tensor, counts: Tensor) -> Tensor:
    """Compute (x - mean) / sqrt(var + 1e-8) over a step's tokens, `counts[i]` of which have x_i.

    (n,), (n,) -> (n,). Unbiased variance; 0 where all agree.
    """
    values, counts = values.double(), counts.double()
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1).clamp(min=1)
    return ((values - mean) / (variance + 1e-8).sqrt()).float()


def set_advantages(run: oisd.Run, rollouts: Sequence[oisd.Rollout]) -> None:
    """Set the advantages of a step's rollouts with the configured estimator."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    if run.config.estimator == "rloo":
        G = run.config.group_size
        others = oisd.centered(rewards.view(-1, G)) * (G / (G - 1))  # r - mean of the G - 1 others
        advantages = others.flatten()
    else:
        advantages = whiten(rewards, torch.tensor([len(r.response_ids) for r in rollouts]))
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage


METHOD = oisd.Method(EstimatorConfig, before_updates=set_advantages)

if __name__ == "__main__":
    processes.program(functools.partial(oisd.main, method=METHOD))
