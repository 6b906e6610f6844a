"""What comes from outside: problems, prompts, tokenizers and models, held to what the method takes for granted.

Every mistake in them is a `UserError` of one line, before a step is spent.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from grader import Grader
from settings import UserError, derive_seed, nearest, one_line

if TYPE_CHECKING:
    from oisd import Config, TappedModel

# ----------------------------------------------------- Problems and prompts -------------------------------------------


@dataclass(frozen=True)
class Problem:
    row: int  # of the dataset
    prompt_ids: list[int]
    answer: str  # gold


def read_dataset(source: str):
    """A `datasets.Dataset` from a name[[:configuration]:split], local file or https address. Raises: UserError."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, the UserError says
    loaders = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
    suffix = Path(source.split("?")[0]).suffix
    local = suffix in loaders and "://" not in source
    if local and not Path(source).is_file():
        raise UserError(f"dataset {source!r}: there is no such file")
    if local and not Path(source).stat().st_size:
        raise UserError(f"dataset {source!r} is empty")
    try:
        if suffix in loaders:
            return datasets.load_dataset(loaders[suffix], data_files=source, split="train")
        name, *rest = source.split(":")
        return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train")
    except Exception as problem:  # datasets raises a dozen types here; each means that the source is not readable
        cause = problem.__cause__ or problem  # what datasets says itself is only that an error occurred
        raise UserError(f"dataset {source!r} cannot be read: {type(cause).__name__}: {one_line(cause)}") from problem


def column(row: dict, name: str, source: str) -> Any:
    """`row[a][b]` for the field name `a.b`. Raises: UserError that names the columns there are."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = list(value) if isinstance(value, dict) else []
            raise UserError(f"dataset {source!r} has no field {name!r}, only {', '.join(known)}{nearest(part, known)}")
        value = value[part]
    return value


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str | list[dict], config: Config) -> list[int]:
    """The model's own chat template around system message and question -> token ids; used by training and evaluation.

    A question may also be a list of chat messages. Raises: UserError: no such list, or a template that refuses it.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not messages or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") for m in messages
    ):
        raise UserError(f"question {question!r} is neither a text nor a list of messages with role and content")
    if not config.system_prompt:
        messages = [message for message in messages if message["role"] != "system"]
    elif messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=config.thinking
        )
    except TemplateError as problem:
        raise UserError(
            f"the chat template refuses the prompt ({one_line(problem)}); if it is for its system message, "
            'add --system_prompt ""'
        ) from None
    if not ids:
        raise UserError("the chat template renders nothing; set chat_template")
    return ids


def load_problems(source: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> tuple[list[Problem], int]:
    """-> the problems whose prompts fit, and how many did not. Raises: UserError: bad fields or rows, or none left."""
    dataset, problems, too_long = read_dataset(source), [], 0
    for index, row in enumerate(dataset):
        question = column(row, config.question_field, source)
        answer = column(row, config.answer_field, source)
        if not question or answer is None or not str(answer).strip():
            raise UserError(f"dataset {source!r}, row {index}: question {question!r} or answer {answer!r} is missing")
        try:
            ids = prompt_ids(tokenizer, question, config)
        except UserError as problem:
            raise UserError(f"dataset {source!r}, row {index}: {problem}") from None
        if len(ids) > config.max_prompt_tokens:
            too_long += 1
        else:
            problems.append(Problem(index, ids, str(answer).strip()))
    if not problems:
        raise UserError(
            f"dataset {source!r}: none of its {len(dataset)} prompts has at most "
            f"max_prompt_tokens = {config.max_prompt_tokens} tokens"
        )
    return problems, too_long


def fingerprint(problems: Sequence[Problem]) -> str:
    """What a resumed run is held to: how many problems there are, and their prompts and answers as they were."""
    return f"{len(problems)} problems, SHA-256 {hashlib.sha256(repr(problems).encode()).hexdigest()[:16]}"


def check_golds(problems: Sequence[Problem], grader: Grader) -> None:
    """Raises: UserError for a gold answer that does not equal itself: no response could be right."""
    if bad := grader.check_golds([problem.answer for problem in problems]):
        worst = problems[bad[0]]
        raise UserError(f"{len(bad)} gold answers do not equal themselves, first {worst.answer!r} in row {worst.row}")


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as problem:
        raise UserError(f"model = {config.model!r}: no tokenizer: {one_line(problem)}") from None
    tokenizer.chat_template = config.chat_template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"model = {config.model!r} has no chat template; set chat_template to a Jinja template")
    return tokenizer


