"""Plan the memory of a training step before renting GPUs.

    python tools/plan.py --config configs.toml:qwen3_4b --gpus 4          any field of the config may follow

The program's own model, sharding, packing and losses run on PyTorch's fake tensors, which have shapes but no numbers.
No weights and no GPU are needed. A micro-batch is the largest that the config allows: `max_tokens_per_gpu` tokens,
nearly all of them responses. PyTorch counts the memory of the second one, where the gradients of the first already
exist. Another pass without recomputation shows what a layer takes that keeps its activations. Arithmetic adds AdamW's
two float32 moments, what vLLM takes beyond weights and cache, and a reserve for the CUDA context, NCCL and
fragmentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from oisd import Config, Rollout, TappedModel
from support import models
from support.processes import RESERVE, largest_share
from support.settings import UserError, one_line

CARDS = (24, 40, 80, 141)  # GB, as cards are named: 10^9 bytes
VLLM_WORKS = 2e9  # activations of its profiling batch and CUDA graphs: users report 1.5 to 2 GB
VLLM_SLEEPS = 1.5e9  # what a sleeping engine keeps: 1 to 1.5 GB (vllm#28714)
GB = 1e9
PARTS = {  # the tracker's categories
    "parameters": ("Sharded Param",),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "gathered weights": ("Unsharded Param", "All Gather"),
}


@dataclass
class Plan:
    """Bytes per GPU."""

    parts: dict[str, int]  # at the peak; they sum to `training`
    training: int  # peak of a micro-batch and the optimizer's step
    resident: int  # what stays while vLLM works: parameters and optimizer
    vllm_least: int  # vLLM's weights and the cache of one longest sequence
    vllm_cache: int  # the cache's part of it
    layers: int  # decoder layers
    kept_layer: int  # what a layer takes that is not recomputed


def planned_attention(module, query, key, value, mask, scaling=None, **_):
    """Allocate FlashAttention's tensors. On fake tensors, sdpa itself would choose its T x T form."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2), None


# Packed and tapped like any other kernel.
AttentionInterface.register("attention_shapes", planned_attention)
AttentionInterface.register("planned", oisd.tapped_attention("attention_shapes"))
AttentionMaskInterface.register("planned", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def planned_rows(logits: Tensor, targets: Tensor, temperature: float, tau: float, learning: int = 0) -> Tensor:
    """Stand in for the compiled `lens_rows`, which keeps nothing but the logits and the statistics."""
    logits.zero_()
    return torch.zeros(2 * len(logits), len(targets))


def planned_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Stand in for `add_product` on a GPU: the same work, and no memory for the product itself."""
    torch.mm(left.T, right, out=total.view(left.dtype)[:, : right.shape[1]])  # nobody reads the result


def longest_batch(config: Config) -> list[Rollout]:
    """Make rollouts that fill a micro-batch: responses of full length, then one that fills the rest."""
    prompt = min(64, config.max_prompt_tokens)
    full, left = divmod(config.max_tokens_per_gpu, prompt + config.max_response_tokens)
    lengths = [config.max_response_tokens] * full + [left - prompt] * (left > prompt)
    return [Rollout([0] * prompt, [0] * n, [0.0] * n, "length", advantage=1.0) for n in lengths]


def fill(model: TappedModel) -> None:
    """Give an empty model fake tensors, tied ones once."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")


def micro_batch(model: TappedModel, batch: oisd.PackedBatch) -> None:
    """Run a micro-batch forward and backward."""
    sums = model(model.losses, batch)
    (sums.token_loss + sums.step_loss).backward()


