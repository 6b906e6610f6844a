"""PPO (arXiv 1707.06347): a critic and generalised advantage estimation instead of GRPO's groups.

    python baselines/ppo.py --config configs.toml:tiny_ppo
    accelerate launch baselines/ppo.py --config configs.toml:qwen3_4b_ppo

Sampler, grader, optimizer, sharding, checkpoints and policy loss are those of `oisd.py`. What differs stands here, at
the places that `oisd.Method` names: a model that adds the critic's loss, and a function that sets advantages. The
reward comes with the last token, and a state's value is what the critic reads where that token is predicted:

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = sum_k (gamma lambda)^k delta_{t+k}        R_t = A_t + V_t
    L_value = 1/N sum 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2)

The policy is trained with A whitened. The critic is the policy's decoder with a head of one number, zero at first: a
second trunk, or the policy's own with `share_trunk`. Its gradients are clipped apart from the policy's. The paper only
names PPO; gamma = lambda = 1 and whitening are its reference's, learning rate and clip of the critic verl's defaults.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
import plumbing
from oisd import Config, NotNegative, PackedBatch, Positive, Rollout, TappedModel
from settings import UserError

Share = Annotated[float, pydantic.Field(ge=0, le=1)]


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class PpoConfig(Config):
    program: ClassVar[str] = "baselines/ppo.py"
    table: ClassVar[str] = "tiny_ppo"
    advantage: Literal["gae"] = "gae"  # generalised advantage estimation (arXiv 1506.02438)
    # PPO
    critic_speed: Positive = 10.0  # the critic's learning rate, as a multiple of the policy's
    gae_gamma: Share = 1.0  # discount per token
    gae_lambda: Share = 1.0  # 1: the return less the value; 0: one step's surprise
    value_clip: NotNegative = 0.5  # values move at most so far from the old ones to lower their loss; 0: no limit
    value_weight: Positive = 1.0  # of L_value beside L_policy; matters with a shared trunk
    share_trunk: bool = False  # the critic reads the policy's own final hidden states

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_trunk and self.gradient_norms_every:
            raise UserError("gradient_norms_every: with share_trunk the critic's loss is in each; set it to 0")


class ActorCritic(TappedModel):
    """The tapped policy and its critic."""

    def __init__(self, model: PreTrainedModel, config: PpoConfig):
        critic = None if config.share_trunk else copy.deepcopy(model.get_decoder())  # before it is tapped
        super().__init__(model, config)
        self.critic = critic
        self.value_head = nn.Linear(self.head.shape[1], 1, bias=False, device=self.head.device)
        nn.init.zeros_(self.value_head.weight)

    @property
    def units(self) -> list[nn.Module]:
        stacks = [m for m in self.critic.children() if isinstance(m, nn.ModuleList)] if self.critic else []
        return [*self.layers, *(layer for stack in stacks for layer in stack)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[name.startswith(("critic.", "value_head."))].append(parameter)
        rate = self.config.critic_speed * self.config.learning_rate
        return [{"params": groups[False]}, {"params": groups[True], "lr": rate}]

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        self.trunk = super().hidden_states(batch)  # (T, D)
        return self.trunk

    def values(self, batch: PackedBatch) -> tuple[Tensor]:
        """V of the state in which each response token is drawn: ((N,),)."""
        if self.critic is None:
            self.hidden_states(batch)
            self.clear_taps()
        return (self.read_values(batch),)

    def read_values(self, batch: PackedBatch) -> Tensor:
        hidden = self.trunk if self.critic is None else self.decode(self.critic, batch)
        self.trunk = None
        return self.value_head(hidden[batch.predicted - 1])[:, 0].float()

    def losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        """As of the policy; `token_loss` has the critic's loss in it."""
        sums = super().losses(batch)
        values = self.read_values(batch)
        old, returns = (
            torch.cat([rollout.notes[name] for rollout in batch.rollouts] or [torch.zeros(0)]).to(values.device)
            for name in ("values", "returns")
        )
        loss = value_loss_sum(values, old, returns, self.config.value_clip)
        sums["token_loss"] = sums["token_loss"] + self.config.value_weight * loss
        return sums | {"value_loss": loss.detach(), "value": values.detach().sum()}


def value_loss_sum(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, of the value or, if that is worse, of the value held near the old one: (N,) -> ()."""
    near = old_values + (values - old_values).clamp(-clip, clip) if clip else values
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / 2


def advantages_of(values: Sequence[Tensor], rewards: Sequence[float], gamma: float, decay: float) -> list[Tensor]:
    """GAE of each response, whose reward comes with its last token: -> (response length,) each, not whitened."""
    lengths = torch.tensor([len(v) for v in values])
    padded = pad_sequence([v.double() for v in values], batch_first=True)  # (rollouts, longest); 0 after the end
    padded = nn.functional.pad(padded, (0, 1))
    deltas = gamma * padded[:, 1:] - padded[:, :-1]
    deltas[torch.arange(len(lengths)), lengths - 1] += torch.tensor(rewards, dtype=torch.float64)
    advantages = torch.zeros_like(deltas)
    following = deltas.new_zeros(len(lengths))
    for t in reversed(range(deltas.shape[1])):  # all responses at once; beyond their ends everything is 0
        following = advantages[:, t] = deltas[:, t] + gamma * decay * following
    return [row[:length] for row, length in zip(advantages, lengths)]


def set_advantages(run: oisd.Run, rollouts: Sequence[Rollout]) -> None:
    """Values by the critic as it is, GAE, whitened over the response tokens of the whole step, of all ranks."""
    config = run.config
    values = [values for (values,) in oisd.score(run, rollouts, run.model.values)]
    advantages = advantages_of(values, [rollout.reward for rollout in rollouts], config.gae_gamma, config.gae_lambda)
    flat = torch.cat(advantages)
    whitened = oisd.whiten(flat, torch.ones_like(flat)).split([len(a) for a in advantages])
    for rollout, value, advantage, white in zip(rollouts, values, advantages, whitened):
        rollout.notes = {"values": value, "returns": (advantage + value).float()}
        rollout.advantage = white


PPO = oisd.Method(PpoConfig, ActorCritic, set_advantages)

if __name__ == "__main__":
    plumbing.program(functools.partial(oisd.main, method=PPO))