def end_token_ids(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: models often have several, spread over two files."""
    ids = generation_config.eos_token_id
    ids = {ids} if isinstance(ids, int) else set(ids or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError("the model names no end-of-sequence token, neither in its generation config nor its tokenizer")
    return sorted(ids)


# ----------------------------------------------------- Models ---------------------------------------------------------


def check_packages(config: Config) -> None:
    """Raises: UserError for an optional package that the settings need and that is not installed."""
    needed = {config.tracker: config.tracker != "none", "peft": config.lora_rank > 0}
    needed["flash_attn"] = config.kernel == "flash_attention_2"
    if config.kernel == "varlen" and not torch.cuda.is_available():
        raise UserError("attention = 'varlen' needs a CUDA GPU: leave it 'auto', which is 'sdpa' without one")
    for package, wanted in needed.items():
        if wanted and find_spec(package) is None:
            name = package.replace("_", "-")
            raise UserError(f"these settings need {name}, which is not installed: pip install {name}; see the README")


def read_model_config(config: Config) -> PreTrainedConfig:
    """Raises: UserError for what no model needs to be loaded to see."""
    try:
        found = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as problem:
        raise UserError(f"model = {config.model!r} cannot be loaded: {one_line(problem)}") from None
    layers, positions = getattr(found, "num_hidden_layers", None), getattr(found, "max_position_embeddings", None)
    if layers is None:
        raise UserError(
            f"model = {config.model!r} is a {found.model_type}, no plain language model: name its text model"
        )
    if config.student_layer >= layers:
        raise UserError(
            f"student_layer = {config.student_layer}, but {config.model} has {layers} layers and the last one is the "
            f"teacher; the student is one of 1 to {layers - 1}"
        )
    if config.policy_layer >= layers:
        raise UserError(f"policy_layer = {config.policy_layer}, but {config.model} has {layers} layers; 0 is the last")
    if positions and config.longest_row > positions:
        raise UserError(
            f"{config.prompt_limit} + max_response_tokens = {config.longest_row} exceed the {positions} positions of "
            f"{config.model}; {config.longest_row - positions} fewer would fit"
        )
    return found


def load_model(config: Config, empty_on: str = "") -> tuple[PreTrainedModel, torch.dtype]:
    """-> the model, or its shell on the device `empty_on`, and the dtype of its files, which exports keep.

    What is trained is float32. Under adapters the weights that stay as they are have the dtype of the computation.
    Raises: UserError.
    """
    dtype = getattr(torch, config.dtype) if config.lora_rank else torch.float32
    try:
        model_config = AutoConfig.from_pretrained(config.model)
        settings = {"dtype": dtype, "attn_implementation": config.kernel}
        if empty_on:
            with torch.device(empty_on):
                model = AutoModelForCausalLM.from_config(model_config, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(config.model, **settings)
    except (OSError, ValueError, ImportError) as problem:
        raise UserError(f"model = {config.model!r} cannot be loaded: {one_line(problem)}") from None
    if config.recompute_layers and not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute activations; set recompute_layers = 0")
    remove_dropout(model)
    if config.lora_rank:
        add_adapters(model, config)
    if config.recompute_layers:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.recompute_layers != "all":
            recompute_some(model, config.recompute_layers)
    return model, model_config.dtype or torch.float32


def recompute_some(model: PreTrainedModel, count: int) -> None:
    """Of the layers, all of which recompute their activations, leave `count`, evenly spread. Raises: UserError."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if count > len(layers):
        raise UserError(f"recompute_layers = {count}, but {type(model).__name__} has {len(layers)}: 'all' or fewer")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index * count // len(layers) < (index + 1) * count // len(layers)


def remove_dropout(model: nn.Module) -> None:
    """Old log-probs are scored without dropout, so the update must be too; else ratios are not 1 before any update."""
    for module in model.modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (dropout and name == "p")):  # layerdrop, too
                setattr(module, name, 0.0)


