"""Models: loading, adapters, recomputation, checks without weights, and bfloat16's rounding."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from support.processes import gather, say
from support.settings import UserError, derive_seed, one_line


def check_packages(attention: str, tracker: str, lora_rank: int) -> None:
    """Check that the optional packages that the settings need are installed. Raises: UserError."""
    if attention == "varlen" and not torch.cuda.is_available():
        raise UserError("attention = 'varlen' needs a CUDA GPU: leave it 'auto'")
    needed = {"flash_attn": attention == "flash_attention_2", "peft": lora_rank > 0}
    needed[tracker] = tracker != "none"
    for package, wanted in needed.items():
        if wanted and find_spec(package) is None:
            name = package.replace("_", "-")
            raise UserError(f"these settings need {name}: pip install {name}")


def check_model_config(model: str, student_layer: int, longest_row: int, prompt_limit: str) -> None:
    """Read a model's config and check what needs no weights. Raises: UserError.

    `longest_row`: tokens that positions must exist for, `prompt_limit` + max_response_tokens.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as problem:
        raise UserError(f"model = {model!r} cannot be loaded: {one_line(problem)}") from None
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        raise UserError(f"model = {model!r} is a {config.model_type}: name its text model")
    if student_layer >= layers:
        raise UserError(
            f"student_layer = {student_layer}, but {model} has {layers} layers: choose a lower one"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest_row > positions:
        raise UserError(
            f"{prompt_limit} + max_response_tokens = {longest_row} exceed the {positions} "
            f"positions of {model}"
        )


def load_model(
    name: str,
    dtype: str,
    attention: str,
    recompute_layers: int | str,
    lora_rank: int,
    seed: int,
    empty_on: str = "",
) -> tuple[PreTrainedModel, torch.dtype]:
    """Load a causal language model: -> it, and the dtype of its files, which exports keep.

    Trained weights are float32. With `lora_rank`, frozen ones have `dtype`. With `empty_on`, the
    model has no weights and is on that device. `seed`: of the adapters. Raises: UserError.
    """
    weights_dtype = getattr(torch, dtype) if lora_rank else torch.float32
    settings = {"dtype": weights_dtype, "attn_implementation": attention}
    try:
        config = AutoConfig.from_pretrained(name)
        if empty_on:
            with torch.device(empty_on):
                model = AutoModelForCausalLM.from_config(config, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **settings)
    except (OSError, ValueError, ImportError) as problem:
        raise UserError(f"model = {name!r} cannot be loaded: {one_line(problem)}") from None
    if recompute_layers and not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute: set recompute_layers = 0")
    remove_dropout(model)
    if lora_rank:
        add_adapters(model, lora_rank, seed)
    if recompute_layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if recompute_layers != "all":
            recompute_some(model, int(recompute_layers))
    return model, config.dtype or torch.float32


def recompute_some(model: PreTrainedModel, count: int) -> None:
    """Let only `count` evenly spaced layers recompute their activations. Raises: UserError."""
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    total = len(layers)
    if count > total:
        raise UserError(f"recompute_layers = {count}, but the model has {total}")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index * count // total < (index + 1) * count // total


def remove_dropout(model: nn.Module) -> None:
    """Set all dropout to 0. Otherwise ratios would not be 1 before the first update."""
    for module in model.modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in list(vars(module).items()):
            named_so = "drop" in name or (is_dropout and name == "p")  # layerdrop, too
            if isinstance(value, float) and named_so:
                setattr(module, name, 0.0)


def add_adapters(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Add LoRA (arXiv 2106.09685) to every linear layer but the head: float32, scaled by 2.

    All other weights are frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(derive_seed(seed, "adapters"))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def sizes(model: nn.Module) -> str:
    """Describe the number of parameters."""
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    return f"{total:.1f} M parameters, {trained:.1f} M of them trained"


def check_same_tensors(model: nn.Module, source: nn.Module | None, gathered: Callable) -> None:
    """Check that a sharded model has every parameter and buffer of `source`, which rank 0 has.

    `gathered(tensor)` is called on all ranks, in the same order. Raises: UserError.
    """

    def named_tensors(module: nn.Module) -> dict[str, Tensor]:
        parameters = module.named_parameters(remove_duplicate=False)  # tied ones by each name
        return dict([*parameters, *module.named_buffers(remove_duplicate=False)])

    loaded = named_tensors(source) if source is not None else {}
    differing = []
    for name, tensor in named_tensors(model).items():
        mine = gathered(tensor)
        if source is None:
            continue
        if name not in loaded or not torch.equal(mine.cpu(), loaded[name].cpu()):
            differing.append(name)
    differing = gather(differing)
    if differing:
        raise UserError(f"{type(model).__name__}: {differing[0]} did not reach the sharded model")


# ---- Weights and bfloat16 -----------------------------------------------------------------------


def spread_weights(model: nn.Module, seed: int) -> None:
    """Move each matrix weight to a random place within its bfloat16 rounding cell.

    Rounded to bfloat16, nothing changes at first. But published weights lie in the middle of their
    cells, where an update shows only after half a cell: 69 % of SmolLM2's weights need 244 updates
    of 1e-6 or more. Spread evenly, the right share of them crosses a border at every update, so the
    mean of the rounded weights follows the float32 ones. This is dithering, done once rather than
    at every rounding (stochastic rounding, arXiv 2010.06192).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = total = 0
    for parameter in model.parameters():
        if parameter.ndim > 1:
            bits = parameter.data.view(torch.int32)  # bfloat16 neighbors are 2^16 apart
            in_middle = (bits & 0xFFFF == 0) & (bits & 0x7FFFFFFF != 0)
            low, high = 1 - 2**15, 2**15
            offset = torch.randint(low, high, bits.shape, generator=generator, dtype=torch.int32)
            bits += offset.to(bits.device) * in_middle
            spread += int(in_middle.sum())
            total += in_middle.numel()
    share = 100 * spread / total
    say(f"spread_weights: {share:.0f} % of the matrices' weights were on the bfloat16 grid")


def local(parameter: Tensor) -> Tensor:
    """Return this rank's shard of a parameter, sharing its memory, without gradient."""
    return parameter.data.to_local() if isinstance(parameter, DTensor) else parameter.data


def bfloat16_images(model: nn.Module, most: int = 2**22) -> Tensor:
    """Round some of this rank's trained weights to bfloat16, always the same ones."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stride = -(-sum(parameter.numel() for parameter in trained) // most)
    return torch.cat([local(parameter).flatten()[::stride].bfloat16() for parameter in trained])


def moved_weights(model: nn.Module, start: Tensor) -> float:
    """Measure the share of the trained weights whose bfloat16 image differs from `start`."""
    moved = bfloat16_images(model) != start
    counts = gather([(int(moved.sum()), len(moved))])
    return sum(count for count, _ in counts) / sum(size for _, size in counts)
