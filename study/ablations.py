"""What only the study varies: the sign of the advantages, and each loss's own gradient norm (Fig. 9).

    python study/ablations.py --config configs.toml:tiny --advantage_sign positive
    python study/ablations.py --config configs.toml:tiny --gradient_norms_every 1

The norms, before clipping, of the first mini-batch of every N-th step go to `gradient_norms.jsonl` in the run's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import processes
from support.types import Count


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class AblationConfig(oisd.Config):
    program: ClassVar[str] = "study/ablations.py"
    also_takes: ClassVar[tuple[str, ...]] = ("oisd.py",)
    # Ablations
    advantage_sign: Literal["both", "positive", "negative"] = "both"  # rollouts that train the internal losses
    gradient_norms_every: Count = 0  # measure the norms every N steps; 0 disables


class OneSign(oisd.TappedModel):
    """Internal losses of the rollouts with one sign of the advantage; the others have scale 0."""

    def losses(self, batch: oisd.PackedBatch) -> oisd.LossSums:
        sign = {"positive": 1, "negative": -1}.get(self.config.advantage_sign)
        if sign:
            token_scales = batch.token_scales * (sign * batch.advantages > 0)
            query_scales = batch.query_scales * (sign * batch.query_advantages > 0)
            batch = dataclasses.replace(batch, token_scales=token_scales, query_scales=query_scales)
        return super().losses(batch)


def before_updates(run: oisd.Run, rollouts: Sequence[oisd.Rollout]) -> None:
    """Set the advantages and, when it is time, write the gradient norms."""
    oisd.set_advantages(run, rollouts)
    n = run.config.gradient_norms_every
    if n and run.state["step"] % n == 0:
        size = run.config.mini_batch_prompts * run.config.group_size
        norms = gradient_norms(run, rollouts[:size])
        if processes.rank() == 0:
            with (run.folder / "gradient_norms.jsonl").open("a") as file:
                file.write(json.dumps({"step": run.state["step"] + 1, **norms}) + "\n")


def gradient_norms(run: oisd.Run, rollouts: Sequence[oisd.Rollout]) -> dict[str, float]:
    """Measure the norm of each weighted loss's own gradient, a pass for each: -> by loss."""
    config = run.model.config
    names = ("policy", "think", "attention")
    norms = {}
    run.model.train()
    for name in names:
        if not getattr(config, f"{name}_weight"):
            continue
        others = {f"{other}_weight": 0.0 for other in names if other != name}
        run.model.config = dataclasses.replace(config, **others)
        oisd.accumulate_gradients(run, rollouts, config.max_tokens_per_gpu)
        gradients = [p.grad for p in run.optimizer.param_groups[0]["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norms[name] = oisd.full_tensor(norm).item()
        run.optimizer.zero_grad()
    run.model.config = config
    return norms


METHOD = oisd.Method(AblationConfig, OneSign, before_updates)

if __name__ == "__main__":
    processes.program(functools.partial(oisd.main, method=METHOD))
