"""BuPO (arXiv 2512.19673): first optimize the policy of an inner layer, then the last layer's.

    python baselines/bupo.py --config configs.toml:tiny_bupo
    accelerate launch baselines/bupo.py --config configs.toml:qwen3_4b_bupo

For `policy_layer_steps` steps the policy is what the lens reads from `student_layer`. Its gradient
reaches the layers up to there and the head, and nothing above. Rollouts always come from the last
layer. Afterwards it is GRPO.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pydantic
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from oisd import Config, LossSums, PackedBatch
from support import processes
from support.settings import UserError
from support.types import AtLeastOne


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class BupoConfig(Config):
    program: ClassVar[str] = "baselines/bupo.py"
    table: ClassVar[str] = "tiny_bupo"
    # BuPO
    policy_layer_steps: AtLeastOne = 30  # steps that optimize the policy of `student_layer`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.think_weight or self.attention_weight:
            raise UserError("think_weight, attention_weight: BuPO has neither loss, set both to 0")
        if self.importance_cap:
            raise UserError("importance_cap compares with the sampler's policy: set it to 0")


class InnerPolicy(oisd.TappedModel):
    """The policy of the student layer while `inner`, else of the last layer."""

    inner = False

    def inner_hidden(self, batch: PackedBatch) -> Tensor:
        """Read the student layer through the lens at the predicting positions: -> (N, D)."""
        self.hidden_states(batch)
        hidden = self.student_tap.hidden[0, batch.predicted - 1]
        self.clear_taps()
        return self.lens_hidden(hidden, self.config.lens_norm)

    def inner_logprobs(self, batch: PackedBatch) -> Tensor:
        """Score the response tokens under the inner policy, without gradient: -> (N,)."""
        hidden = self.inner_hidden(batch)
        return oisd.read_tokens(hidden, self.head, batch.target_ids, self.config)[0]

    def losses(self, batch: PackedBatch) -> LossSums:
        """Compute L_GRPO of the inner policy; no lens is measured meanwhile."""
        if not self.inner:
            return super().losses(batch)
        return self.token_losses(self.inner_hidden(batch), None, batch)


def before_updates(run: oisd.Run, rollouts: Sequence[oisd.Rollout]) -> None:
    """Set GRPO's advantages and, in the first phase, the inner policy's old log-probs."""
    oisd.set_advantages(run, rollouts)
    run.model.inner = run.state["step"] < run.config.policy_layer_steps
    if not run.model.inner:
        return
    values = oisd.token_values(run, rollouts, run.model.inner_logprobs)
    for rollout, logprobs in zip(rollouts, values):
        rollout.old_logprobs = logprobs
    fill_optimizer_state(run.optimizer)


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter AdamW's state.

    Layers above the inner one have no gradient yet, but a checkpoint needs the state of all.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                device = parameter.device if group["fused"] else "cpu"
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


METHOD = oisd.Method(BupoConfig, InnerPolicy, before_updates)

if __name__ == "__main__":
    processes.program(functools.partial(oisd.main, method=METHOD))
