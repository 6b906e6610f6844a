"""Measure speed and memory of the lens pass and of a training step.

    python tools/bench.py lens                     the lens pass: 1,024 tokens, hidden 1,024, vocabulary 151,936
    python tools/bench.py step --real 60           a step on random rollouts, if 60 % of the padded tokens are real

Each side has its own process, and they take turns, so that a slow minute affects all of them. Memory is the peak above
what exists before. `lens` compares the policy loss and the JS between two layers with autograd on all logits, with the
products with the head alone, and with Liger's JSD loss. `step` compares GRPO and OISD on 16 rollouts and a random model
in the shape of SmolLM2-135M with TRL's `compute_loss`, which pads. A side whose package is missing is left out.
"""

import argparse
import contextlib
import csv
import functools
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support.processes import peak_bytes, reset_peak
from support.run_folder import commit
from support.settings import ROOT

SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lens_batch(targets, advantages, old):
    """Return what a lens pass reads from a batch. All tokens have the same weight."""
    known = {"old_logprobs": old, "sampler_logprobs": old, "token_scales": torch.ones_like(advantages)}
    return SimpleNamespace(target_ids=targets, advantages=advantages, **known)


def lens_inputs(options):
    """Return final and student hidden states (N, D), head (V, D), batch and config."""
    torch.manual_seed(0)
    N, D, V = options.tokens, options.hidden, options.vocabulary
    hidden = torch.randn(2, N, D).to(DEVICE, getattr(torch, options.dtype))
    head = (torch.randn(V, D, device=DEVICE) / D**0.5).to(hidden.dtype)
    leaves = [tensor.requires_grad_() for tensor in (*hidden, head)]
    advantages = torch.randn(N, device=DEVICE)
    batch = lens_batch(torch.randint(V, (N,), device=DEVICE), advantages, torch.full_like(advantages, -10.0))
    return *leaves, batch, replace(oisd.Config(), lens_chunk_tokens=options.chunk)


def dense_loss(final, student, head, batch, config):
    """Compute the token loss of `LensPass`, with weights of 1, by autograd on all logits."""
    final_logits = final @ head.T
    logprobs = oisd.log_softmax(final_logits, config.temperature).gather(1, batch.target_ids[:, None])[:, 0]
    js = oisd.js_divergence(student @ head.T, final_logits, config.distill_temperature)
    policy_loss = oisd.policy_loss_sum(logprobs, batch.old_logprobs, batch.advantages, config)
    return policy_loss + oisd.internal_loss_sum(js, batch.advantages, batch.token_scales, config)


@torch.no_grad()
def head_products(final, student, head, batch, config):
    for hidden in torch.cat([final, student]).split(2 * config.lens_chunk_tokens):
        logits = hidden @ head.T
        _ = logits @ head, logits.T @ hidden
    return head.new_zeros(())


def liger_loss(final, student, head, batch, config):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"compiled": final.is_cuda, "chunk_size": config.lens_chunk_tokens}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **settings)
    return loss(student, head, final.detach(), head.detach(), batch.target_ids)


