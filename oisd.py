"""OISD: On-Policy Internal Self-Distillation (arXiv 2605.29089), the complete method in one file.

A language model answers math problems, correct answers are rewarded, and GRPO raises their
probability. OISD adds two losses on the same rollouts, from the same forward pass. The final layer
L teaches one intermediate layer l, the student,

    what to think:  JS between both layers' next-token distributions, read with the logit lens
    where to look:  JS between both layers' attention, over a sampled set of keys

Both are weighted by the signed, clipped advantage: good rollouts pull the student toward the final
layer, bad ones push it away. Only the final layer acts, so nothing is added to inference.
One step, with the paper's equations:

    1  draw B prompts; sample G responses to each from the final layer         `sample_rollouts`
    2  reward 1 if the last \\boxed{} equals the gold answer, else 0            `Grader`
    3  old_logprobs = log pi(y_t | y_<t) before any update                     `set_old_logprobs`
    4  A = (r - mean_G) / (std_G + 1e-6), exactly 0 in a group that agrees     `group_advantages`
    5  for each mini-batch of prompts: R rollouts, rollout i with T_i response tokens,
       N tokens in all, and S_i of them sampled as decoding steps
    6     h^l, q^l, k^l, h^L, q^L, k^L from one forward pass                   `TappedModel`
    7     L_GRPO  = 1/N sum_i sum_t -min(ratio A, clip(ratio) A)               `policy_loss_sum`
    8     L_think = 1/R sum_i 1/T_i sum_t clip(A) JS(p^l || sg p^L)            Eq. 5-7
    9     L_attn  = 1/R sum_i 1/S_i sum_t clip(A) mean_h JS(a^l,h || sg a^L,h) Eq. 8-10
   10     an AdamW step on L_GRPO + think_weight L_think + attention_weight L_attn, Eq. 11

    python oisd.py                                               a small model learns, on a laptop
    accelerate launch oisd.py --config configs.toml:qwen3_4b     the paper's main run

Where the paper is silent: the gradient of L_think reaches head and norm too; tau = c = 1; up to 64
decoding steps per rollout, evenly spaced so that any split into batches agrees; 64 local and up to
64 strided keys. docs/choices.md lists all choices.

Generic training code is in `support/`, which knows nothing of this file. Baselines plug in through
`Method`; those in `baselines/` show how.

Dimensions are single capitals:
    B prompts   G rollouts per prompt   R rollouts of an update   T tokens of a packed micro-batch
    N response tokens and S sampled decoding steps: of a micro-batch in shapes, of an update in loss
    V vocabulary   D hidden size   H query heads   Q key/value heads   d head size   K sampled keys
One alignment rule: index t is the *predicted* token; the position that predicts it is t - 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal, NamedTuple

# Let idle OpenMP threads sleep quickly: 5x faster on a shared CPU. Must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if __name__ == "__main__" and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
    print("oisd: loading torch and transformers, 5 to 15 seconds", file=sys.stderr, flush=True)

import pydantic
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support import models, packed_attention, problems, processes, run_folder
from support.check_model import check_model
from support.grader import Grader
from support.hf_sampler import HfSampler, Sample
from support.kernels import add_product, chunked_logits, lens_rows, log_ratios, product_dtype
from support.problems import Problem
from support.processes import TrainingError, doing, from_rank_0, gather, rank, say, world
from support.settings import UserError, derive_seed, load_settings
from support.types import AboveOne, AtLeastOne, Count, NotNegative, Positive, Share, Text
from support.vllm_engine import repack_tied_head, start_engine

VERSION = "0.7"

# ---- Config ------------------------------------------------------------------------------------

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # BuPO's


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class Config:
    """Every setting of a run. The comment beside a field is its line in `--help`."""

    program: ClassVar[str] = "oisd.py"
    default_program: ClassVar[str] = "oisd.py"  # of a table that names none
    also_takes: ClassVar[tuple[str, ...]] = ()  # programs whose tables this one takes, too
    table: ClassVar[str] = "tiny"  # the default table of configs.toml
    resumable: ClassVar[bool] = True
    prompt_limit: ClassVar[str] = "max_prompt_tokens"  # field that limits the longest prompt
    paths: ClassVar[tuple[str, ...]] = ("model", "train_data", "test_data")

    # Model and problems
    model: Text = "tiny/middle"  # Hugging Face name or folder of a decoder-only model
    train_data: Text = "tiny/sums/train.jsonl"  # name[[:configuration]:split], file or https URL
    test_data: str = ""  # held-out problems, likewise; "" for none
    question_field: Text = "question"  # column: text or list of chat messages; a.b for nested ones
    answer_field: Text = "answer"  # column with the gold answer; a.b for nested ones
    system_prompt: str = SYSTEM_PROMPT  # system message, unless the data has one; "" for none
    chat_template: str = ""  # Jinja template for models that have none; "" for the tokenizer's own
    thinking: bool = False  # passed to the chat template as `enable_thinking`
    max_prompt_tokens: AtLeastOne = 1024  # longer prompts are dropped and counted
    max_response_tokens: AtLeastOne = 8192  # longer responses are truncated
    # Rollouts
    sampler: Literal["hf", "vllm"] = "vllm"  # Transformers' generate, or an in-process vLLM engine
    temperature: Positive = 1.0  # of sampling and of the policy's log-probs
    prompts_per_step: AtLeastOne = 128  # B
    group_size: Annotated[int, pydantic.Field(ge=2)] = 8  # G, rollouts per prompt
    max_logprob_gap: NotNegative = 0.0  # largest sampler-trainer gap, nats; 0: default for dtype
    importance_cap: NotNegative = 0.0  # truncate importance weights trainer/sampler; 0 disables
    sampler_batch: AtLeastOne = 256  # sequences that the hf sampler generates at once
    vllm_memory: Share | Literal["auto"] = "auto"  # vLLM's share of the GPU; "auto": all that fits
    vllm_eager: bool = False  # no CUDA graphs in vLLM; CPU engines are always eager
    # Policy
    num_steps: Count = 300  # steps of the run; each draws new rollouts
    mini_batch_prompts: AtLeastOne = 32  # prompts per optimizer update
    learning_rate: Positive = 1e-6  # of AdamW, constant
    weight_decay: NotNegative = 0.01  # of AdamW
    max_grad_norm: Positive = 1.0  # gradient clipping
    clip_low: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.2  # ratios are clipped at 1 - this
    clip_high: NotNegative = 0.2  # importance ratios are clipped above at 1 + clip_high
    dual_clip: AboveOne = 10.0  # largest loss where A < 0, as a multiple of |A|
    mask_truncated: bool = False  # leave truncated responses out of every loss
    policy_weight: NotNegative = 1.0  # weight of L_GRPO; 0 trains the internal losses only
    # OISD
    student_layer: AtLeastOne = 6  # l, counted from 1; the last layer is the teacher
    think_weight: NotNegative = 1.0  # weight of L_think; 0 disables
    attention_weight: NotNegative = 0.1  # weight of L_attn; 0 disables
    internal_mean: Literal["rollout", "token"] = "rollout"  # average by rollout (Eq. 7-11) or token
    lens_norm: bool = True  # read the student through the final norm (Eq. 5); BuPO's code does not
    measure_js: bool = True  # log both JS even if their weights are 0
    distill_temperature: Positive = 1.0  # tau, temperature of both lens distributions
    advantage_clip: Positive = 1.0  # c; the internal losses are weighted by clip(A, -c, c)
    lens_grad: Literal["all", "hidden"] = "all"  # "hidden": no gradient of L_think to head and norm
    attention_steps: AtLeastOne = 64  # sampled decoding steps per rollout
    attention_window: AtLeastOne = 64  # keys of the local window, including the query's position
    attention_strided: Count = 64  # maximum number of strided keys before the window
    # Compute
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of compute; trained weights are float32
    spread_weights: bool = False  # spread float32 weights within their bfloat16 rounding cells
    attention: Literal["auto", "varlen", "sdpa", "flash_attention_2"] = "auto"  # kernel
    recompute_layers: Count | Literal["all"] = "all"  # layers that recompute their activations
    lora_rank: Count = 0  # train adapters of this rank on all linear layers but the head; 0: none
    max_tokens_per_gpu: AtLeastOne = 16384  # limit of a packed micro-batch, prompts included
    lens_chunk_tokens: AtLeastOne = 1024  # tokens whose logits exist at the same time
    grader_seconds: Positive = 10.0  # time limit per response; past it the score is 0
    grader_workers: AtLeastOne = 2  # grader processes per rank
    seed: Count = 0  # every random draw follows from this and the step
    # Output
    output_dir: str = ""  # "" for runs/<table>, or the next free runs/<table>-2, -3, ...
    resume: str = ""  # folder of a run to continue from its newest checkpoint
    checkpoint_every: Count = 50  # steps; 0 for the end and interruptions only
    checkpoints_kept: AtLeastOne = 2  # older ones are deleted
    rollouts_every: Count = 10  # write all rollouts of every N-th step; 0 disables
    eval_every: Count = 0  # evaluate held-out problems every N steps; 0 for start and end only
    eval_problems: Count = 0  # number of held-out problems; 0 for all
    eval_samples: AtLeastOne = 1  # responses per held-out problem
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # also log there, through Accelerate

    def __post_init__(self) -> None:
        """Check combinations of fields. Raises: UserError."""
        if self.resume and not self.resumable:
            raise UserError(f"{self.program}: runs cannot be resumed; start a new one")
        total, size = self.prompts_per_step, self.mini_batch_prompts
        if total % size:
            raise UserError(f"mini_batch_prompts = {size} must divide prompts_per_step = {total}")
        if self.spread_weights and (self.dtype == "float32" or self.lora_rank):
            raise UserError("spread_weights needs dtype = 'bfloat16' and lora_rank = 0")
        if self.attention in ("varlen", "flash_attention_2") and self.dtype == "float32":
            raise UserError(f"attention = {self.attention!r} needs bfloat16, not dtype = 'float32'")
        if self.max_tokens_per_gpu < self.longest_row:
            limit = f"{self.prompt_limit} + max_response_tokens = {self.longest_row}"
            raise UserError(
                f"max_tokens_per_gpu = {self.max_tokens_per_gpu} must be at least {limit}"
            )

    @property
    def kernel(self) -> str:
        """The attention kernel, with "auto" resolved."""
        if self.attention != "auto":
            return self.attention
        flash = torch.cuda.is_available() and self.dtype == "bfloat16"
        return "varlen" if flash else "sdpa"

    @property
    def longest(self) -> int:
        """Tokens of the longest possible rollout."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that the trainer may see; OPSD's teacher has longer prompts."""
        return max(self.longest, getattr(self, self.prompt_limit) + self.max_response_tokens)

    @property
    def logprob_gap_limit(self) -> float:
        return self.max_logprob_gap or (1e-3 if self.dtype == "float32" else 0.1)


