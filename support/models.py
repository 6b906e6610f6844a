"""Models: loading, adapters, recomputation, checks without weights, and bfloat16's rounding."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    logging,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import CONFIG_NAME, cached_file

from support.processes import gather, say
from support.run_folder import hash_files
from support.settings import UserError, derive_seed, one_line, type_and_message

logging.disable_progress_bar()  # a bar for each loading and writing


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


# ---- Files -------------------------------------------------------------------------------------


# The files of a model's folder that are read. Others may change.
FILES = (
    "*.safetensors pytorch_model*.bin *.index.json *config.json "
    "*token*.json chat_template* *.model vocab* merges.txt"
).split()


def model_files(folder: Path) -> list[Path]:
    """List the files of a model that are read, by name."""
    return sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})


def check_folder(model: str) -> None:
    """Check that a local model is there and its files are whole. Raises: UserError."""
    folder = Path(model)
    where = f"model = {model!r}"
    if not folder.is_dir():
        on_hub = not model.startswith(("/", ".", "~")) and model.count("/") < 2
        if folder.is_file() or not on_hub:
            raise UserError(f"{where} is not a folder (a run that is resumed needs it again)")
        return
    if not (folder / "config.json").is_file():
        final = folder / "final"
        hint = f"; did you mean {final}?" if final.is_dir() else ""
        raise UserError(f"{where} has no config.json, so it is not a model{hint}")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{where} is an adapter of PEFT: merge it into its base model first")
    for path in model_files(folder):
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{where}: {path.name} is a Git LFS pointer: run git lfs pull")
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "pt")  # reads the header and compares sizes
            except SafetensorError as problem:
                reason = f"{path.name} is damaged: {one_line(problem)}"
                raise UserError(f"{where}: {reason}; copy it again") from None


def load_failure(problem: Exception) -> str:
    """Describe why a library could not load files."""
    if "trust_remote_code" in str(problem):
        return "it needs trust_remote_code: only architectures of Transformers are supported"
    if "attention implementation" in str(problem):
        return "it lacks this attention kernel, usually because it caps its attention scores"
    if isinstance(problem, pickle.UnpicklingError):
        return "a file of weights is damaged: copy it again"
    return type_and_message(problem)


def read_config(model: str) -> PreTrainedConfig:
    """Read a model's config.json. Raises: UserError."""
    check_folder(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as problem:  # files of any kind, read by third-party code
        kind = "cannot be loaded" if Path(model).is_dir() else "is not a folder, nor on the Hub"
        raise UserError(f"model = {model!r} {kind}: {load_failure(problem)}") from None
    if getattr(config, "num_hidden_layers", None) is None:
        raise UserError(f"model = {model!r} is a {config.model_type}: name its text model")
    return config


def read_generation_config(model: str) -> GenerationConfig:
    """Read generation_config.json, or the same from config.json if there is none.

    Raises: UserError if it cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(model)
    except Exception as problem:  # files of any kind, read by third-party code
        missing = isinstance(problem, OSError) and "valid JSON" not in str(problem)
        if not missing:
            reason = type_and_message(problem)
            raise UserError(f"model = {model!r}: generation_config.json: {reason}") from None
    return GenerationConfig.from_model_config(read_config(model))


def drop_invalid(generation_config: GenerationConfig) -> None:
    """Unset the fields that Transformers reads but refuses to write, such as an unused top_p."""
    try:
        generation_config.validate(strict=True)
    except ValueError as problem:
        fields = generation_config.to_diff_dict()
        names = sorted(name for name in fields if f"- `{name}`:" in str(problem))
        for name in names:
            setattr(generation_config, name, None)
            say(f"final/generation_config.json will lack {name}, which has no effect")


def file_hashes(model: str) -> dict[str, str]:
    """Hash what a model is made of: -> start of SHA-256, by file name."""
    return hash_files(model_files(local_folder(model)))


def local_folder(model: str) -> Path:
    """Find a model's files, which are in a cache if it is from the Hub."""
    return Path(model) if Path(model).is_dir() else Path(cached_file(model, CONFIG_NAME)).parent


# ---- Models ------------------------------------------------------------------------------------


def check_model_config(
    model: str, student_layer: int, longest_row: int, prompt_limit: str
) -> PreTrainedConfig:
    """Read a model's config and check what needs no weights: -> the config. Raises: UserError.

    `longest_row`: tokens that positions must exist for, `prompt_limit` + max_response_tokens.
    """
    config = read_config(model)
    layers = config.num_hidden_layers
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
    return config


def load_weights(
    name: str, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, torch.dtype]:
    """Load a causal language model: -> it, and the dtype of its files, which exports keep.

    Transformers fills missing weights at random and ignores those it does not know. Here both are
    a UserError, like other shapes, and weights that are not finite.
    """
    files_dtype = check_headers(name)
    try:
        settings = {"dtype": dtype, "attn_implementation": attention}
        model = AutoModelForCausalLM.from_pretrained(name, **settings)
    except Exception as problem:  # files of any kind, read by third-party code
        raise UserError(f"model = {name!r} cannot be loaded: {load_failure(problem)}") from None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise UserError(
            f"model = {name!r}: its head differs from its embedding, but config.json ties them: "
            "set tie_word_embeddings to false there"
        )
    check_values(name, model.named_parameters())
    return model, files_dtype


def check_values(name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check that weights are finite, and no matrix is all zeros. Raises: UserError."""
    for weight, tensor in weights:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())  # nan if one is; 20 times as fast as isfinite
        if not (low.isfinite() and high.isfinite()):
            raise UserError(f"model = {name!r}: the weight {weight} is not finite")
        if tensor.ndim > 1 and low == high == 0:  # as after a copy that was cut short
            raise UserError(f"model = {name!r}: the weight {weight} is all zeros")


def stored_weights(name: str) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a model's safetensors files, one at a time: -> name, tensor."""
    for path in sorted(local_folder(name).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for weight in file.keys():  # noqa: SIM118  it is not a dict
                yield weight, file.get_tensor(weight)


def check_headers(name: str) -> torch.dtype:
    """Check that a model's files have its weights, no others, and in its shapes: -> their dtype.

    Only the headers are read. Raises: UserError.
    """
    if getattr(read_config(name), "quantization_config", None):
        raise UserError(f"model = {name!r} is quantized: use the model that it was made from")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the UserError says it in one line
    try:
        empty, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto",  # config.json's, or else that of the first weight
            device_map="meta",
            attn_implementation="eager",  # which every model supports
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed
        )
    except Exception as problem:  # files of any kind, read by third-party code
        raise UserError(f"model = {name!r} cannot be loaded: {load_failure(problem)}") from None
    finally:
        logging.set_verbosity(verbosity)
    kinds = {
        "missing": found["missing_keys"],
        "unexpected": found["unexpected_keys"],
        "mismatched": {weight for weight, *_ in found["mismatched_keys"]},
    }
    parts = [
        f"{kind} weights ({len(weights)}, such as {min(weights)})"
        for kind, weights in kinds.items()
        if weights
    ]
    if parts:
        fix = "its config.json and its weights do not fit"
        raise UserError(f"model = {name!r} has {' and '.join(parts)}: {fix}")
    return empty.dtype


def load_model(
    name: str,
    dtype: str,
    attention: str,
    recompute_layers: int | str,
    lora_rank: int,
    seed: int,
    empty_on: str = "",
) -> tuple[PreTrainedModel, torch.dtype]:
    """Load a causal language model to train: -> it, and the dtype of its files.

    Trained weights are float32. With `lora_rank`, frozen ones have `dtype`. With `empty_on`, the
    model has no weights and is on that device. `seed`: of the adapters. Raises: UserError.
    """
    weights_dtype = getattr(torch, dtype) if lora_rank else torch.float32
    if empty_on:
        config = read_config(name)
        files_dtype = config.dtype or torch.float32
        settings = {"dtype": weights_dtype, "attn_implementation": attention}
        with torch.device(empty_on):
            model = AutoModelForCausalLM.from_config(config, **settings)
    else:
        model, files_dtype = load_weights(name, weights_dtype, attention)
    if recompute_layers and not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute: set recompute_layers = 0")
    remove_dropout(model)
    if lora_rank:
        add_adapters(model, lora_rank, seed)
    if recompute_layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if recompute_layers != "all":
            recompute_some(model, int(recompute_layers))
    return model, files_dtype


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