def step_inputs(options):
    """Return a float32 model and 16 rollouts of at most 256 tokens, about `--real` % of that on average."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch.float32).to(DEVICE)
    rollouts = []
    for i in range(16):
        length = max(33, round(256 * ((i + 0.5) / 16) ** (100 / options.real - 1)))  # a ramp with that mean
        words = torch.randint(500, (length,)).tolist()
        parts = words[:32], words[32:], [-12.0] * (length - 32)
        rollouts.append(oisd.Rollout(*parts, "stop", advantage=(-1.0) ** i))
    return model, rollouts


def step_ours(options, **weights):
    model, rollouts = step_inputs(options)
    chosen = {"student_layer": 10, "dtype": options.dtype, "lens_chunk_tokens": options.chunk, "recompute_layers": 0}
    config = replace(oisd.Config(), **chosen, **weights)
    model.set_attn_implementation(config.kernel)
    tapped = oisd.TappedModel(model, config).train()
    batch = oisd.pack(rollouts, config, DEVICE)
    with torch.no_grad():
        old = tapped(tapped.response_logprobs, batch)
    batch = replace(batch, old_logprobs=old, sampler_logprobs=old)

    def loss():
        sums = tapped(tapped.losses, batch)
        return sums.token_loss / len(batch.target_ids) + sums.step_loss / len(batch.queries)

    return loss, list(model.parameters())


def step_trl(options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, rollouts = step_inputs(options)
    settings = {"loss_type": "bnpo", "per_device_train_batch_size": 16, "gradient_checkpointing": False}
    settings |= {"bf16": options.dtype == "bfloat16", "use_cpu": DEVICE.type == "cpu", "report_to": []}
    settings = GRPOConfig(tempfile.mkdtemp(), beta=0.0, **settings)
    dataset = Dataset.from_dict({"prompt": [""]})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "middle")
    trainer = GRPOTrainer(model, lambda **_: [0.0], settings, dataset, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    responses = [torch.tensor(rollout.response_ids, device=DEVICE) for rollout in rollouts]
    padded = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=-1)
    prompts = torch.tensor([rollout.prompt_ids for rollout in rollouts], device=DEVICE)
    inputs = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts)}
    inputs |= {"completion_ids": padded.clamp(min=0), "completion_mask": (padded >= 0).long()}
    inputs["advantages"] = torch.tensor([rollout.advantage for rollout in rollouts], device=DEVICE)

    def loss():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=settings.bf16):
            return trainer.compute_loss(model, inputs)

    return loss, list(model.parameters())


def lens_side(compute, options):
    inputs = lens_inputs(options)
    return functools.partial(compute, *inputs), inputs[:3]


GRPO = {"think_weight": 0.0, "attention_weight": 0.0, "measure_js": False}
LENS = {"ours": oisd.LensPass.apply, "dense": dense_loss, "floor": head_products, "liger JSD": liger_loss}
SIDES = {  # each makes a function that computes a loss, and the leaves of its gradients
    "lens": {name: functools.partial(lens_side, compute) for name, compute in LENS.items()},
    "step": {"our GRPO": functools.partial(step_ours, **GRPO), "our OISD": step_ours, "TRL's GRPO": step_trl},
}
PACKAGES = {"liger JSD": "liger_kernel", "TRL's GRPO": "trl"}
built = {}  # sides by name, in their processes


def work_once(options, name):
    """Do a side's work, in its process: -> seconds, bytes above what existed before, loss, gradient norm."""
    compute, leaves = built[name] = built.get(name) or SIDES[options.what][name](options)
    reset_peak(DEVICE)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # `peak_bytes` of a CPU starts again
    before = peak_bytes(DEVICE)
    start = time.perf_counter()
    for leaf in leaves:
        leaf.grad = None
    loss = compute()
    loss = loss[0] if isinstance(loss, tuple) else loss  # `LensPass` also returns statistics
    if loss.requires_grad:
        loss.backward()
    value = loss.item()  # waits for the GPU
    seconds = time.perf_counter() - start
    extra = peak_bytes(DEVICE) - before
    gradients = [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
    return seconds, extra, value, torch.nn.utils.get_total_norm(gradients).item()


def take_turns(options, names, repeats):
    """Let sides work in turn, each in its own process: -> their answers by side. The first turn only warms up."""
    answers = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in names}
        for _ in range(1 + repeats):
            for name in names:
                answers[name].append(pools[name].submit(work_once, options, name).result())
    return answers


def compare(options, names):
    """Print a table of sides, and append it to the CSV file."""
    answers = take_turns(options, names, options.repeats)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # slow, but freed memory is returned at once
    over = f"over {names[0]}"
    rows = [[options.what, "seconds, median", "least", "most", over, "extra GiB", over, "loss", "gradient"]]
    first = None  # median and memory of the first side
    for name in names:
        seconds, _, losses, norms = zip(*answers[name][1:])
        median = statistics.median(seconds)
        extra = take_turns(options, [name], 1)[name][1][1] / 2**30
        first = first or (median, extra)
        times = [median, min(seconds), max(seconds), median / first[0]]
        numbers = [*times, extra, extra / max(first[1], 1e-9), losses[-1], norms[-1]]
        rows.append([name, *(f"{number:.6g}" for number in numbers)])
    if options.csv:
        with open(options.csv, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    rows.insert(1, ["---"] * len(rows[0]))
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=[*SIDES])
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--repeats", type=int, default=5)
    add("--only", help="some sides, separated by commas")
    add("--csv", help="file to append the rows to")
    for name, size in (("tokens", 1024), ("hidden", 1024), ("vocabulary", 151_936)):
        add(f"--{name}", type=int, default=size, help="of the lens pass")
    add("--chunk", type=int, default=256, help="tokens whose logits exist at the same time")
    add("--real", type=int, default=60, help="percentage of the padded tokens that are real, about; 20 to 100")
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, commit {commit()}\n")
    names = options.only.split(",") if options.only else SIDES[options.what]
    names = [name for name in names if name not in PACKAGES or find_spec(PACKAGES[name])]
    compare(options, names)


if __name__ == "__main__":
    main()
