"""What a trainer's number format hides: a run of oisd.py whose weights, wherever they are read, lie on a coarser grid.

    python tools/grids.py --config configs.toml:smollm2_easy --weight_grid stochastic
    python tools/grids.py --config configs.toml:smollm2_easy --weight_grid float16 --dtype float32

The optimizer updates float32 weights, as ever. After each update the model, and so the sampler, gets their image:

    bfloat16     rounded to the nearest: with --dtype float32, what sharded training in bfloat16 does to weights and
                 nothing that it does to products, so that a difference to float32 is the grid's alone
    float16      the same on a grid that is eight times finer, and ends at 65504 above and at 6e-8 below
    stochastic   rounded to either neighbour in bfloat16, with the odds that make the mean right, drawn anew after each
                 update (arXiv 2010.06192); trainer and sampler read the same draw

All weights are held to it, norms and embeddings too, as FSDP2 does in bfloat16 (one process on a CPU reads those in
float32). The start is taken as it is: published checkpoints lie on the bfloat16 grid. `moved_weights` counts images in
bfloat16, and of `stochastic` the draw of the moment. An experiment, not a way to train: `final/` and checkpoints hold
images, not the float32 weights, so a run cannot be resumed.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
import plumbing
from settings import UserError, derive_seed


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class GridConfig(oisd.Config):
    program: ClassVar[str] = "tools/grids.py"
    resumable: ClassVar[bool] = False
    weight_grid: Literal["bfloat16", "float16", "stochastic"] = "bfloat16"  # on which all computation finds the weights

    @classmethod
    def check_table(cls, values: dict[str, Any]) -> None:
        oisd.Config.check_table(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank:
            raise UserError(f"lora_rank = {self.lora_rank}: adapters have no published grid to start from, set it to 0")
        if self.weight_grid == "float16" and self.dtype == "bfloat16":
            raise UserError("weight_grid = 'float16' would be rounded once more by dtype = 'bfloat16': take float32")


def image(weights: Tensor, grid: str, generator: torch.Generator) -> Tensor:
    """The float32 numbers of the grid that stand for these float32 weights."""
    if grid != "stochastic":
        return weights.to(getattr(torch, grid)).float()
    bits = weights.view(torch.int32)  # in which neighbours in bfloat16 are 2^16 apart
    noise = torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(2**16)).view(torch.float32)


def hold_to_grid(run: oisd.Run) -> None:
    """From here on the optimizer updates float32 weights of its own, and the model keeps their images."""
    parameters = list(itertools.chain(*(group["params"] for group in run.optimizer.param_groups)))
    masters = [plumbing.local(parameter).clone() for parameter in parameters]
    updates = itertools.count()

    def bring_back(*_) -> None:
        for parameter, master in zip(parameters, masters):
            plumbing.local(parameter).copy_(master)

    def put_images(*_) -> None:
        update = next(updates)
        for index, (parameter, master) in enumerate(zip(parameters, masters)):
            weights = plumbing.local(parameter)  # asked for anew each time, as FSDP2 may move it
            master.copy_(weights)
            seed = derive_seed(run.config.seed, "grid", update, index, plumbing.rank())
            generator = torch.Generator(weights.device).manual_seed(seed)
            weights.copy_(image(master, run.config.weight_grid, generator))

    run.optimizer.register_step_pre_hook(bring_back)
    run.optimizer.register_step_post_hook(put_images)


def set_advantages(run: oisd.Run, rollouts: Sequence[oisd.Rollout]) -> None:
    """Those of `oisd.py`; and, before the first update, what this file is for."""
    oisd.set_advantages(run, rollouts)
    if run.state["step"] == 0:
        hold_to_grid(run)


GRID = oisd.Method(GridConfig, set_advantages=set_advantages)

if __name__ == "__main__":
    plumbing.program(functools.partial(oisd.main, method=GRID))
