"""`python oisd.py --config FILE:TABLE --plan 4`, or `--plan 2x8`: memory and work of a step before GPUs are rented.

Two micro-batches run through the program's own model, sharding, packing and losses, forward and backward, on PyTorch's
fake tensors: all shapes, no numbers, no weights, no GPU. PyTorch's counters count the first one's FLOPs and what is
alive in the second, which finds the gradients of the first. A micro-batch is the largest that the config allows:
`max_tokens_per_gpu` tokens, nearly all of them responses. Arithmetic adds AdamW's two float32 moments (the trackers
also count the global shapes by which DTensor plans an optimizer's step), vLLM's share, and RESERVE for the CUDA
context, NCCL and fragmentation.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

import oisd
from oisd import Config, Rollout, TappedModel, UserError

CARDS = (24, 40, 80, 141)  # GB, as cards are named: 10^9 bytes
RESERVE = 1.5e9  # bytes
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
    flops: float
    tokens: int  # of a step whose responses all have full length
    seconds: float  # that planning took


def planned_attention(module, query, key, value, mask, scaling=None, **_):
    """FlashAttention's tensors: sdpa itself would choose its T x T form, since fake tensors are on no known device."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2), None


AttentionInterface.register("planned", planned_attention)
AttentionInterface.register("planned", oisd._tapped_attention("planned"))


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
    sums = model(batch)
    (sums.pop("token_loss_sum") + sums.pop("step_loss_sum")).backward()


def plan(config: Config, gpus: int) -> Plan:
    """Raises: UserError if the model's config cannot be read."""
    start = time.monotonic()
    config = dataclasses.replace(config, attention="planned")
    real = oisd.pack(longest_batch(config), config)
    shell = TappedModel(oisd.load_model(config, empty_on="meta")[0], config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = {name: value for name, value in vars(real).items() if isinstance(value, torch.Tensor)}
            batch = dataclasses.replace(real, **{name: mode.from_tensor(value) for name, value in tensors.items()})
            model = fake_model(shell, mesh, config)
            with FlopCounterMode(display=False) as counter:  # apart: it keeps alive what it counted
                micro_batch(model, batch)
            with (tracker := FSDPMemTracker(model)):
                micro_batch(model, batch)  # with the gradients of the one before
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        optimizer = 8 * sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
        logits = logits_bytes(config, model)
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
    shape = model.model.config
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    longest = config.max_prompt_tokens + config.max_response_tokens
    cache = 2 * 2 * longest * shape.num_hidden_layers * shape.num_key_value_heads * head_size  # K and V, bfloat16
    weights = 2 * sum(parameter.numel() for parameter in model.model.parameters())
    sampler = (weights + cache) // config.tensor_parallel if config.sampler == "vllm" else 0
    tokens = config.prompts_per_step * config.group_size * longest
    # Scoring before the update is one more forward pass, of four with checkpointing, of three without. The counter does
    # not know this attention: 2 H d T^2 of a causal pass forward, 2.5 times that backward.
    flops = counter.get_total_flops() * (5 / 4 if config.gradient_checkpointing else 4 / 3)
    passes = 2 + config.gradient_checkpointing + 2.5
    squares = sum(length**2 for length in real.lengths)
    flops += passes * 2 * shape.num_hidden_layers * shape.num_attention_heads * head_size * squares
    flops /= sum(real.lengths)
    resident = parts["parameters"] + optimizer
    return Plan(parts, total, host, resident, sampler, flops * tokens, tokens, time.monotonic() - start)


def logits_bytes(config: Config, model: TappedModel) -> int:
    """What `lens_chunk` holds at its peak beside its inputs."""
    n, (V, D) = config.lens_chunk_tokens, model.model.get_output_embeddings().weight.shape
    dtype = getattr(torch, config.dtype)
    with FakeTensorMode():
        hidden, head = [torch.empty(n, D, dtype=dtype) for _ in range(2)], torch.empty(V, D, dtype=dtype)
        targets = torch.zeros(n, dtype=torch.long)
        with (tracker := MemTracker()):
            oisd.lens_chunk(*hidden, head, targets, lambda logprobs, js: (logprobs + js).sum(), config)
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def verdicts(found: Plan, config: Config) -> dict[int, str]:
    """For each card: does it fit, and if not, which field to turn."""
    answers = {}
    for card in CARDS:
        room = card * GB - RESERVE
        share = config.vllm_memory * card * GB if config.sampler == "vllm" else 0
        if found.training > room:
            answers[card] = f"no, training takes {found.training / GB:.1f} GB: {mend(found, config, room)}"
        elif found.resident + share > room:
            most = (room - found.resident) / (card * GB)
            most = f"vllm_memory at most {most:.2f}" if share and most > 0.02 else "more GPUs, or cpu_offload"
            answers[card] = f"no, weights, optimizer and vLLM's share together exceed it: {most}"
        elif share and share < found.vllm_least:
            least = found.vllm_least / (card * GB)
            answers[card] = f"no, vLLM needs {found.vllm_least / GB:.1f} GB: vllm_memory at least {least:.2f}"
        else:
            answers[card] = "yes"
    return answers


def mend(found: Plan, config: Config, room: float) -> str:
    """The field whose part is too large."""
    if found.parts["parameters"] + found.parts["gradients"] + found.parts["optimizer"] > 0.9 * room:
        return "more GPUs, lora_rank, or cpu_offload"
    if not config.gradient_checkpointing:
        return "gradient_checkpointing = true"
    if found.parts["logits chunk"] > found.parts["activations, rest"]:
        return f"a smaller lens_chunk_tokens than {config.lens_chunk_tokens}"
    return f"a smaller max_tokens_per_gpu than {config.max_tokens_per_gpu}, or more GPUs"


def parse_gpus(words: str) -> int:
    """`4` or `2x8` -> processes. Raises: UserError."""
    machines, cross, gpus = words.partition("x")
    if not (machines.isdecimal() and (gpus.isdecimal() or not cross) and int(machines) * int(gpus or 1) > 0):
        raise UserError(f"--plan {words}: name the GPUs, like 4, or machines and GPUs of each, like 2x8")
    return int(machines) * int(gpus or 1)


def report(name: str, config: Config, words: str) -> str:
    gpus = parse_gpus(words)
    if gpus % config.tensor_parallel:
        raise UserError(f"tensor_parallel = {config.tensor_parallel} does not divide the {gpus} GPUs of --plan {words}")
    found = plan(config, gpus)
    title = f"{name}: {config.model}, {config.dtype}, GPUs: {words}"
    lines = [f"{title}; GB (10^9 bytes) per GPU, planned, not measured"]
    lines += [f"  {part:18} {size / GB:7.2f}" for part, size in found.parts.items()]
    lines.append(f"  {'peak of training':18} {found.training / GB:7.2f}")
    if found.host:
        lines.append(f"  {'on the host':18} {found.host / GB:7.2f}")
    if config.sampler == "vllm":
        lines.append(f"  {'vLLM needs':18} {found.vllm_least / GB:7.2f}  asleep while the trainer works")
    lines.append(f"{found.flops:.3g} FLOPs a step, if all {found.tokens:,} tokens of full-length rollouts are drawn")
    lines += [f"  {card:3} GB card: {answer}" for card, answer in verdicts(found, config).items()]
    return "\n".join([*lines, f"planned in {found.seconds:.0f} s"])
