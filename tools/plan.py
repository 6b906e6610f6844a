"""Memory and work of a step, before GPUs are rented.

    python tools/plan.py --config configs.toml:qwen3_4b --gpus 4          one machine
    python tools/plan.py --config configs.toml:qwen3_8b --gpus 2x8        machines x GPUs of each; any field may follow

Two micro-batches run through the program's own model, sharding, packing and losses, forward and backward, on PyTorch's
fake tensors: all shapes, no numbers, no weights, no GPU. PyTorch's counters count the FLOPs of scoring and training the
first, and what is alive in the second, which finds the gradients of the first. A micro-batch is the largest that the
config allows: `max_tokens_per_gpu` tokens, nearly all of them responses. A third one, without recomputation, tells what
a layer takes that keeps its activations. Arithmetic adds AdamW's two float32 moments (the trackers also count the
global shapes by which DTensor plans an optimizer's step), what vLLM takes beyond weights and cache (VLLM_WORKS, and
VLLM_SLEEPS while it sleeps), and `plumbing.RESERVE` for the CUDA context, NCCL and fragmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inputs
import oisd
import plumbing
from oisd import Config, Rollout, TappedModel
from plumbing import RESERVE
from settings import UserError, one_line

CARDS = (24, 40, 80, 141)  # GB, as cards are named: 10^9 bytes
VLLM_WORKS = 2e9  # activations of its profiling batch and CUDA graphs: users report 1.5 to 2 GB
VLLM_SLEEPS = 1.5e9  # what a sleeping engine keeps: 1 to 1.5 GB (vllm#28714)
GB = 1e9
PARTS = {  # the trackers' categories
    "parameters": ("Sharded Param",),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "gathered weights": ("Unsharded Param", "All Gather"),
}


@dataclass
class Plan:
    """Bytes per GPU, FLOPs of the whole step."""

    parts: dict[str, int]  # at the peak; they sum to `training`
    training: int  # peak of a micro-batch and the optimizer's step
    host: int  # in the host's memory, under cpu_offload
    resident: int  # what stays while vLLM works: parameters and optimizer
    vllm_least: int  # vLLM's weights and the cache of one longest sequence
    vllm_cache: int  # of that, the cache
    layers: int  # decoder layers
    kept_layer: int  # what a layer takes that is not recomputed
    flops: float
    tokens: int  # of a step whose responses all have full length
    seconds: float  # that planning took


def planned_attention(module, query, key, value, mask, scaling=None, **_):
    """FlashAttention's tensors: sdpa itself would choose its T x T form, since fake tensors are on no known device."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2), None


AttentionInterface.register("planned", planned_attention)


def planned_rows(logits: torch.Tensor, targets: torch.Tensor, config: Config, learning: int = 0) -> torch.Tensor:
    """`lens_rows` as it is compiled: nothing between logits and statistics lies in memory."""
    logits.zero_()
    return torch.zeros(2 * len(logits), len(targets))


@contextlib.contextmanager
def planned_kernels() -> Iterator[None]:
    """Within, `sdpa` is `planned_attention`, packed and tapped like any kernel, and the lens pass works as on a GPU."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], oisd.lens_rows, oisd.add_product
    AttentionInterface.register("sdpa", oisd._tapped_attention("planned"))
    oisd.lens_rows = planned_rows
    # The work of adding bfloat16 products up in float32, with no more memory; what it writes is nobody's.
    oisd.add_product = lambda total, a, b: torch.mm(a.T, b, out=total.view(a.dtype)[:, : b.shape[1]])
    try:
        yield
    finally:
        oisd.lens_rows, oisd.add_product = before[1:]
        AttentionInterface.register("sdpa", before[0])


def longest_batch(config: Config) -> list[Rollout]:
    """Rollouts that fill a micro-batch: whole responses, then what is left."""
    prompt = min(64, config.max_prompt_tokens)
    whole, left = divmod(config.max_tokens_per_gpu, prompt + config.max_response_tokens)
    lengths = [config.max_response_tokens] * whole + ([left - prompt] if left > prompt else [])
    return [Rollout([0] * prompt, [0] * n, [0.0] * n, "length", advantage=1.0) for n in lengths]


def fake_model(shell: TappedModel, mesh: DeviceMesh, config: Config) -> TappedModel:
    """Fill a shell with fake tensors, tied ones once, and shard it as a run would."""
    made: dict[int, nn.Parameter] = {}
    for module in shell.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    oisd.shard(shell, mesh, config)
    return shell.train()


def micro_batch(model: TappedModel, batch: oisd.PackedBatch) -> None:
    sums = model(model.losses, batch)
    (sums.pop("token_loss") + sums.pop("step_loss")).backward()


def plan(config: Config, gpus: int) -> Plan:
    """Raises: UserError if the model's config cannot be read."""
    start = time.monotonic()
    found = trace(config, gpus)
    kept = 0
    if config.recompute_layers:
        without = trace(dataclasses.replace(config, recompute_layers=0), gpus).training
        kept = (without - found.training) // recomputed(config, found.layers)
    return dataclasses.replace(found, kept_layer=max(kept, 0), seconds=time.monotonic() - start)


