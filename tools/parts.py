"""One training step, and one lens pass, measured part by part: what `bench.py step --shape` and `lens --parts` print.

Random weights in a published shape and random rollouts go through the program's own model, sharding, scoring, losses
and optimizer, as one process. Every row is printed, and written to `--csv`, as soon as it is measured; a part that
fails is a row of its own. Seconds are medians, with the least and the most.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
import plumbing
from tools import plan
from tools.bench import lens_batch

PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16, dense
SHAPES = {  # from the config.json of Qwen's models; `tiny` is for processors
    "qwen3_4b": {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "qwen3_06b": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
}  # fmt: skip
PAPER = {"max_prompt_tokens": 64, "max_response_tokens": 4032, "max_tokens_per_gpu": 16_384}
SMALL = {
    "max_prompt_tokens": 16, "max_response_tokens": 112, "max_tokens_per_gpu": 256, "student_layer": 2,
    "lens_chunk_tokens": 64, "attention_steps": 8, "attention_window": 8, "attention_strided": 8, "attention": "sdpa",
}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card_peak() -> float:
    """bfloat16 FLOP/s of this card's data sheet; NaN where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for card, peak in PEAKS.items() if card in name), math.nan)


class Table:
    """Rows of figures, printed and written as they come."""

    def __init__(self, path: str | None):
        self.file = open(path, "a", newline="", encoding="utf-8") if path else None  # noqa: SIM115  closed at the end
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{card}, torch {torch.__version__}, commit {plumbing.commit()}\n", flush=True)
        print("| part | s, median (least to most) | TFLOP/s | of the peak | GB/s | GiB | |", flush=True)
        print("|---|---|---|---|---|---|---|", flush=True)

    def row(self, name: str, times: list[float] | None = None, flops=0.0, moved=0.0, gib=0.0, text="") -> None:
        cells = [name, "", "", "", "", f"{gib:.2f}" if gib else "", text]
        if times:
            middle = statistics.median(times)
            cells[1] = f"{middle:.4g} ({min(times):.4g} to {max(times):.4g})"
            if flops:
                cells[2] = f"{flops / middle / 1e12:.4g}"
                share = 100 * flops / middle / card_peak()
                cells[3] = "" if math.isnan(share) else f"{share:.1f} %"
            cells[4] = f"{moved / middle / 1e9:.4g}" if moved else ""
        print(f"| {' | '.join(cells)} |", flush=True)
        if self.file:
            csv.writer(self.file).writerow(cells)
            self.file.flush()

    def measure(self, name: str, work: Callable, repeats: int, **figures: float) -> float:
        """Median seconds of `work`, after one call to warm up; NaN if it fails. Its peak memory is a figure, too."""
        try:
            work()
            synchronize()
            plumbing.reset_peak(device())
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                work()
                synchronize()
                times.append(time.perf_counter() - start)
        except Exception as problem:
            self.row(name, text=f"FAILED: {type(problem).__name__}: {str(problem)[:200]}")
            return math.nan
        gib = plumbing.peak_bytes(device()) / 2**30 if torch.cuda.is_available() else 0
        self.row(name, times, gib=gib, **figures)
        return statistics.median(times)


# ----------------------------------------------------- A step -------------------------------------------------------


def step_config(shape: str, folder: str, words: list[str]) -> oisd.Config:
    """The paper's settings for a model of this shape. Raises: UserError."""
    Qwen3Config(**SHAPES[shape], max_position_embeddings=40_960, dtype="bfloat16").save_pretrained(folder)
    fields = {"model": folder, "sampler": "hf"} | (SMALL if shape == "tiny" else PAPER)
    given = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    if not torch.cuda.is_available():
        given += ["--attention", "sdpa"]
    return oisd.load_config(["--config", "configs.toml:qwen3_4b", *given, *words])[1]


