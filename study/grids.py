"""What a number format hides: training whose weights, wherever they are read, lie on a coarser grid.

    python study/grids.py --config configs.toml:smollm2_easy --weight_grid stochastic
    python study/grids.py --config configs.toml:smollm2_easy --weight_grid float16 --dtype float32

The optimizer updates float32 weights, as always. After each update, the model and so the sampler get their image:

    bfloat16     rounded to nearest: with --dtype float32, what sharded training in bfloat16 does to weights alone
    float16      likewise on a grid eight times finer
    stochastic   rounded to either neighbor in bfloat16, unbiased, drawn again after each update (arXiv 2010.06192)

The start is not rounded: published checkpoints lie on the bfloat16 grid. This is an experiment, not a way to train:
`final/` and checkpoints hold images, so a run cannot be resumed.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import models, processes
from support.settings import UserError, derive_seed


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class GridConfig(oisd.Config):
    program: ClassVar[str] = "study/grids.py"
    also_takes: ClassVar[tuple[str, ...]] = ("oisd.py",)
    resumable: ClassVar[bool] = False
    weight_grid: Literal["bfloat16", "float16", "stochastic"] = "bfloat16"  # on which all computation finds the weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank:
            raise UserError(f"lora_rank = {self.lora_rank}: adapters have no published grid to start from, set it to 0")
        if self.weight_grid == "float16" and self.dtype == "bfloat16":
            raise UserError("weight_grid = 'float16' would be rounded once more by dtype = 'bfloat16': take float32")


def image(weights: Tensor, grid: str, generator: torch.Generator) -> Tensor:
    """Round float32 weights to the grid: -> float32."""
    if grid != "stochastic":
        return weights.to(getattr(torch, grid)).float()
    bits = weights.view(torch.int32)  # in which neighbours in bfloat16 are 2^16 apart
    noise = torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(2**16)).view(torch.float32)


def hold_to_grid(run: oisd.Run) -> None:
    """Let the optimizer update float32 weights of its own; the model keeps their images."""
    parameters = list(itertools.chain(*(group["params"] for group in run.optimizer.param_groups)))
    masters = [models.local(parameter).clone() for parameter in parameters]
    updates = itertools.count()

    def bring_back(*_) -> None:
        for parameter, master in zip(parameters, masters):
            models.local(parameter).copy_(master)

    def put_images(*_) -> None:
        update = next(updates)
        for index, (parameter, master) in enumerate(zip(parameters, masters)):
            weights = models.local(parameter)  # asked for anew each time, as FSDP2 may move it
            master.copy_(weights)
            seed = derive_seed(run.config.seed, "grid", update, index, processes.rank())
            generator = torch.Generator(weights.device).manual_seed(seed)
            weights.copy_(image(master, run.config.weight_grid, generator))

    run.optimizer.register_step_pre_hook(bring_back)
    run.optimizer.register_step_post_hook(put_images)


def before_updates(run: oisd.Run, rollouts: Sequence[oisd.Rollout]) -> None:
    """Set the advantages; before the first update, put the grid in place."""
    oisd.set_advantages(run, rollouts)
    if run.state["step"] == 0:
        hold_to_grid(run)


METHOD = oisd.Method(GridConfig, before_updates=before_updates)

if __name__ == "__main__":
    processes.program(functools.partial(oisd.main, method=METHOD))