def recomputed(config: Config, layers: int) -> int:
    return layers if config.recompute_layers == "all" else config.recompute_layers


def trace(config: Config, gpus: int) -> Plan:
    """A plan without `kept_layer` and `seconds`. Raises: UserError, as `plan` does."""
    config = dataclasses.replace(config, attention="sdpa")  # which `planned_kernels` replaces
    inputs.read_model_config(config)
    real = oisd.pack(longest_batch(config), config)
    shell = TappedModel(oisd.load_model(config, empty_on="meta")[0], config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        with planned_kernels(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = {name: value for name, value in vars(real).items() if isinstance(value, torch.Tensor)}
            batch = dataclasses.replace(real, **{name: mode.from_tensor(value) for name, value in tensors.items()})
            model = fake_model(shell, mesh, config)
            with FlopCounterMode(display=False) as counter:  # apart: it keeps alive what it counted
                micro_batch(model, batch)
                with torch.no_grad():
                    model(model.response_logprobs, batch)
            with (tracker := FSDPMemTracker(model)):
                micro_batch(model, batch)  # with the gradients of the one before
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        optimizer = 8 * sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
        logits = logits_bytes(config, model)
    except RuntimeError as problem:  # of a kernel whose form without numbers knows less: experts' products in float32
        raise UserError(f"{config.model} cannot be traced in {config.dtype}: {one_line(problem)}") from None
    finally:
        dist.destroy_process_group()
    host = 0
    if config.cpu_offload:
        moved = sum(int(peak.pop(kind)) for kind in ("Sharded Param", "Sharded Grad"))
        host, optimizer, peak["Total"] = moved + optimizer, 0, peak["Total"] - moved
    total = peak.pop("Total") + optimizer
    parts = {part: sum(int(peak.get(kind, 0)) for kind in kinds) for part, kinds in PARTS.items()}
    parts |= {"optimizer": optimizer, "logits chunk": logits}
    parts["activations, rest"] = total - sum(parts.values())
    longest = config.longest
    tokens = config.prompts_per_step * config.group_size * longest
    flops = step_flops(counter.get_total_flops(), real.lengths, config, model) / sum(real.lengths) * tokens
    resident, vllm = parts["parameters"] + optimizer, vllm_bytes(longest, config, model)
    layers = len(model.layers)
    return Plan(parts, total, host, resident, *vllm, layers, 0, flops, tokens, 0.0)


def attention_shape(model: TappedModel) -> tuple[int, int, int, int]:
    """Layers, query heads, key heads, head size."""
    shape = model.model.config
    heads = shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return shape.num_hidden_layers, heads, shape.num_key_value_heads, head_size


def vllm_bytes(longest: int, config: Config, model: TappedModel) -> tuple[int, int]:
    """Of a GPU, the least that vLLM needs, and of that the keys and values of a sequence of `longest` tokens."""
    layers, _, key_heads, head_size = attention_shape(model)
    cache = 2 * 2 * longest * layers * key_heads * head_size
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    if config.sampler != "vllm":
        return 0, 0
    return int((weights + cache) / config.tensor_parallel + VLLM_WORKS), cache // config.tensor_parallel


def step_flops(counted: int, lengths: list[int], config: Config, model: TappedModel) -> float:
    """Of scoring and training a micro-batch: what the counter saw, and attention, which it did not.

    A causal pass of attention takes 2 H d T^2 forward, 2.5 times that backward.
    """
    layers, heads, _, head_size = attention_shape(model)
    passes = 2 + recomputed(config, layers) / layers + 2.5  # scoring and training; again; backward
    return counted + passes * 2 * layers * heads * head_size * sum(length**2 for length in lengths)


def logits_bytes(config: Config, model: TappedModel) -> int:
    """Of a chunk of the lens pass: policy's and student's, which their derivatives take the place of."""
    width = 2 if config.dtype == "bfloat16" else 4
    tokens = min(config.lens_chunk_tokens, config.max_tokens_per_gpu)
    return width * 2 * tokens * len(model.model.get_output_embeddings().weight)


def verdicts(found: Plan, config: Config) -> dict[int, str]:
    """For each card: does it fit, and if not, which field to turn."""
    answers = {}
    for card in CARDS:
        room = card * GB - RESERVE
        most = plumbing.largest_share(card * GB, card * GB, found.resident)
        chosen = most if config.vllm_memory == "auto" else config.vllm_memory
        share = chosen * card * GB if config.sampler == "vllm" else 0
        beside = VLLM_SLEEPS if share else 0
        if found.training + beside > room:
            answers[card] = f"no, training takes {found.training / GB:.1f} GB: {fix(found, config, room - beside)}"
        elif found.resident + share > room:
            turn = f"vllm_memory at most {most:.2f}" if share and most > 0.02 else "more GPUs, or cpu_offload"
            answers[card] = f"no, weights, optimizer and vLLM's share together exceed it: {turn}"
        elif share and share < found.vllm_least:
            least = found.vllm_least / (card * GB)
            fits = f"vllm_memory at least {least:.2f}" if least <= most else "more GPUs"
            answers[card] = f"no, vLLM needs {found.vllm_least / GB:.1f} GB: {fits}"
        else:
            answers[card] = "yes" + with_cache(found, share, chosen, most, card)
            answers[card] += with_layers(found, config, room - beside)
    return answers


def with_cache(found: Plan, share: float, chosen: float, most: float, card: int) -> str:
    """How many sequences of full length vLLM holds at once in its share, and in the largest that fits."""
    if not share:
        return ""
    counts = {s: int((s * card * GB - found.vllm_least) / found.vllm_cache) + 1 for s in (chosen, most)}
    more = f", {counts[most]} at {most:.2f}, the most" if most > chosen else ""
    return f"; vllm_memory = {chosen:.2f} holds {counts[chosen]} sequences of full length at once{more}"


def with_layers(found: Plan, config: Config, room: float) -> str:
    """How few decoder layers need to be recomputed, if fewer than now."""
    now = recomputed(config, found.layers)
    keep = min(now, int((room - found.training) / found.kept_layer)) if found.kept_layer else 0
    return f"; recompute_layers = {now - keep} instead of {now} fits, too" if keep > 0 else ""


def fix(found: Plan, config: Config, room: float) -> str:
    """The field whose part is too large."""
    if found.parts["parameters"] + found.parts["gradients"] + found.parts["optimizer"] > 0.9 * room:
        return "more GPUs, lora_rank, or cpu_offload"
    if recomputed(config, found.layers) < found.layers:
        return 'recompute_layers = "all"'
    if found.parts["logits chunk"] > found.parts["activations, rest"]:
        return f"a smaller lens_chunk_tokens than {config.lens_chunk_tokens}"
    return f"a smaller max_tokens_per_gpu than {config.max_tokens_per_gpu}, or more GPUs"


def parse_gpus(words: str) -> int:
    """`4` or `2x8` -> processes. Raises: UserError."""
    machines, cross, gpus = words.partition("x")
    if not (machines.isdecimal() and (gpus.isdecimal() or not cross) and int(machines) * int(gpus or 1) > 0):
        raise UserError(f"--gpus {words}: name the GPUs, like 4, or machines and GPUs of each, like 2x8")
    return int(machines) * int(gpus or 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """`--gpus` and the trainer's own words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", help="how many, like 4, or machines and GPUs of each, like 2x8")
    options, words = parser.parse_known_args(arguments)
    try:
        if not options.gpus:
            raise UserError("--gpus is missing: how many, like 4, or machines and GPUs of each, like 2x8")
        print(report(*oisd.load_config(words), options.gpus))
    except UserError as problem:
        print(f"plan: error: {problem}", file=sys.stderr)
        return 2
    return 0


def report(name: str, config: Config, words: str) -> str:
    gpus = parse_gpus(words)
    plumbing.check_engines(config, gpus)
    found = plan(config, gpus)
    title = f"{name}: {config.model}, {config.dtype}, GPUs: {words}"
    lines = [f"{title}; GB (10^9 bytes) per GPU, planned, not measured"]
    lines += [f"  {part:18} {size / GB:7.2f}" for part, size in found.parts.items()]
    lines.append(f"  {'peak of training':18} {found.training / GB:7.2f}")
    if found.host:
        lines.append(f"  {'on the host':18} {found.host / GB:7.2f}")
    if found.kept_layer:
        lines.append(f"  {'a layer kept':18} {found.kept_layer / GB:7.2f}  more, for each that is not recomputed")
    if config.sampler == "vllm":
        lines.append(f"  {'vLLM needs':18} {found.vllm_least / GB:7.2f}  asleep while the trainer works")
    lines.append(f"{found.flops:.3g} FLOPs a step, if all {found.tokens:,} tokens of full-length rollouts are drawn")
    lines += [f"  {card:3} GB card: {answer}" for card, answer in verdicts(found, config).items()]
    return "\n".join([*lines, f"planned in {found.seconds:.0f} s"])


if __name__ == "__main__":
    sys.exit(main())