# A resumed run may change these; any other change would be a different experiment.
FREE_ON_RESUME = (
    "output_dir resume num_steps checkpoint_every checkpoints_kept rollouts_every eval_every "
    "tracker grader_seconds grader_workers max_tokens_per_gpu lens_chunk_tokens recompute_layers "
    "sampler_batch vllm_memory vllm_eager max_logprob_gap"
).split()


def load_config(
    arguments: Sequence[str] | None = None, kind: type[Config] = Config
) -> tuple[str, Config]:
    """Read the command line: -> name of the table, and its Config. Raises: UserError."""
    description = sys.modules[kind.__module__].__doc__ or ""
    return load_settings(kind, arguments, description, VERSION, FREE_ON_RESUME)


def load_problems(source: str, tokenizer: Tokenizer, config: Config) -> tuple[list[Problem], int]:
    """Load problems as the config says: -> those that fit, and how many did not."""
    fields = config.question_field, config.answer_field
    prompt = config.system_prompt, config.thinking, config.max_prompt_tokens
    return problems.load_problems(source, tokenizer, *fields, *prompt)


def load_model(config: Config, empty_on: str = "") -> tuple[PreTrainedModel, torch.dtype]:
    """Load the model as the config says: -> it, and the dtype of its files."""
    compute = config.dtype, config.kernel, config.recompute_layers
    return models.load_model(config.model, *compute, config.lora_rank, config.seed, empty_on)


# ---- Rollouts ----------------------------------------------------------------------------------