def random_rollouts(config: oisd.Config, batches: int = 2) -> list[oisd.Rollout]:
    """Rollouts that nearly fill `batches` micro-batches, of an eighth of the longest response to all of it."""
    drawn, rollouts = random.Random(0), []
    longest, prompt = config.max_response_tokens, config.max_prompt_tokens
    for _ in range(batches):
        room = config.max_tokens_per_gpu * 63 // 64
        while room > prompt + longest // 8:
            length = min(drawn.randrange(longest // 8, longest), room - prompt)
            ids = [drawn.randrange(500) for _ in range(prompt + length)]
            advantage = drawn.gauss(0, 1)
            rollouts.append(oisd.Rollout(ids[:prompt], ids[prompt:], [-12.0] * length, "stop", advantage=advantage))
            room -= prompt + length
    return rollouts


def build(config: oisd.Config) -> SimpleNamespace:
    """As much of a run as a step needs: a sharded model with random weights, its optimizer."""
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = oisd.TappedModel(oisd.load_model(config, empty_on="meta")[0], config)
    oisd.shard(model, init_device_mesh(device().type, (1,)), config, config.cpu_offload)
    model.to_empty(device="cpu" if config.cpu_offload else device())
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            plumbing.local(parameter).normal_(std=0.02)
        else:
            plumbing.local(parameter).fill_(1.0)
    rotary = model.model.get_decoder().rotary_emb  # its frequencies are no parameters
    for name, buffer in type(rotary)(config=model.model.config).named_buffers():
        rotary._buffers[name] = buffer.to(device())
    optimizer = oisd.make_optimizer(model, config, fused=torch.cuda.is_available())
    accelerator = SimpleNamespace(device=device())
    return SimpleNamespace(config=config, model=model, optimizer=optimizer, accelerator=accelerator, state={"step": 0})


def use(run: SimpleNamespace, **changes) -> None:
    run.config = run.model.config = dataclasses.replace(run.config, **changes)


def update(run: SimpleNamespace, rollouts: list[oisd.Rollout]) -> None:
    """One optimizer update over all rollouts."""
    run.model.train()
    oisd.accumulate_gradients(run, rollouts, run.config.max_tokens_per_gpu)
    torch.nn.utils.clip_grad_norm_(run.optimizer.param_groups[0]["params"], run.config.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()


def work_of(run: SimpleNamespace, rollouts: list[oisd.Rollout]) -> dict[str, float]:
    """FLOPs of scoring, of an OISD update and of a GRPO update, recomputation included."""
    shape, config = run.model.model.config, run.config
    named = run.model.named_parameters()
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    tokens, squares = sum(r.length for r in rollouts), sum(r.length**2 for r in rollouts)
    N = sum(len(r.response_ids) for r in rollouts)
    layers = 2.0 * sum(p.numel() for p in matrices) * tokens
    attention = 2.0 * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers * squares
    head = 2.0 * N * shape.hidden_size * shape.vocab_size
    again = plan.recomputed(config, shape.num_hidden_layers) / shape.num_hidden_layers
    trunk = (3 + again) * layers + (3.5 + again) * attention
    return {"scoring": layers + attention + head, "OISD": trunk + 6 * head, "GRPO": trunk + 3 * head}


WEIGHTS = {  # rows of the table, and what their config changes
    "OISD": {},
    "think alone": {"attention_weight": 0.0, "measure_js": False},
    "attention alone": {"think_weight": 0.0, "measure_js": False},
    "GRPO, both JS measured": {"think_weight": 0.0, "attention_weight": 0.0},
    "GRPO": {"think_weight": 0.0, "attention_weight": 0.0, "measure_js": False},
}


def measure_step(shape: str, words: list[str], repeats: int, path: str | None) -> None:
    """Print the table of a step. Raises: UserError."""
    with tempfile.TemporaryDirectory() as folder:
        config = step_config(shape, folder, words)
        planned = plan.trace(config, 1)
        table = Table(path)
        run = build(config)
        rollouts = random_rollouts(config)
        tokens = sum(rollout.length for rollout in rollouts)
        table.row(f"{shape}: {len(rollouts)} rollouts, {tokens} tokens", text=f"attention {config.kernel}")
        limit = config.max_logprob_gap
        use(run, max_logprob_gap=1e9)  # the log-probs of a sampler are made up
        work = work_of(run, rollouts)
        table.measure("scoring", lambda: oisd.set_old_logprobs(run, rollouts), repeats, flops=work["scoring"])
        seconds = {}
        for name, changes in WEIGHTS.items():
            use(run, **changes)
            flops = work["GRPO" if "GRPO" in name else "OISD"] if name != "attention alone" else work["GRPO"]
            seconds[name] = table.measure(f"update, {name}", lambda: update(run, rollouts), repeats, flops=flops)
            use(run, **{field: getattr(config, field) for field in changes})
        table.row("OISD over GRPO", text=f"{seconds['OISD'] / seconds['GRPO']:.3f}")
        table.row("peak by tools/plan.py", gib=planned.training / 2**30)
        for name, value in split_update(run, rollouts).items():
            table.row(f"of an OISD update: {name}", [value])
        table.row("largest log ratio before an update", text=f"{largest_log_ratio(run, rollouts):.3g}")
        if config.kernel == "varlen":
            run.model.model.set_attn_implementation("sdpa")
            table.measure("update, OISD, attention sdpa", lambda: update(run, rollouts), repeats, flops=work["OISD"])
            run.model.model.set_attn_implementation("varlen")
        use(run, max_logprob_gap=limit)
    print_profile(lambda: update(run, rollouts[: len(rollouts) // 2]))


def split_update(run: SimpleNamespace, rollouts: list[oisd.Rollout]) -> dict[str, float]:
    """Seconds of an update's parts, each synchronized. Backward holds the recomputation."""
    found: dict[str, float] = {}
    undo = []

    def around(owner: object, name: str, label: str) -> None:
        kept = getattr(owner, name)

        def call(*arguments, **named):
            synchronize()
            start = time.perf_counter()
            result = kept(*arguments, **named)
            synchronize()
            found[label] = found.get(label, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, call)
        undo.append(lambda: setattr(owner, name, kept))

    for owner, name, label in (
        (oisd, "pack", "pack"),
        (oisd.TappedModel, "hidden_states", "decoder, forward"),
        (oisd.TappedModel, "attention_losses", "attention loss, forward"),
        (oisd.TappedModel, "losses", "forward and losses"),
        (oisd, "lens_rows", "lens pass: rows of logits"),
        (oisd, "add_product", "lens pass: the head's gradient"),
        (torch.Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (run.optimizer, "step", "AdamW"),
    ):
        around(owner, name, label)
    try:
        update(run, rollouts)
    finally:
        for restore in undo:
            restore()
    known = found["decoder, forward"] + found["attention loss, forward"]
    found["lens pass, all of it"] = found.pop("forward and losses") - known
    return found


def largest_log_ratio(run: SimpleNamespace, rollouts: list[oisd.Rollout]) -> float:
    """The largest |log ratio| that the policy loss sees before an update; 0 is what it has to be."""
    oisd.set_old_logprobs(run, rollouts)
    policy_loss_sum, seen = oisd.policy_loss_sum, [0.0]

    def look(logprobs, old, *rest):
        if len(old):
            seen.append((logprobs - old).abs().max().item())
        return policy_loss_sum(logprobs, old, *rest)

    oisd.policy_loss_sum = look
    run.model.train()
    try:
        oisd.accumulate_gradients(run, rollouts, run.config.max_tokens_per_gpu)
    finally:
        oisd.policy_loss_sum = policy_loss_sum
        run.optimizer.zero_grad()
    return max(seen)


def print_profile(work: Callable, rows: int = 20) -> None:
    """The kernels that take most of one call."""
    cuda = torch.cuda.is_available()
    work()
    synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        work()
        synchronize()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    print("\n" + found.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=80), flush=True)


# ----------------------------------------------------- A lens pass --------------------------------------------------


def measure_lens(N: int, D: int, V: int, dtype: torch.dtype, repeats: int, path: str | None) -> None:
    """Print the table of a lens pass over N tokens: its products, its rows, all of it over its floor, by chunk."""
    table, exact = Table(path), torch.promote_types(dtype, torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(2, N, D, device=device()).to(dtype)
    head = (torch.randn(V, D, device=device()) / D**0.5).to(dtype)
    numbers = torch.randn(N, device=device())
    old = torch.full_like(numbers, -math.log(V))
    targets = torch.randint(V, (N,), device=device())
    batch = lens_batch(targets, numbers, old)
    pair = torch.zeros(2, 2**28 if torch.cuda.is_available() else 2**20, device=device())
    table.measure("copy, the memory's ceiling", lambda: pair[0].copy_(pair[1]), repeats, moved=4.0 * pair.numel())
    pair.resize_(0)
    leaves = [x.clone().requires_grad_() for x in (hidden[0], hidden[1], head)]

    def whole(config: oisd.Config, student: bool) -> None:
        for leaf in leaves:
            leaf.grad = None
        oisd.LensPass.apply(leaves[0], leaves[1] if student else None, leaves[2], batch, config)[0].backward()

    def floor(chunk: int, layers: int) -> None:
        for rows in hidden[:layers].split(chunk, dim=1):
            logits = rows.flatten(0, 1) @ head.T
            logits @ head, logits.T @ rows.flatten(0, 1)

    product, width = 2.0 * D * V, hidden.element_size()
    for chunk in sorted({min(chunk, N) for chunk in (256, 1024, 2048, 4096)}):
        config = dataclasses.replace(oisd.Config(), lens_chunk_tokens=chunk)
        logits = torch.randn(2, chunk, V, device=device()).to(dtype)
        total = torch.zeros(V, D, dtype=exact, device=device())
        rows = hidden[0, :chunk]
        flops = chunk * product
        for name, work in {
            "logits = h W'": lambda rows=rows, logits=logits: torch.mm(rows, head.T, out=logits[0]),
            "d h = d W": lambda logits=logits: logits[0] @ head,
            "d W += d' h": lambda rows=rows, logits=logits, total=total: oisd.add_product(total, logits[0], rows),
        }.items():
            table.measure(f"{chunk} rows: {name}", work, repeats, flops=flops)
        for name, layers, learning in (("scored", 1, 0), ("policy learns", 1, 1), ("student learns", 2, 2)):
            some, moved = logits[:layers], (1 + (learning > 0)) * layers * chunk * V * width

            def read(some=some, config=config, learning=learning, chunk=chunk):
                oisd.lens_rows(some, targets[:chunk], config, learning)

            table.measure(f"{chunk} rows of logits, {name}", read, repeats, moved=moved)
        del logits, total
        for name, layers in (("OISD", 2), ("GRPO", 1)):
            flops = 3 * layers * N * product
            label, products = f"lens pass, {name}, chunks of {chunk}", f"its {3 * layers} products, chunks of {chunk}"
            ours = table.measure(label, lambda c=config, n=layers: whole(c, n > 1), repeats, flops=flops)
            least = table.measure(products, lambda c=chunk, n=layers: floor(c, n), repeats, flops=flops)
            table.row(f"{label}: over its floor", text=f"{ours / least:.3f}")
    print_profile(lambda: whole(config, True))