def plan(config: Config, gpus: int) -> Plan:
    """Plan a step on `gpus` GPUs. Raises: UserError if the model's config cannot be read."""
    found = trace(config, gpus)
    if config.recompute_layers:
        without = trace(dataclasses.replace(config, recompute_layers=0), gpus).training
        found.kept_layer = max(0, (without - found.training) // recomputed(config, found.layers))
    return found


def recomputed(config: Config, layers: int) -> int:
    """Count the layers that recompute their activations."""
    return layers if config.recompute_layers == "all" else config.recompute_layers


def trace(config: Config, gpus: int) -> Plan:
    """Make a plan without `kept_layer`. Raises: UserError, as `plan` does."""
    config = dataclasses.replace(config, attention="sdpa")  # FlashAttention needs a GPU
    models.check_model_config(config.model, config.student_layer, config.longest_row, config.prompt_limit)
    real = oisd.pack(longest_batch(config), config)
    model = TappedModel(oisd.load_model(config, empty_on="meta")[0], config).train()
    model.model.set_attn_implementation("planned")
    kernels = mock.patch.multiple(oisd, lens_rows=planned_rows, add_product=planned_product)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        with kernels, FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = {name: mode.from_tensor(x) for name, x in vars(real).items() if isinstance(x, Tensor)}
            batch = dataclasses.replace(real, **tensors)
            fill(model)
            oisd.shard(model, mesh, config)
            micro_batch(model, batch)
            with (tracker := FSDPMemTracker(model)):
                micro_batch(model, batch)
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        # AdamW is not traced: the tracker would also count the global shapes by which DTensor plans its step.
        optimizer = 8 * sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    except RuntimeError as problem:  # a kernel that has no fake form, such as experts' products in float32
        raise UserError(f"{config.model} cannot be traced in {config.dtype}: {one_line(problem)}") from None
    finally:
        dist.destroy_process_group()
    total = peak.pop("Total") + optimizer
    parts = {part: sum(int(peak.get(kind, 0)) for kind in kinds) for part, kinds in PARTS.items()}
    width = 2 if config.dtype == "bfloat16" else 4
    logits = 2 * min(config.lens_chunk_tokens, config.max_tokens_per_gpu) * len(model.head)  # policy's and student's
    parts |= {"optimizer": optimizer, "logits chunk": width * logits}
    parts["activations, rest"] = total - sum(parts.values())
    resident = parts["parameters"] + optimizer
    return Plan(parts, total, resident, *vllm_bytes(config, model), len(model.layers), 0)


def vllm_bytes(config: Config, model: TappedModel) -> tuple[int, int]:
    """Compute the least that vLLM needs of a GPU, and the keys and values of one longest sequence."""
    if config.sampler != "vllm":
        return 0, 0
    shape = model.model.config
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    cache = 2 * 2 * config.longest * shape.num_hidden_layers * shape.num_key_value_heads * head_size
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    return int(weights + cache + VLLM_WORKS), cache


def verdict(card: int, found: Plan, config: Config) -> str:
    """Say whether the step fits a card of that many GB, and if not, what to change."""
    vllm = config.sampler == "vllm"
    room = card * GB - RESERVE - VLLM_SLEEPS * vllm
    if found.training > room:
        change = "more GPUs, lora_rank, or a smaller max_tokens_per_gpu or lens_chunk_tokens"
        return f"no, training takes {found.training / GB:.1f} GB: {change}"
    text = "yes"
    if vllm:
        most = largest_share(card * GB, card * GB, found.resident)
        share = most if config.vllm_memory == "auto" else config.vllm_memory
        if share > most:
            return f"no, beside weights and optimizer fits vllm_memory = {most:.2f} at most"
        free = share * card * GB - found.vllm_least
        if free < 0:
            return f"no, vLLM needs {found.vllm_least / GB:.1f} GB and gets {share * card:.1f}: more GPUs"
        held = 1 + int(free / found.vllm_cache)
        text += f"; vLLM gets {share:.2f} of it and holds {held} sequences of full length at once"
    now = recomputed(config, found.layers)
    kept = min(now, int((room - found.training) / found.kept_layer)) if found.kept_layer else 0
    if kept:
        text += f"; recompute_layers = {now - kept} instead of {now} fits, too"
    return text


def report(name: str, config: Config, gpus: int) -> str:
    """Plan the step: -> the lines to print. Raises: UserError."""
    start = time.monotonic()
    found = plan(config, gpus)
    rows = found.parts | {"peak of training": found.training}
    title = f"{name}: {config.model}, {config.dtype}, GPUs: {gpus}"
    lines = [f"{title}; GB (10^9 bytes) per GPU, planned, not measured"]
    lines += [f"  {part:18} {size / GB:7.2f}" for part, size in rows.items()]
    if found.kept_layer:
        lines.append(f"  {'a layer kept':18} {found.kept_layer / GB:7.2f}  more, for each that is not recomputed")
    if config.sampler == "vllm":
        lines.append(f"  {'vLLM needs':18} {found.vllm_least / GB:7.2f}  asleep while the trainer works")
    lines += [f"  {card:3} GB card: {verdict(card, found, config)}" for card in CARDS]
    return "\n".join([*lines, f"planned in {time.monotonic() - start:.0f} s"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read `--gpus` and a config's fields, and print the plan: -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="of all machines")
    options, words = parser.parse_known_args(arguments)
    if options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: at least 1")
    try:
        print(report(*oisd.load_config(words), options.gpus))
    except UserError as problem:
        print(f"plan: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