@dataclass
class Rollout(processes.CompactPickle):
    """One response. The response mask comes from lengths, never from token values."""

    prompt_ids: list[int]
    response_ids: list[int]  # including the EOS token, if one was drawn
    sampler_logprobs: list[float]  # nats, per response token, at the sampling temperature
    finish_reason: str  # "stop": an EOS token; "length": truncated
    row: int = -1  # of the dataset
    reward: float = 0.0
    advantage: float | Tensor = 0.0  # one for the response, or (response length,)
    old_logprobs: Tensor | None = None  # (response length,), the trainer's before any update
    notes: dict[str, Any] = field(default_factory=dict)  # a baseline's own data
    extra_tokens: int = 0  # tokens that a baseline adds to the micro-batch

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class VllmSampler:
    """Sample with a vLLM engine in this process. Same interface as HfSampler."""

    def __init__(
        self, config: Config, end_ids: list[int], device: torch.device, sleeps: bool = True
    ):
        self.config = config
        self.end_ids = end_ids
        self.device = device
        self.asleep = False
        self.ghost_bytes = 0
        step_sequences = math.ceil(config.prompts_per_step / world()) * config.group_size
        self.engine, self.SamplingParams = start_engine(
            device,
            model=config.model,
            dtype=config.dtype,
            seed=config.seed,  # each request has its own
            max_model_len=config.longest,
            # vLLM keeps a row of the vocabulary for each sequence. An evaluation has no steps.
            max_num_seqs=min(step_sequences, 1024) if sleeps else 1024,
            # "auto" is left on CPUs only, where vLLM just checks it
            gpu_memory_utilization=0.4 if config.vllm_memory == "auto" else config.vllm_memory,
            enforce_eager=config.vllm_eager,
            enable_sleep_mode=sleeps and device.type == "cuda",
            generation_config="vllm",  # the model's own top-k or penalty would bias every ratio
            logprobs_mode="processed_logprobs",  # after the temperature, as the trainer's
        )

    def sleep(self) -> None:
        """Release the GPU's memory. Level 2 drops the weights; `sync` brings new ones."""
        if self.device.type == "cuda":
            self.engine.sleep(level=2)
            # vLLM unmaps this memory, but PyTorch still counts it (vllm#17117). At the first sleep
            # nothing else is allocated.
            self.ghost_bytes = self.ghost_bytes or torch.cuda.memory_allocated(self.device)
            self.asleep = True

    def close(self) -> None:
        """End the engine and the process group it shares."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up()  # unmapped memory cannot be freed
        self.engine.llm_engine.engine_core.shutdown()

    def sync(self, model: PreTrainedModel) -> None:
        """Copy the trainer's weights into the engine, one parameter at a time; drop old caches."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # give vLLM what PyTorch keeps for the next backward pass
            self.engine.wake_up(tags=["weights"])
        weights = full_weights(model, getattr(torch, self.config.dtype))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.device.type == "cpu" and model.config.tie_word_embeddings:
            repack_tied_head(self.engine)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the gathered weights
            self.engine.wake_up(tags=["kv_cache"])
        self.asleep = False
        self.engine.reset_prefix_cache()

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[Sample]:
        """Yield a response per prompt and seed, in the order in which they finish."""
        temperature = self.config.temperature if self.config.temperature >= 0.01 else 0.0  # greedy
        sampling = [
            self.SamplingParams(
                temperature=temperature,
                max_tokens=self.config.max_response_tokens,
                seed=seed,
                logprobs=0,  # of the drawn token only
                flat_logprobs=True,  # one list, not an object per token
                stop_token_ids=self.end_ids,
                detokenize=False,  # token ids end to end
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        requests = self.engine.enqueue(inputs, sampling, use_tqdm=False)
        # vLLM appends -<random> to the id that its results carry
        index_of = {request.partition("-")[0]: i for i, request in enumerate(requests)}
        while index_of:
            for result in self.engine.llm_engine.step():
                index = index_of.pop(result.request_id)
                output = result.outputs[0]
                response = list(output.token_ids)
                logprobs = list(output.logprobs.logprobs)
                finish = output.finish_reason
                if finish not in ("stop", "length") or not len(response) == len(logprobs) > 0:
                    count = len(response)
                    raise RuntimeError(f"vLLM ended a response of {count} tokens by {finish!r}")
                yield index, response, logprobs, finish


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded parameter. All ranks must ask in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each weight as in the model's files: gathered, adapters merged.

    Tied weights come once. All ranks must iterate to the end.
    """
    in_files = model.state_dict().keys()  # also reshards what an evaluation left gathered
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in in_files]
    for name, tensor in [*model.named_parameters(), *buffers]:
        owner, adapted, last = name.rpartition(".base_layer.")
        if adapted and last == "weight":
            delta = full_tensor(model.get_submodule(owner).get_delta_weight("default"))
            yield f"{owner}.weight", (full_tensor(tensor) + delta).to(dtype)
        elif ".lora_" not in name:
            tensor = full_tensor(tensor.detach().to(dtype))
            yield name.replace(".base_layer.", "."), tensor


def hf_sampler(
    config: Config, model: PreTrainedModel, end_ids: list[int], device: torch.device, root=None
) -> HfSampler:
    """Sample with Transformers as the config says."""
    limits = config.temperature, config.max_response_tokens, config.sampler_batch
    return HfSampler(model, end_ids, device, *limits, config.dtype, root)


def sample_rollouts(
    run: Run, problems: Sequence[Problem], copies: int, purpose: str, step: int
) -> list[Rollout]:
    """Sample and grade `copies` rollouts per problem, split over ranks; every rank gets them all.

    Draws follow from (seed, purpose, step, place); they do not depend on the number of ranks.
    """
    first = len(problems) * rank() // world()
    end = len(problems) * (rank() + 1) // world()
    repeated = [problem for problem in problems[first:end] for _ in range(copies)]
    places = range(first * copies, end * copies)
    seeds = [derive_seed(run.config.seed, purpose, step, place) for place in places]
    stream = run.sampler.stream([problem.prompt_ids for problem in repeated], seeds)
    samples = sorted(processes.counted(stream, len(seeds), f"sampling ({purpose})"))
    run.sampler.sleep()
    doing("grading")
    texts = [run.tokenizer.decode(sample[1], skip_special_tokens=True) for sample in samples]
    rewards = run.grader.grade(texts, [problem.answer for problem in repeated])
    rollouts = [
        Rollout(problem.prompt_ids, *sample[1:], row=problem.row, reward=reward)
        for problem, sample, reward in zip(repeated, samples, rewards)
    ]
    return gather(rollouts)


# ---- Advantages --------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Compute GRPO's (r - mean) / (sample std + 1e-6) in each group: (B * G,) -> (B * G,)."""
    groups = rewards.view(-1, group_size)
    return (centered(groups) / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def centered(groups: Tensor) -> Tensor:
    """Subtract each group's mean: (B, G) -> (B, G). Exactly 0 in a group of equal rewards."""
    # where all agree, r - mean may be a rounding error, and so may the std that it is divided by
    agree = (groups == groups[:, :1]).all(1, keepdim=True)
    return (groups - groups.mean(1, keepdim=True)).masked_fill(agree, 0.0)


def set_advantages(run: Run, rollouts: Sequence[Rollout]) -> None:
    """Set the advantages of a step's rollouts from their rewards."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    advantages = group_advantages(rewards, run.config.group_size)
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage


# ---- Packed batches and sampled keys -----------------------------------------------------------


def sample_attention_steps(response_length: int, steps: int) -> list[int]:
    """Choose up to `steps` response tokens, evenly spaced whatever the split: -> indices."""
    count = min(steps, response_length)
    return [index * response_length // count for index in range(count)]


def sample_attention_keys(positions: Tensor, window: int, strided: int) -> tuple[Tensor, Tensor]:
    """Choose the sampled keys C~_t of Eq. 9, over which a query's attention is compared.

    The last `window` positions, including the query's own, and before them up to `strided`
    positions, evenly spaced from 0. Window 3 and strided 2 give query 9 the keys 0 4 | 7 8 9.

    (S,) -> positions (S, strided + window), and which of them are valid; the others are 0.
    """
    query = positions[:, None]  # (S, 1)
    local_start = (query - window + 1).clamp(min=0)
    stride = -(-local_start // max(strided, 1))  # rounded up: at most `strided` fit before it
    far = stride * torch.arange(strided, device=query.device)  # (S, strided): 0, stride, ...
    local = query - torch.arange(window, device=query.device).flip(0)  # (S, window): ..., t-1, t
    keys = torch.cat([far, local], dim=1)
    valid = torch.cat([far < local_start, local >= 0], dim=1)
    return keys.where(valid, 0), valid


@dataclass
class PackedBatch:
    """Rollouts end to end in one row without padding. Position t - 1 predicts the token at t."""

    rollouts: Sequence[Rollout]
    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), from 0 in each rollout
    borders: Tensor  # (rollouts + 1,) int32, where each rollout starts, and T
    lengths: list[int]  # tokens of each rollout
    predicted: Tensor  # (N,) index in the row of each response token
    target_ids: Tensor  # (N,) those tokens
    advantages: Tensor  # (N,) of their rollouts
    old_logprobs: Tensor  # (N,) the trainer's before any update; zeros until they are known
    sampler_logprobs: Tensor  # (N,)
    queries: Tensor  # (S,) index in the row of each sampled decoding step's query
    query_advantages: Tensor  # (S,) of their rollouts
    token_scales: Tensor  # (N,) Eq. 11's averaging, see `pack`
    query_scales: Tensor  # (S,) likewise


def pack(
    rollouts: Sequence[Rollout], config: Config, device: Any = "cpu", update: Sequence[Rollout] = ()
) -> PackedBatch:
    """Concatenate rollouts. Only lengths decide which tokens are the response's.

    `update`: all rollouts of the optimizer update, on all ranks; by default these.

    Two rollouts, "8 9" after the prompt "5 6" and "7 1 4" after "5", with attention_steps = 2:

        index         0 1 2 3  4 5 6 7        borders    0 4 8
        input_ids     5 6 8 9  5 7 1 4        predicted  2 3 5 6 7
        position_ids  0 1 2 3  0 1 2 3        queries    1 2 4 5    before each one's first two

    Without rollouts, the row is one token and no response, N = S = 0, so that a rank that has
    nothing to do still takes part in collectives.
    """
    update = update or rollouts
    N, S = counts(update, config)  # of the update on all ranks, not of this row
    R = max(1, len(update))
    row, positions, borders, predicted, queries = [], [], [0], [], []
    advantages, query_advantages, old_logprobs = [], [], []  # one tensor per rollout
    token_scales, query_scales, sampler_logprobs = [], [], []
    for rollout in rollouts or [Rollout([0], [], [], "stop")]:
        first = len(row) + len(rollout.prompt_ids)  # index of the first response token
        count = len(rollout.response_ids)
        steps = sample_attention_steps(count, config.attention_steps)
        row += rollout.prompt_ids + rollout.response_ids
        positions += range(rollout.length)
        borders.append(len(row))
        predicted += range(first, first + count)
        queries += [first - 1 + step for step in steps]

        advantage = torch.as_tensor(rollout.advantage).expand(count)
        advantages.append(advantage)
        query_advantages.append(advantage[steps])
        old = rollout.old_logprobs
        old_logprobs.append(torch.zeros(count) if old is None else old)
        sampler_logprobs += rollout.sampler_logprobs

        token_scale = query_scale = 1.0
        if config.internal_mean == "rollout" and count:
            # `accumulate_gradients` divides by N and S, which leaves 1 / (R T_i) and 1 / (R S_i)
            token_scale = N / R / count
            query_scale = S / R / len(steps)
        token_scales.append(torch.full((count,), token_scale))
        query_scales.append(torch.full((len(steps),), query_scale))

    input_ids = torch.tensor(row)
    predicted = torch.tensor(predicted, dtype=torch.long)
    tensors = {
        "input_ids": input_ids[None],
        "position_ids": torch.tensor([positions]),
        "borders": torch.tensor(borders, dtype=torch.int32),
        "predicted": predicted,
        "target_ids": input_ids[predicted],
        "advantages": torch.cat(advantages),
        "old_logprobs": torch.cat(old_logprobs),
        "sampler_logprobs": torch.tensor(sampler_logprobs),
        "queries": torch.tensor(queries, dtype=torch.long),
        "query_advantages": torch.cat(query_advantages),
        "token_scales": torch.cat(token_scales),
        "query_scales": torch.cat(query_scales),
    }
    tensors = processes.to_device(tensors, device)
    lengths = [end - start for start, end in pairwise(borders)]
    return PackedBatch(rollouts=rollouts, lengths=lengths, **tensors)


def counts(rollouts: Sequence[Rollout], config: Config) -> tuple[int, int]:
    """Count response tokens, N, and sampled decoding steps, S."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return sum(lengths), sum(min(config.attention_steps, length) for length in lengths)


def my_micro_batches(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[int]]:
    """Split rollouts into micro-batches and return this rank's, as indices. Some may be empty."""
    sizes = [rollout.length + rollout.extra_tokens for rollout in rollouts]
    return processes.split_by_size(sizes, max_tokens, world())[rank() :: world()]


# ---- Taps --------------------------------------------------------------------------------------


class Tap:
    """What one decoder layer computed in the current forward pass; nothing is copied.

    When activation checkpointing runs the layer again, `recording` is off.
    """

    def __init__(self) -> None:
        self.recording = False
        self.packed = False  # this pass is over a packed row: attention must be told its borders
        self.clear()

    def clear(self) -> None:
        self.hidden: Tensor | None = None  # (1, T, D), the residual stream after the layer
        self.query: Tensor | None = None  # (1, H, T, d), after q-norm and rotary embedding
        self.key: Tensor | None = None  # (1, Q, T, d), likewise
        self.scaling = 0.0
        self.window: int | None = None  # keys a query sees, including its own; None: all
        self.weights: Tensor | None = None  # (1, H, T, T) of eager attention, for `check_model`

    def see(self, query: Tensor, key: Tensor, scaling: float | None = None, **settings) -> None:
        """Record attention that is about to be computed. Raises: UserError."""
        if settings.get("softcap") is not None:
            raise UserError("caps its attention scores, which the attention loss does not support")
        self.query = query
        self.key = key
        self.window = settings.get("sliding_window")
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling


_TAPS: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()  # by module


def tapped_attention(name: str) -> Callable:
    """Wrap an attention kernel: show query and key to the layer's tap, then attend.

    Packed rows carry the setting `lengths`, which `TappedModel.decode` passes through the model.
    """
    # Outside packed rows (generation, checks) "varlen" is sdpa.
    registered = ALL_ATTENTION_FUNCTIONS.get("sdpa" if name == "varlen" else name)

    def attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **settings):
        # Only the modeling file knows its eager attention; Transformers registers the others.
        kernel = registered or sys.modules[type(module).__module__].eager_attention_forward
        tap = _TAPS.get(module) or Tap()  # a module outside a tapped model gets one nobody reads
        lengths = settings.pop("lengths", None)  # None: not a packed row
        if tap.packed and lengths is None:
            raise UserError("mixes up packed rows: its layers drop the borders between rollouts")
        if tap.recording:
            tap.see(query, key, **settings)
        if lengths is None:
            output, weights = kernel(module, query, key, value, attention_mask, **settings)
            if tap.recording:
                tap.weights = weights
            return output, weights
        if name == "varlen":
            return packed_attention.flash(query, key, value, **settings), None
        if "flash" in name:  # the flash-attn package reads the borders itself
            return kernel(module, query, key, value, None, **settings)
        row = kernel, module, query, key, value, lengths
        return packed_attention.sequence_by_sequence(*row, **settings), None

    return attention


# This replaces the kernels of Transformers under their names; it asks by name which are flash.
AttentionMaskInterface.register("varlen", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
for _name in ("varlen", "eager", "sdpa", "flash_attention_2"):
    AttentionInterface.register(_name, tapped_attention(_name))


class LossSums(NamedTuple):
    """Sums over a micro-batch. The two losses carry gradient; everything else is detached."""

    token_loss: Tensor  # policy_weight L_GRPO + think_weight L_think, to be divided by N
    step_loss: Tensor  # attention_weight L_attn, to be divided by S
    token_parts: dict[str, Tensor]  # single losses, to be divided by N
    step_parts: dict[str, Tensor]  # likewise by S
    metrics: dict[str, Tensor]  # (2,) each: the sum of some values and their number


class TappedModel(nn.Module):
    """A causal language model whose forward pass ends in the losses.

    They are computed within this module's forward, since it is FSDP's root module: only there are
    the weights of the final norm and the head gathered.
    """

    def __init__(self, model: PreTrainedModel, config: Config):
        super().__init__()
        self.model = model
        self.config = config
        decoder = model.get_decoder()
        stacks = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
        children = decoder.named_children()
        norms = [name for name, module in children if "norm" in type(module).__name__.lower()]
        depth = model.config.num_hidden_layers
        if len(stacks) != 1 or len(stacks[0]) != depth or len(norms) != 1:
            raise UserError(f"{type(model).__name__} is not a stack of layers and one final norm")
        self.norm_name = norms[0]
        self.layers = list(stacks[0])  # a plain list: their parameters belong to the model
        self.taps = [self.tap(layer) for layer in self.layers]

    @staticmethod
    def tap(layer: nn.Module) -> Tap:
        """Attach a tap to a decoder layer."""
        tap = Tap()

        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            if tap.recording:
                tap.hidden = output if isinstance(output, Tensor) else output[0]

        layer.register_forward_hook(record)
        for module in layer.modules():
            _TAPS[module] = tap
        return tap

    @property
    def student_tap(self) -> Tap:
        return self.taps[self.config.student_layer - 1]

    @property
    def units(self) -> list[nn.Module]:
        """Modules that FSDP shards individually."""
        return self.layers

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimizer parameter groups; gradients are clipped per group."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @contextlib.contextmanager
    def recording(self, *taps: Tap, packed: bool) -> Iterator[None]:
        """Let these taps record. In a packed row, every layer's attention must get the borders."""
        for tap in self.taps:
            tap.recording = tap in taps
            tap.packed = packed
        try:
            yield
        finally:
            for tap in self.taps:
                tap.recording = tap.packed = False

    def clear_taps(self) -> None:
        for tap in self.taps:
            tap.clear()

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight  # (V, D), E_u

    def lens_hidden(self, hidden: Tensor, norm: bool = True, detach: bool = False) -> Tensor:
        """Compute LN(h) of Eq. 5, (..., D), or h; `detach`: no gradient to the norm."""
        if norm:
            final_norm = getattr(self.model.get_decoder(), self.norm_name)
            weights = dict(final_norm.named_parameters()) if detach else {}
            frozen = {name: weight.detach() for name, weight in weights.items()}
            hidden = torch.func.functional_call(final_norm, frozen, (hidden,))
        return hidden

    def lens(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """Compute z = E_u LN(h), Eq. 5: (..., D) -> (..., V). Losses use `LensPass`."""
        return F.linear(self.lens_hidden(hidden, norm), self.head)

    def forward(self, task: Callable, *arguments):
        """Run `task(*arguments)`, a method below or generation, with gathered root weights."""
        bfloat16 = self.config.dtype == "bfloat16"
        with torch.autocast(self.head.device.type, torch.bfloat16, enabled=bfloat16):
            return task(*arguments)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Run the decoder over a packed row and fill the taps: -> input of the head, (T, D)."""
        with self.recording(self.student_tap, self.taps[-1], packed=True):
            return self.decode(self.model.get_decoder(), batch)

    @staticmethod
    def decode(decoder: nn.Module, batch: PackedBatch) -> Tensor:
        """Run any decoder of this architecture over a packed row: -> (T, D)."""
        output = decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            # Given four dimensions, Transformers builds no T x T mask. No kernel looks at this one.
            attention_mask=batch.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            use_cache=False,
            cu_seq_lens_q=batch.borders,
            cu_seq_lens_k=batch.borders,
            max_length_q=max(batch.lengths),
            max_length_k=max(batch.lengths),
            lengths=batch.lengths,
        )
        return output.last_hidden_state[0]

    def response_logprobs(self, batch: PackedBatch) -> Tensor:
        """Score the response tokens under the policy, without gradient: -> (N,)."""
        hidden = self.hidden_states(batch)[batch.predicted - 1]
        self.clear_taps()
        return read_tokens(hidden, self.head, batch.target_ids, self.config)[0]

    def losses(self, batch: PackedBatch) -> LossSums:
        """Compute all losses and metrics; a JS neither trained nor measured is left out."""
        config = self.config
        final_hidden = self.hidden_states(batch)[batch.predicted - 1]  # (N, D)
        student_hidden = None
        if config.think_weight or config.measure_js:
            student_hidden = self.student_tap.hidden[0, batch.predicted - 1]  # (N, D)
            with gradient_if(config.think_weight > 0):
                detach = config.lens_grad == "hidden"
                student_hidden = self.lens_hidden(student_hidden, config.lens_norm, detach)
        attention_loss = attention_metrics = None
        if config.attention_weight or config.measure_js:
            with gradient_if(config.attention_weight > 0):
                js = attention_js(self.student_tap, self.taps[-1], batch, config)  # (S,)
                advantages, scales = batch.query_advantages, batch.query_scales
                attention_loss = internal_loss_sum(js, advantages, scales, config)
            attention_metrics = by_sign("attention_js", js.detach(), batch.query_advantages)
        self.clear_taps()
        sums = self.token_losses(final_hidden, student_hidden, batch)
        if attention_loss is None:
            return sums
        return sums._replace(
            step_loss=config.attention_weight * attention_loss,
            step_parts={"attention_loss": attention_loss.detach()},
            metrics=sums.metrics | attention_metrics,
        )

    def token_losses(
        self, policy_hidden: Tensor, student_hidden: Tensor | None, batch: PackedBatch
    ) -> LossSums:
        """Compute L_GRPO and, with a student, L_think from what the head reads, (N, D) each."""
        token_loss, policy_loss, think_loss, *stats = LensPass.apply(
            policy_hidden, student_hidden, self.head, batch, self.config
        )
        logprobs, entropy, js, student_entropy = stats  # (N,) each
        outside = clipped(logprobs, batch.old_logprobs, batch.advantages, self.config)
        parts = {"policy_loss": policy_loss}
        metrics = {"entropy": sum_and_count(entropy), "clip_fraction": sum_and_count(outside)}
        if student_hidden is not None:
            parts["think_loss"] = think_loss
            metrics["student_entropy"] = sum_and_count(student_entropy)
            metrics |= by_sign("think_js", js, batch.advantages)
        return LossSums(token_loss, token_loss.new_zeros(()), parts, {}, metrics)

    def packed_logits(self, rows: list[list[int]], shift: int) -> Tensor:
        """Pack rows, move the positions of all but the first: -> logits (T, V), for `check`."""
        rollouts = [Rollout(row[:1], row[1:], [0.0] * (len(row) - 1), "stop") for row in rows]
        batch = pack(rollouts, self.config, self.head.device)
        batch.position_ids[:, len(rows[0]) :] += shift
        return F.linear(self.hidden_states(batch), self.head)


def gradient_if(wanted: bool):
    """Switch gradients off unless `wanted`; they stay off where they already are."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and wanted)


def sum_and_count(values: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Sum values (n,) and count them, all or those `chosen`: -> (2,)."""
    if chosen is None:
        chosen = torch.ones_like(values, dtype=torch.bool)
    return torch.stack([(values * chosen).sum(), chosen.sum()])


def by_sign(name: str, js: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Sum and count divergences (n,): all, those with A > 0 and those with A < 0."""
    return {
        name: sum_and_count(js),
        f"{name}_positive": sum_and_count(js, advantages > 0),
        f"{name}_negative": sum_and_count(js, advantages < 0),
    }


# ---- Losses ------------------------------------------------------------------------------------
# Pure functions of tensors. Losses are sums over tokens or decoding steps, in nats. Only
# `accumulate_gradients` divides, once, by the counts of the complete optimizer update.


def policy_loss_sum(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: Config, weights: Any = 1.0
) -> Tensor:
    """Sum GRPO's clipped surrogate, -min(ratio A, clip(ratio) A), at most dual_clip |A| for A < 0.

    (N,) each -> (). Gradient to `logprobs` only. `weights`: see `importance_weights`.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # it never overflows
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-ratio * advantages, -clipped_ratio * advantages)
    bounded = torch.minimum(loss, -config.dual_clip * advantages)
    loss = torch.where(advantages < 0, bounded, loss)
    return (weights * loss).sum()


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: Config) -> Tensor:
    """Mark the tokens whose gradient a clip of `policy_loss_sum` removes: (N,) each -> (N,)."""
    ratio = (logprobs - old_logprobs).exp()
    high = (advantages > 0) & (ratio > 1 + config.clip_high)
    low = (advantages < 0) & (ratio < 1 - config.clip_low)
    dual = (advantages < 0) & (ratio > config.dual_clip)
    return high | low | dual


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Compute min(pi_trainer / pi_sampler, cap) per token; cap 0 gives ones."""
    if not cap:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap)


def internal_loss_sum(js: Tensor, advantages: Tensor, scales: Tensor, config: Config) -> Tensor:
    """Sum scale clip(A, -c, c) JS: Eq. 7 before its division by N, or Eq. 10 before that by S.

    (n,) each -> (), gradient to `js` only. Minimizing it pulls the student to the teacher where A
    is positive and pushes it away where A is negative. `pack` computes the scales. Averaging by
    rollout, they are N / (R T_i) or S / (R S_i), so that the division by N or S leaves 1 / (R T_i):
    the mean over rollouts of the mean over tokens (Eq. 11). Averaging by token, they are 1.
    """
    c = config.advantage_clip
    return (scales * advantages.clamp(-c, c) * js).sum()


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Compute log softmax(z / temperature) in float32 or better, finite even for logits of -inf."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1).clamp(min=-1000.0)  # e^-1000 is 0 in every dtype


def js_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Compute JS of Eq. 7, (KL(p||m) + KL(q||m)) / 2, per row, in nats, between 0 and log 2.

    (..., V), (..., V) -> (...). Gradient to the student only: p/(2 tau) (log(p/m) - KL(p||m)),
    Appendix A.3.1. Logits may be huge or -inf. Raises: ValueError for unequal shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"{student_logits.shape} and {teacher_logits.shape} differ")
    log_p = log_softmax(student_logits, temperature)
    log_q = log_softmax(teacher_logits.detach(), temperature)
    student_ratio, teacher_ratio = log_ratios(log_p, log_q)  # log(p/m), log(q/m)
    return (log_p.exp() * student_ratio + log_q.exp() * teacher_ratio).sum(-1) / 2


def attention_scores(tap: Tap, queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Compute the logits of Eq. 8 over sampled keys: (S,), (S, K) -> (S, H, K); -inf if not seen.

    `queries` and `keys` are indices in the row.
    """
    _, H, _, d = tap.query.shape
    Q = tap.key.shape[1]
    S, K = keys.shape
    exact = torch.promote_types(tap.query.dtype, torch.float32)
    query = tap.query[0][:, queries].view(Q, H // Q, S, d).to(exact)  # H/Q heads share a key head
    key = tap.key[0][:, keys.flatten()].view(Q, S, K, d).to(exact)
    scores = torch.einsum("qgsd,qskd->sqgk", query, key).reshape(S, H, K) * tap.scaling
    if tap.window is not None:
        valid = valid & (queries[:, None] - keys < tap.window)
    return scores.masked_fill(~valid[:, None], -torch.inf)


def attention_js(
    student: Tap, teacher: Tap, batch: PackedBatch, config: Config, chunk: int = 256
) -> Tensor:
    """Compute JS of Eq. 10 between two layers' attention, mean over heads: -> (S,), nats.

    A softmax over the sampled logits is the full attention renormalized over them (Eq. 9), so the
    full one is never computed. Time is O(S K). Keys are gathered a chunk at a time, chunk K Q d
    numbers, and again in the backward pass; none are kept. Gradient to the student only.
    """
    student, teacher = copy(student), copy(teacher)  # taps are cleared before the backward pass
    positions = batch.position_ids[0, batch.queries]
    window, strided = config.attention_window, config.attention_strided
    keys, valid = sample_attention_keys(positions, window, strided)
    keys = keys + (batch.queries - positions)[:, None]  # from positions to indices in the row

    def chunk_js(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            with torch.no_grad():
                target = attention_scores(teacher, queries, keys, valid)
            scores = attention_scores(student, queries, keys, valid)
            return js_divergence(scores, target).mean(dim=1)

    chunks = zip(batch.queries.split(chunk), keys.split(chunk), valid.split(chunk))
    recompute = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(chunk_js, *part, **recompute) for part in chunks])


# ---- The pass over the vocabulary --------------------------------------------------------------


class LensPass(torch.autograd.Function):
    """Compute policy and lens losses with their gradients in one pass, a chunk of tokens at a time.

    A token's losses depend on its logits only through log-prob and JS. With p^L the policy at its
    temperature, p the student and q the teacher at tau, m = (p + q)/2,

        d logprob / d z^L = (onehot - p^L) / temperature
        d JS / d z^l      = p (log(p/m) - KL(p||m)) / (2 tau)

    By the chain rule, the gradient by logits is one of these rows times one number per token. So
    `lens_rows` overwrites a chunk's logits with the rows, `loss_factors` gives the numbers, and one
    product each gives the gradients by hidden states and head. No logits outlive their chunk.

    `apply(policy_hidden (N, D), student_hidden (N, D) or None, head (V, D), batch, config)` -> the
    token loss, with gradient to the first three; and, detached, L_GRPO and L_think, then log-probs,
    entropy, JS and student entropy, (N,) each, the last two 0 without a student.
    """

    @staticmethod
    def forward(ctx, policy_hidden, student_hidden, head, batch, config):
        _, student_learns, head_learns = ctx.needs_input_grad[:3]
        learning = 2 if student_learns else 1  # the policy; the student too
        writing = learning if config.lens_grad == "all" else 1  # whose gradient reaches the head
        dtype = product_dtype(policy_hidden)
        exact = torch.promote_types(dtype, torch.float32)
        layers = [policy_hidden] if student_hidden is None else [policy_hidden, student_hidden]
        with torch.autocast(head.device.type, enabled=False):
            W = head.detach().to(dtype)  # (V, D)
            hidden = torch.stack([layer.detach().to(dtype) for layer in layers])  # (1 or 2, N, D)
            hidden_grad = torch.zeros_like(hidden[:learning])
            head_grad = torch.zeros_like(head, dtype=exact) if head_learns else None
            losses = torch.zeros(3, dtype=exact, device=head.device)  # token loss, L_GRPO, L_think
            stats = torch.zeros(4, hidden.shape[1], dtype=exact, device=head.device)
            for rows, logits in chunked_logits(hidden, W, config.lens_chunk_tokens):
                targets = batch.target_ids[rows]
                temperatures = config.temperature, config.distill_temperature
                found = lens_rows(logits, targets, *temperatures, learning)
                stats[: len(found), rows] = found
                chunk_losses, factors = loss_factors(stats[:, rows], batch, rows, config)
                losses += chunk_losses

                deltas = logits[:learning]  # `lens_rows` has left the derivatives there
                factors = factors[:learning, :, None].to(dtype)  # (learning, n, 1)
                hidden_grad[:, rows] = deltas @ W
                hidden_grad[:, rows] *= factors
                if head_learns:
                    scaled = hidden[:writing, rows] * factors[:writing]
                    add_product(head_grad, deltas[:writing].flatten(0, 1), scaled.flatten(0, 1))
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.dtypes = policy_hidden.dtype, layers[-1].dtype, head.dtype
        outputs = *(loss.clone() for loss in losses), *stats.unbind()  # FSDP warns about views
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        hidden_grad, head_grad = ctx.saved_tensors
        policy_dtype, student_dtype, head_dtype = ctx.dtypes
        policy_grad = hidden_grad[0].to(policy_dtype) * scale
        student_grad = None
        if len(hidden_grad) == 2:
            student_grad = hidden_grad[1].to(student_dtype) * scale
        if head_grad is not None:
            head_grad = head_grad.mul_(scale).to(head_dtype)
        return policy_grad, student_grad, head_grad, None, None


@torch.no_grad()
def read_tokens(
    hidden: Tensor, head: Tensor, target_ids: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Score tokens from what the head reads: (N, D) -> log-probs and entropies, (N,) each, nats.

    Uses the chunks, products and kernels of `LensPass`, so ratios start at exactly 1.
    """
    dtype = product_dtype(hidden)
    temperatures = config.temperature, config.distill_temperature
    chunks = []
    with torch.autocast(head.device.type, enabled=False):
        hidden = hidden.to(dtype)[None]  # (1, N, D)
        for rows, logits in chunked_logits(hidden, head.to(dtype), config.lens_chunk_tokens):
            chunks.append(lens_rows(logits, target_ids[rows], *temperatures))
    logprobs, entropy = torch.cat(chunks, dim=1)
    return logprobs, entropy


def loss_factors(
    stats: Tensor, batch: PackedBatch, rows: slice, config: Config
) -> tuple[Tensor, Tensor]:
    """Differentiate the losses of some tokens by log-prob and JS, rows 0 and 2 of `stats` (4, n).

    -> token, policy and think loss, (3,), and the factors of what `lens_rows` leaves, (2, n).
    """
    logprobs = stats[0].detach().requires_grad_()
    js = stats[2].detach().requires_grad_()
    old = batch.old_logprobs[rows]
    advantages = batch.advantages[rows]
    scales = batch.token_scales[rows]
    weights = importance_weights(old, batch.sampler_logprobs[rows], config.importance_cap)
    with torch.enable_grad():
        policy_loss = policy_loss_sum(logprobs, old, advantages, config, weights)
        think_loss = internal_loss_sum(js, advantages, scales, config)
        token_loss = config.policy_weight * policy_loss + config.think_weight * think_loss
        by_logprob, by_js = torch.autograd.grad(token_loss, (logprobs, js))
    losses = torch.stack([token_loss, policy_loss, think_loss]).detach()
    # The factors undo what `lens_rows` leaves: -temperature d logprob / dz and 2 tau d JS / dz.
    temperature, tau = config.temperature, config.distill_temperature
    return losses, torch.stack([-by_logprob / temperature, by_js / (2 * tau)])


# ---- One step ----------------------------------------------------------------------------------


def token_values(run: Run, rollouts: Sequence[Rollout], read: Callable) -> list[Tensor]:
    """Compute `read(batch)`, (N,), for all rollouts without gradient.

    -> a tensor (response length,) per rollout, on the CPU of every rank.
    """
    run.model.eval()
    mine = my_micro_batches(rollouts, run.config.max_tokens_per_gpu)
    device = run.accelerator.device
    with torch.no_grad():
        batches = (pack([rollouts[i] for i in indices], run.config, device) for indices in mine)
        values = [run.model(read, batch) for batch in batches]
    found: list[tuple[int, Tensor]] = []
    for indices, value in zip(mine, values):  # copying earlier would wait for each batch
        lengths = [len(rollouts[i].response_ids) for i in indices]
        parts = value.cpu().split(lengths)
        found += [(i, part.clone()) for i, part in zip(indices, parts)]  # pickle sends full storage
    return [value for _, value in sorted(gather(found), key=lambda entry: entry[0])]


def set_old_logprobs(run: Run, rollouts: Sequence[Rollout]) -> float:
    """Set `old_logprobs`: -> mean |sampler's - trainer's log-prob| per token, in nats.

    Raises: TrainingError above the limit: the sampler does not serve the weights being trained.
    """
    values = token_values(run, rollouts, run.model.response_logprobs)
    for rollout, logprobs in zip(rollouts, values):
        rollout.old_logprobs = logprobs
    sampler = torch.tensor([value for r in rollouts for value in r.sampler_logprobs])
    gap = (torch.cat(values) - sampler).abs().mean().item()
    limit = run.config.logprob_gap_limit
    if not gap <= limit:  # also if the gap is NaN
        raise TrainingError(
            f"log-probs of sampler and trainer differ by {gap:.4g} nats per token on average, more "
            f"than max_logprob_gap = {limit}: the weights did not reach the sampler, or it "
            "computes another model",
            weights_intact=True,
        )
    return gap


def accumulate_gradients(
    run: Run, rollouts: Sequence[Rollout], max_tokens: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compute the gradients of one optimizer update over all ranks: -> losses, sums of metrics.

    Every loss is a sum, divided here by the counts N and S of the complete update, so no split
    changes a gradient. FSDP2 averages gradients over ranks; the factor `world()` makes that a sum.
    """
    config = run.config
    N, S = counts(rollouts, config)  # of all ranks: every rank knows all rollouts
    totals: dict[str, Tensor] = {}
    for indices in my_micro_batches(rollouts, max_tokens):
        mine = [rollouts[i] for i in indices]
        batch = pack(mine, config, run.accelerator.device, update=rollouts)
        sums = run.model(run.model.losses, batch)
        loss = sums.token_loss / N + sums.step_loss / S
        (world() * loss).backward()
        for name, value in (sums.token_parts | sums.step_parts | sums.metrics).items():
            totals[name] = totals.get(name, 0.0) + value.detach()

    sizes = [total.numel() for total in totals.values()]
    vector = torch.cat([total.reshape(-1).cpu().double() for total in totals.values()])
    if world() > 1:
        dist.all_reduce(vector)
    totals = dict(zip(totals, vector.split(sizes)))
    losses = {name: totals[name].item() / N for name in sums.token_parts}
    losses |= {name: totals[name].item() / S for name in sums.step_parts}
    return losses, {name: totals[name] for name in sums.metrics}


def clip_gradients(run: Run) -> list[float]:
    """Clip the gradients of each parameter group: -> their norms before clipping."""
    norms = []
    for group in run.optimizer.param_groups:
        norm = nn.utils.clip_grad_norm_(group["params"], run.config.max_grad_norm)
        norms.append(full_tensor(norm).item())
    return norms


def update_policy(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Make the step's optimizer updates, one per mini-batch of prompts: -> its metrics.

    Losses and gradient norm are averaged over updates, all else over tokens or decoding steps.
    Without any response to learn from (`mask_truncated`), there is no update, and no metrics.
    """
    run.model.train()  # for activation checkpointing; there is no dropout
    size = run.config.mini_batch_prompts * run.config.group_size
    updates: list[dict[str, float]] = []
    totals: dict[str, Tensor] = {}
    for start in range(0, len(rollouts), size):
        chosen = rollouts[start : start + size]
        if run.config.mask_truncated:  # N, S and R do not count them; advantages do
            chosen = [rollout for rollout in chosen if rollout.finish_reason != "length"]
        if not chosen:
            continue
        losses, sums = accumulate_gradients(run, chosen, run.config.max_tokens_per_gpu)
        norms = clip_gradients(run)
        if not all(map(math.isfinite, norms)):
            raise TrainingError(f"the gradient norm is {sum(norms)}", weights_intact=not updates)
        run.optimizer.step()
        run.optimizer.zero_grad()
        updates.append(losses | {"grad_norm": norms[0]})  # PPO's critic is clipped separately
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}

    metrics: dict[str, float | None] = {}
    for name, (total, count) in totals.items():
        metrics[name] = (total / count).item() if count else None
    for name in updates[0] if updates else ():
        metrics[name] = statistics.fmean(update[name] for update in updates)
    return metrics


def train_step(run: Run) -> dict[str, Any]:
    """Run one step of the algorithm in this file's docstring: -> its metrics."""
    config = run.config
    step = run.state["step"]
    device = run.accelerator.device
    started = time.perf_counter()

    # 1, 2: sync the weights, sample, grade
    run.sampler.sync(run.model.model)
    failures = run.grader.failures
    chosen = problems.step_problems(run.problems, step, config.prompts_per_step, config.seed)
    rollouts = sample_rollouts(run, chosen, config.group_size, "train", step)
    sampled = time.perf_counter()
    run.signals.check()  # the weights are still those of the last step
    processes.reset_peak(device)

    # 3: the trainer's own log-probs, before any update
    doing(f"step {step + 1}: scoring the tokens")
    gap = set_old_logprobs(run, rollouts)

    # 4: advantages; a baseline may prepare more
    run.method.before_updates(run, rollouts)

    # 5 to 10: the optimizer updates
    doing(f"step {step + 1}: updating the policy")
    update_metrics = update_policy(run, rollouts)
    run.state["step"] = step + 1
    finished = time.perf_counter()

    if rank() == 0 and run_folder.every(config.rollouts_every, step + 1):
        run_folder.write_rollouts(run.folder, step + 1, rollouts, run.tokenizer)
    return {
        "step": step + 1,
        **run_folder.rollout_metrics(rollouts, config.group_size),
        **update_metrics,
        "moved_weights": models.moved_weights(run.model, run.start_images),
        "sampler_logprob_gap": gap,
        "grader_failures": sum(gather([run.grader.failures - failures])),
        "tokens_per_second": sum(rollout.length for rollout in rollouts) / (finished - started),
        "seconds": finished - started,
        "seconds_rollout": sampled - started,
        **processes.memory_metrics(device, run.sampler.ghost_bytes),
    }


# ---- FSDP2 -------------------------------------------------------------------------------------
# Every rank knows all rollouts, as lists. What is split: prompts to sample, micro-batches to
# compute, and, by FSDP2, weights, gradients and optimizer state.


def shard(model: TappedModel, mesh: DeviceMesh, config: Config, reshard: bool = True) -> None:
    """Shard in place: each decoder layer is a unit; embeddings, final norm and head are the root's.

    Parameters, gradients and reductions are float32, compute is in `dtype`. `reshard`: free a
    layer's gathered weights after its forward pass and gather them again for the backward pass.
    """
    compute = torch.bfloat16 if config.dtype == "bfloat16" else None
    # Inputs are not cast, since advantages and old log-probs must stay float32.
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in model.units:
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def load_shards(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Fill a sharded model from rank 0's full `source`. Raises: UserError if a tensor differs."""
    model.to_empty(device=device)
    weights = source.state_dict() if source is not None else {}
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, cpu_offload=device.type == "cpu"
    )
    set_model_state_dict(model, weights, options=options)
    # Rotary frequencies are in no state dict and may have two names (Phi3's longrope).
    buffers = [dict(source.named_buffers(remove_duplicate=False)) if source is not None else {}]
    dist.broadcast_object_list(buffers)
    for name, buffer in buffers[0].items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    models.check_same_tensors(model, source, full_tensor)


# ---- A run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Where baselines plug in. `baselines/` shows how."""

    config: type[Config] = Config
    model: type[TappedModel] = TappedModel  # overrides `losses`
    before_updates: Callable[[Run, Sequence[Rollout]], None] = set_advantages
    load_problems: Callable = load_problems


@dataclass(kw_only=True)
class Run:
    """Everything that `train` works with."""

    method: Method
    config: Config
    folder: Path
    accelerator: Accelerator
    tokenizer: Tokenizer
    model: TappedModel  # sharded on GPUs and with several processes
    optimizer: torch.optim.Optimizer
    sampler: HfSampler | VllmSampler
    grader: Grader
    problems: list[Problem]
    held_out: list[Problem]
    export_dtype: torch.dtype
    generation_config: GenerationConfig
    state: dict[str, Any]  # what a checkpoint keeps beside tensors, see `assemble`
    start_images: Tensor  # some weights in bfloat16, before the first step
    signals: processes.Signals = field(default_factory=processes.Signals)
    lock: IO | None = None  # on the folder, held by rank 0


def prepare(name: str, config: Config, method: Method = Method()) -> Run:
    """Build everything a run needs, cheap checks first. Raises: UserError."""
    models.check_packages(config.kernel, config.tracker, config.lora_rank)
    folder = lock = None
    if int(os.environ.get("RANK", 0)) == 0:  # there is no process group yet
        folder, lock = run_folder.open_folder(name, config.output_dir, bool(config.resume))
    try:
        accelerator = processes.make_accelerator(folder or Path("runs"), 1, config.tracker)
        run = assemble(config, from_rank_0(lambda: folder), accelerator, method)
        if config.resume:
            parts = run.model, run.optimizer, run.state, config.lora_rank > 0, config.program
            run.state = run_folder.load_checkpoint(run.folder, *parts)
        if rank() == 0:
            # "auto" stays: a resumed run may have other GPUs.
            kept = dataclasses.replace(run.config, resume="", vllm_memory=config.vllm_memory)
            run_folder.write_config(run.folder, name, kept, VERSION)
    except BaseException:
        if folder:
            run_folder.forget_folder(folder)
        raise
    run.lock = lock
    return run


def assemble(config: Config, folder: Path, accelerator: Accelerator, method: Method) -> Run:
    """Load data and model, start the sampler, shard, make the optimizer. Raises: UserError."""
    device = accelerator.device
    limits = config.student_layer, config.longest_row, config.prompt_limit
    rows = models.check_model_config(config.model, *limits).vocab_size
    tokenizer = problems.load_tokenizer(config.model, config.chat_template)
    held_out, left_out = [], 0
    doing("reading the problems")
    with accelerator.main_process_first():  # the others find its cache
        training, too_long = method.load_problems(config.train_data, tokenizer, config)
        if config.test_data:
            held_out, left_out = load_problems(config.test_data, tokenizer, config)
    held_out = held_out[: config.eval_problems or None]
    grader = Grader(workers=config.grader_workers, seconds=config.grader_seconds)
    if rank() == 0:
        doing("comparing every gold answer with a copy of itself")
        problems.check_problems(config.train_data, training, rows, grader)
        problems.check_problems(config.test_data, held_out, rows, grader)
    found = f"{len(training)} training problems, {too_long} too long"
    say(f"{found}; {len(held_out)} held out, {left_out} too long")
    say(f"the first prompt:\n---\n{tokenizer.decode(training[0].prompt_ids)}\n---")
    doing(f"loading and checking {config.model}")

    # Load and check the full model on rank 0's CPU. With FSDP2 the others start from an empty one.
    sharded = dist.is_initialized()
    source, facts = load_source(config, method, tokenizer, folder, sharded)
    export_dtype, generation_config, end_ids, hashes = facts
    model = method.model(load_model(config, empty_on="meta")[0], config) if sharded else source

    # Start the engine while the device is empty.
    if config.sampler == "vllm":
        doing("starting vLLM")
        if config.vllm_memory == "auto" and device.type == "cuda":
            share = processes.vllm_share(device, model)
            config = model.config = dataclasses.replace(config, vllm_memory=share)
        sampler = VllmSampler(config, end_ids, device)
        sampler.sleep()
    else:
        sampler = hf_sampler(config, model.model, end_ids, device, model)

    if sharded:
        mesh = init_device_mesh(device.type, (world(),))
        plugin = getattr(accelerator.state, "fsdp_plugin", None)  # of Accelerate's config
        shard(model, mesh, config, plugin is None or bool(plugin.reshard_after_forward))
        load_shards(model, source, device)
    else:
        model.to(device)
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    fused = device.type == "cuda"  # fused AdamW needs no temporaries as large as the model
    optimizer = torch.optim.AdamW(model.parameter_groups(), **settings, fused=fused)
    where = f"{world()} x {device.type}, {config.dtype} -> {folder}"
    say(f"{config.model}: {models.sizes(model)}\nstudent layer {config.student_layer}, {where}")
    return Run(
        method=method,
        config=config,
        folder=folder,
        accelerator=accelerator,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        sampler=sampler,
        grader=grader,
        problems=training,
        held_out=held_out,
        export_dtype=export_dtype,
        generation_config=generation_config,
        state={
            "step": 0,
            "held_out": {},  # accuracy by step
            "inputs": {
                "train_data": problems.fingerprint(training),
                "test_data": problems.fingerprint(held_out),
                "end_tokens": end_ids,
                **hashes,
            },
        },
        start_images=models.bfloat16_images(model),
    )


def load_source(
    config: Config, method: Method, tokenizer: Tokenizer, folder: Path, sharded: bool
) -> tuple[TappedModel | None, tuple]:
    """Load and check the model on rank 0: -> it, None elsewhere, and what all ranks need of it.

    That is the dtype and hashes of its files, its generation config and its end tokens.
    Raises: UserError.
    """
    source, facts = None, []
    if rank() == 0:
        # FlashAttention does not run on the CPU, where a sharded model's source is checked.
        on_cpu = dataclasses.replace(config, attention="sdpa") if sharded else config
        generation_config = models.read_generation_config(config.model)
        with processes.all_threads():  # the other ranks wait
            loaded, export_dtype = load_model(on_cpu)
            if config.spread_weights:
                models.spread_weights(loaded, config.seed)
            source = method.model(loaded, config)
            check(source)
        schedule = config.num_steps, config.checkpoint_every, config.checkpoints_kept
        run_folder.check_disk(folder, source, export_dtype, *schedule)
        rows = loaded.config.vocab_size
        end_ids = problems.end_token_ids(generation_config, tokenizer, rows)
        models.drop_invalid(generation_config)
        parts = loaded, export_dtype, generation_config, tokenizer
        run_folder.rehearse_export(folder, full_weights(loaded, export_dtype), *parts)
        facts = [(export_dtype, generation_config, end_ids, models.file_hashes(config.model))]
    return source, gather(facts)[0]


def check(tapped: TappedModel) -> None:
    """Check the model against what lens, taps and packed rows assume. Raises: UserError."""
    config = tapped.config
    windowed = config.kernel in ("varlen", "flash_attention_2")
    limits = config.student_layer, config.longest_row, config.prompt_limit
    check_model(tapped, config.model, *limits, windowed)


# ---- Train -------------------------------------------------------------------------------------


def report_accuracy(run: Run) -> None:
    """Score the held-out problems with the current weights, once per step; keep all scores."""
    scores = run.state["held_out"]
    step = run.state["step"]
    copies = run.config.eval_samples
    if not run.held_out or str(step) in scores:
        return
    run.sampler.sync(run.model.model)
    rollouts = sample_rollouts(run, run.held_out, copies, "held out", 0)
    score = run_folder.accuracy([rollout.reward for rollout in rollouts], copies)
    scores[str(step)] = score
    run.accelerator.log({"held_out_accuracy": score["accuracy"]}, step=step)
    if rank() == 0:
        run_folder.write_atomically(run.folder / "held_out.json", json.dumps(scores) + "\n")
    say(f"held-out accuracy after step {step}: {run_folder.percent(score)}")


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint of this step, or its state if there is one. Raises: TrainingError."""
    parts = run.model, run.optimizer, run.state, run.config.checkpoints_kept
    run_folder.save_checkpoint(run.folder, *parts)


def train(run: Run) -> None:
    """Run from the current step to `num_steps`, then export."""
    config = run.config
    settings = dataclasses.asdict(config)
    log = run_folder.Log(run.folder, run.accelerator, run.state["step"], settings)
    while True:
        step = run.state["step"]
        last = step >= config.num_steps
        due = step > 0 and (last or run_folder.every(config.checkpoint_every, step))
        if due:
            save_checkpoint(run)  # first, since an evaluation may fail
        if step == 0 or last or run_folder.every(config.eval_every, step):
            report_accuracy(run)
            if due:
                save_checkpoint(run)  # the score, too
        log.draw(step, last)
        if last:
            break
        log.write(train_step(run))
        run.signals.check()

    weights = full_weights(run.model.model, run.export_dtype)
    parts = run.model.model, run.export_dtype, run.generation_config, run.tokenizer
    run_folder.export(run.folder, weights, *parts)
    say(run_folder.closing(run.folder, run.state["held_out"], config))
    if failures := sum(gather([run.grader.failures])):
        say(f"grading: {failures} responses ran out of time or memory and scored 0")


def stop(run: Run, reason: str, save: bool) -> bool:
    """Save if asked to, print how to continue: -> False if a checkpoint could not be written."""
    saved = True
    if save and run.state["step"] and run.config.resumable:
        try:
            save_checkpoint(run)
        except TrainingError as problem:
            reason = f"{reason}; {problem}"
            saved = False
    if rank() == 0:
        hint = run_folder.resume_hint(run.folder, run.config.program, run.config.resumable)
        print(f"\noisd: {reason}; {hint}", file=sys.stderr)
    return saved


def main(arguments: Sequence[str] | None = None, method: Method = Method()) -> int:
    """Run: -> 0, 1 if training fails, 2 for a UserError before it, 128 + a signal's number."""
    try:
        run = prepare(*load_config(arguments, method.config), method)
    except UserError as problem:
        doing("")
        print(f"oisd: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\noisd: interrupted before the first step of this run", file=sys.stderr)
        return 130
    code = 0
    try:
        with run.signals:  # to the end: a launcher that forwards a signal must not stop the saving
            try:
                train(run)
            except (TrainingError, UserError) as problem:
                code = 1
                intact = isinstance(problem, TrainingError) and problem.weights_intact
                stop(run, f"stopped after step {run.state['step']}: {problem}", save=intact)
            except processes.Interrupted as problem:
                name = signal.Signals(problem.number).name
                saved = stop(run, f"stopped by {name}", save=True)
                code = 128 + problem.number if saved else 1
    finally:
        run.grader.close()
        if run.lock:
            run.lock.close()
    if code != 1 or world() == 1:  # after an error, the other ranks may be anywhere
        run.sampler.close()
        run.accelerator.end_training()
    return code


if __name__ == "__main__":
    processes.program(main)
