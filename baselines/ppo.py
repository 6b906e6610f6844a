"""PPO (arXiv 1707.06347): a critic and generalized advantage estimation instead of GRPO's groups.

    python baselines/ppo.py --config configs.toml:tiny_ppo
    accelerate launch baselines/ppo.py --config configs.toml:qwen3_4b_ppo

The reward comes with the last token. A state's value is read where the next token is predicted:

    delta_t = r_t + gamma V_{t+1} - V_t   A_t = sum_k (gamma lambda)^k delta_{t+k}   R_t = A_t + V_t
    L_value = 1/N sum 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2)

The policy is trained with A whitened. The critic is a copy of the policy's decoder with a head of
one number, zero at first. Its gradients are clipped separately. The paper only names PPO. gamma =
lambda = 1 and whitening are those of its reference; the critic's learning rate and clip are verl's
defaults.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from baselines.estimators import whiten
from oisd import Config, LossSums, PackedBatch, Rollout, TappedModel
from support import processes
from support.types import NotNegative, Positive

Unit = Annotated[float, pydantic.Field(ge=0, le=1)]


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class PpoConfig(Config):
    program: ClassVar[str] = "baselines/ppo.py"
    table: ClassVar[str] = "tiny_ppo"
    # PPO
    critic_speed: Positive = 10.0  # the critic's learning rate, as a multiple of the policy's
    gae_gamma: Unit = 1.0  # discount per token
    gae_lambda: Unit = 1.0  # 1: the return minus the value; 0: one step's surprise
    value_clip: NotNegative = 0.5  # largest useful move of a value per update; 0 disables


class ActorCritic(TappedModel):
    """The tapped policy and its critic."""

    def __init__(self, model: PreTrainedModel, config: PpoConfig):
        critic = copy.deepcopy(model.get_decoder())  # before it is tapped
        super().__init__(model, config)
        self.critic = critic
        self.value_head = nn.Linear(self.head.shape[1], 1, bias=False, device=self.head.device)
        nn.init.zeros_(self.value_head.weight)

    @property
    def units(self) -> list[nn.Module]:
        stacks = [module for module in self.critic.children() if isinstance(module, nn.ModuleList)]
        return [*self.layers, *(layer for stack in stacks for layer in stack)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        policy = self.model.parameters()
        critic = [*self.critic.parameters(), *self.value_head.parameters()]
        groups = [{"params": [p for p in part if p.requires_grad]} for part in (policy, critic)]
        groups[1]["lr"] = self.config.critic_speed * self.config.learning_rate
        return groups

    def values(self, batch: PackedBatch) -> Tensor:
        """Compute V of the state in which each response token is drawn: -> (N,)."""
        hidden = self.decode(self.critic, batch)  # (T, D)
        return self.value_head(hidden[batch.predicted - 1])[:, 0].float()

    def losses(self, batch: PackedBatch) -> LossSums:
        """Compute the policy's losses; `token_loss` includes the critic's."""
        sums = super().losses(batch)
        values = self.values(batch)

        def stored(name: str) -> Tensor:
            parts = [rollout.notes[name] for rollout in batch.rollouts] or [torch.zeros(0)]
            return torch.cat(parts).to(values.device)

        clip = self.config.value_clip
        loss = value_loss_sum(values, stored("values"), stored("returns"), clip)
        return sums._replace(
            token_loss=sums.token_loss + loss,
            token_parts=sums.token_parts | {"value_loss": loss.detach()},
            metrics=sums.metrics | {"value": oisd.sum_and_count(values.detach())},
        )


def value_loss_sum(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Sum half the squared error of the values, or of those clipped near the old ones if larger.

    (N,) each -> ().
    """
    near = old_values + (values - old_values).clamp(-clip, clip) if clip else values
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / 2


def advantages_of(
    values: Sequence[Tensor], rewards: Sequence[float], gamma: float, decay: float
) -> list[Tensor]:
    """Compute GAE of each response, not whitened: -> a tensor (response length,) each."""
    lengths = torch.tensor([len(v) for v in values])
    padded = pad_sequence(
        [v.double() for v in values], batch_first=True
    )  # (rollouts, longest); 0 after the end
    padded = nn.functional.pad(padded, (0, 1))
    deltas = gamma * padded[:, 1:] - padded[:, :-1]
    deltas[torch.arange(len(lengths)), lengths - 1] += torch.tensor(rewards, dtype=torch.float64)
    advantages = torch.zeros_like(deltas)
    following = deltas.new_zeros(len(lengths))
    for t in reversed(range(deltas.shape[1])):  # all responses at once; 0 beyond their ends
        following = advantages[:, t] = deltas[:, t] + gamma * decay * following
    return [row[:length] for row, length in zip(advantages, lengths)]


def set_advantages(run: oisd.Run, rollouts: Sequence[Rollout]) -> None:
    """Compute values and GAE, whitened over the response tokens of the step, of all ranks."""
    config = run.config
    values = oisd.token_values(run, rollouts, run.model.values)
    advantages = advantages_of(
        values, [rollout.reward for rollout in rollouts], config.gae_gamma, config.gae_lambda
    )
    flat = torch.cat(advantages)
    whitened = whiten(flat, torch.ones_like(flat)).split([len(a) for a in advantages])
    for rollout, value, advantage, white in zip(rollouts, values, advantages, whitened):
        rollout.notes = {"values": value, "returns": (advantage + value).float()}
        rollout.advantage = white


METHOD = oisd.Method(PpoConfig, ActorCritic, set_advantages)

if __name__ == "__main__":
    processes.program(functools.partial(oisd.main, method=METHOD))