def add_adapters(model: PreTrainedModel, config: Config) -> None:
    """LoRA (arXiv 2106.09685) on every linear layer but the head, in float32, scaled by 2; all else stays as it is."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(derive_seed(config.seed, "adapters"))
    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def check_model(tapped: TappedModel) -> None:
    """Hold the model to what lens, taps and packed rows take for granted, on two short rows of made-up tokens.

    Modelling code is free to scale its logits, to drop arguments that it does not know, to carry a state over a border.
    None of that is an error of its own, and all of it would end in wrong numbers. The model is left in evaluation mode.
    Raises: UserError, one line that says what the model lacks.
    """
    model, name = tapped.model, type(tapped.model).__name__
    for weight, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name}: not every number of the weight {weight} is finite; look at the file it came from")
    V = min(len(tapped.head), len(model.get_input_embeddings().weight))
    length = min(48, tapped.config.longest)
    ids = torch.randint(V, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    last = max(2, length // 3) - 1  # of the first row; up to there the second is equal
    rows = [ids[: last + 1], [*ids[:last], (ids[last] + 1) % V, *ids[last + 1 :]]]
    attention = model.config._attn_implementation
    tapped.eval()
    try:
        model.set_attn_implementation("eager")  # the one that shows its weights
        logits = check_alone(tapped, rows)
        model.set_attn_implementation(attention)
        check_packed(tapped, rows, logits)
    except UserError as problem:
        raise UserError(f"model = {tapped.config.model!r} ({name}) {problem}") from None
    except Exception as problem:  # in code that is not ours, asked for what its authors may not have thought of
        reason = f"cannot be run packed and tapped: {type(problem).__name__}: {one_line(problem)}"
        raise UserError(f"model = {tapped.config.model!r} ({name}) {reason}") from problem
    finally:
        tapped.eval()
        tapped.clear_taps()


def deviation(mine: Tensor, theirs: Tensor) -> float:
    """Size of the difference against the size of `theirs`: one tolerance holds for logits of any scale.

    A norm, not a maximum: a token that an expert's rounding sends elsewhere moves little, a leak moves whole rollouts.
    """
    return ((mine - theirs).norm() / theirs.norm()).item()


def check_tolerance(tapped: TappedModel) -> float:
    """Two routes through one model agree so far; under adapters the weights may be bfloat16.

    In float32, 36 random layers leave 2e-6. A state carried over a border made 2e-4 of freshly initialised weights.
    """
    return 0.05 if tapped.head.dtype == torch.bfloat16 else 3e-5


def check_alone(tapped: TappedModel, rows: list[list[int]]) -> list[Tensor]:
    """Lens, causality, taps and windows, in the model's plain forward pass. -> its logits of each row, (T, V)."""

    def plain_logits(row: list[int]) -> Tensor:
        with tapped.recording(*tapped.taps, packed=False):
            return tapped.model(input_ids=torch.tensor([row], device=tapped.head.device), use_cache=False).logits[0]

    config, tolerance = tapped.config, check_tolerance(tapped)
    logits = [plain_logits(row) for row in rows]
    gap = deviation(tapped.lens(tapped.taps[-1].hidden[0]), logits[1])
    if tapped.model.get_output_embeddings().bias is not None or not gap <= 1e-5:
        raise UserError(f"has a head that does more than unembed: its logits are off by {gap:.2g}, or it adds a bias")
    common = len(rows[0]) - 1
    if not deviation(logits[0][:common], logits[1][:common]) <= tolerance:
        raise UserError("is not causal: a token changes the predictions before it")
    compared = {layer: tapped.taps[layer - 1] for layer in (config.student_layer, len(tapped.layers))}
    for layer, tap in compared.items():
        if tap.query is None:
            raise UserError(f"has no attention in layer {layer} that a tap sees")
    window = tapped.smallest_window
    if window and config.longest_row > window and config.kernel not in ("varlen", "flash_attention_2"):
        raise UserError(
            f"has a sliding window of {window} tokens, but {config.prompt_limit} + max_response_tokens = "
            f"{config.longest_row}; set attention = 'varlen' (needs CUDA), or let them be {window} together"
        )
    if window and window <= 128:  # a row that is longer costs little
        plain_logits((rows[1] * window)[: window + 2])
    for layer, tap in compared.items():
        theirs = tap.weights[0].transpose(0, 1)
        gap = (tapped.attention_seen(tap) - theirs / theirs.sum(-1, keepdim=True)).abs().max().item()
        if not gap <= max(tolerance, 1e-4):
            raise UserError(f"has more than a softmax of queries and keys in layer {layer} (off by {gap:.2g})")
    return logits


def check_packed(tapped: TappedModel, rows: list[list[int]], logits: list[Tensor]) -> None:
    """The rows packed, as the run will pack them, must give the logits that each has alone. Raises: UserError."""
    config, window = tapped.config, tapped.smallest_window
    rows, alone = [row[:window] for row in rows], torch.cat([one[:window] for one in logits])
    batch = tapped.pack_rows(rows)
    positions = batch.position_ids.clone()
    positions[:, len(rows[0]) :] += config.longest_row - len(rows[1])  # the second row as the end of the longest
    far = dataclasses.replace(batch, position_ids=positions)
    for case, training, count, lack in (
        (batch, False, len(alone), "a rollout alone has other log-probs"),
        (batch, True, len(alone), "training computes something else than evaluation"),
        (far, True, len(rows[0]), f"positions up to {config.longest_row - 1} change the predictions of short rollouts"),
    ):
        tapped.train(training)
        gap = deviation(F.linear(tapped.hidden_states(case), tapped.head)[:count], alone[:count])
        if not gap <= check_tolerance(tapped):
            raise UserError(f"mixes up packed rows: {lack} (logits are off by {gap:.2g})")
    for kind in getattr(tapped.model.config, "layer_types", None) or []:
        if kind not in ("full_attention", "sliding_attention"):  # short rows would not show it
            raise UserError(f"has layers of the kind {kind!r}; packed rows know full and sliding attention")
