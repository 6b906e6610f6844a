"""Measure speed and memory of the lens pass and of a training step.

    python tools/bench.py lens                     the lens pass: 1,024 tokens, hidden 1,024, vocabulary 151,936
    python tools/bench.py lens --dtype bfloat16 --tokens 256 --vocabulary 20000
    python tools/bench.py step --real 60           a step on random rollouts, if 60 % of the padded tokens are real

Each side has its own process, and they take turns, so that a slow minute affects all of
them. Memory is the peak above what exists before. `lens` compares the policy loss and the JS between two layers with
autograd on all logits, with the products with the head alone, and with Liger's JSD loss. `step` compares GRPO and OISD
on 16 rollouts and a random model in the shape of SmolLM2-135M with TRL's `compute_loss`, which pads.
"""

import argparse
import contextlib
import csv
import functools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support.processes import peak_bytes, reset_peak
from support.run_folder import commit

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


def now() -> float:
    """Wait for the GPU, then return the time in seconds."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
    leaves = [tensor.requires_grad_() for tensor in (hidden[0].clone(), hidden[1].clone(), head)]
    advantages = torch.randn(N, device=DEVICE)
    batch = lens_batch(torch.randint(V, (N,), device=DEVICE), advantages, torch.full_like(advantages, -10.0))
    return *leaves, batch, replace(oisd.Config(), lens_chunk_tokens=options.chunk)


def dense_loss(final, student, head, batch, config):
    """Compute the token loss of `LensPass` by autograd on all logits."""
    final_logits = final @ head.T
    logprobs = oisd.log_softmax(final_logits, config.temperature).gather(1, batch.target_ids[:, None])[:, 0]
    js = oisd.js_divergence(student @ head.T, final_logits, config.distill_temperature)
    policy_loss = oisd.policy_loss_sum(logprobs, batch.old_logprobs, batch.advantages, config)
    think_loss = oisd.internal_loss_sum(js, batch.advantages, batch.token_scales, config)
    return config.policy_weight * policy_loss + config.think_weight * think_loss


@torch.no_grad()
def head_products(final, student, head, batch, config):
    for rows in zip(final.split(config.lens_chunk_tokens), student.split(config.lens_chunk_tokens)):
        hidden = torch.cat(rows)
        logits = hidden @ head.T
        _ = logits @ head, logits.T @ hidden


def liger_loss(final, student, head, batch, config):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"compiled": final.is_cuda, "chunk_size": config.lens_chunk_tokens}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **settings)
    return loss(student, head, final.detach(), head.detach(), batch.target_ids)


def random_rollouts(lengths, prompt, words=500):
    """Build rollouts of random tokens below `words`, with prompts of the same length."""
    drawn = random.Random(0)
    rows = [drawn.choices(range(words), k=length) for length in lengths]
    parts = [(row[:prompt], row[prompt:], [-12.0] * (len(row) - prompt)) for row in rows]
    return [oisd.Rollout(*part, "stop", advantage=drawn.gauss(0, 1)) for part in parts]


def step_inputs(options):
    """Return a float32 model and 16 rollouts of at most 256 tokens, `--real` % of that on average."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch.float32)
    mean = (16 * options.real - 100) / 15  # % of 256, without the longest one
    width = min(mean, 100 - mean) * 0.8
    lengths = [max(33, round(2.56 * (mean + width * (i - 7) / 7))) for i in range(15)]
    return model.to(DEVICE).train(), random_rollouts([256, *lengths], prompt=32)


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
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    model, rollouts = step_inputs(options)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="a")
    settings = {"loss_type": "bnpo", "num_generations": 2, "per_device_train_batch_size": 16, "report_to": []}
    settings |= {"bf16": options.dtype == "bfloat16", "gradient_checkpointing": False, "use_cpu": DEVICE.type == "cpu"}
    settings = GRPOConfig(tempfile.mkdtemp(), beta=0.0, max_completion_length=224, **settings)
    dataset = Dataset.from_list([{"prompt": "a"}] * 16)
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
SIDES = {
    "lens": {name: functools.partial(lens_side, compute) for name, compute in LENS.items()},
    "step": {"our GRPO": functools.partial(step_ours, **GRPO), "our OISD": step_ours, "TRL's GRPO": step_trl},
}
SECONDS = "s, median (least to most)"
PACKAGES = {"liger JSD": "liger_kernel", "TRL's GRPO": "trl"}
built = {}  # sides by name, in their processes


def work_of(compute, leaves):
    """Compute a loss and its gradients: -> seconds, and a note on what was computed."""
    start = now()
    for leaf in leaves:
        leaf.grad = None
    loss = compute()
    if loss is None:
        return now() - start, ""
    loss = loss[0] if isinstance(loss, tuple) else loss  # `LensPass` also returns statistics
    loss.backward()
    seconds = now() - start
    norm = torch.nn.utils.get_total_norm([leaf.grad.float() for leaf in leaves if leaf.grad is not None])
    return seconds, f"loss {loss.item():.7g}, gradient {norm.item():.7g}"


def work_once(options, name):
    """Do a side's work, in its process: -> seconds, note, and bytes above what existed before."""
    with contextlib.redirect_stdout(sys.stderr):  # for what libraries print
        side = built[name] = built.get(name) or SIDES[options.what][name](options)
        reset_peak(DEVICE)
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # `peak_bytes` of a CPU starts again
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else peak_bytes(DEVICE)
        return *work_of(*side), peak_bytes(DEVICE) - before


def take_turns(options, names, repeats):
    """Let sides work in turn, each in its own process: -> their answers by side, without those of the first turn."""
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in names}
        turns = range(1 + repeats)
        rows = [[pool.submit(work_once, options, name).result() for name, pool in pools.items()] for _ in turns]
    return dict(zip(names, zip(*rows[1:])))


def compare(options):
    """Print a table of all sides, relative to the first."""
    names = options.only.split(",") if options.only else list(SIDES[options.what])
    for name in [name for name in names if name in PACKAGES and not find_spec(PACKAGES[name])]:
        print(f"left out: {name} ({PACKAGES[name]} is not installed)")
        names.remove(name)
    answers = take_turns(options, names, options.repeats)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # slow, but freed memory is returned at once
    room = {name: take_turns(options, [name], 1)[name][0][-1] for name in names}
    middle = {name: statistics.median(seconds for seconds, *_ in answers[name]) for name in names}
    first = names[0]
    row(options, options.what, SECONDS, f"over {first}", "extra GiB", f"over {first}", "", head=True)
    for name in names:
        seconds, notes, _ = zip(*answers[name])
        slower, larger = (f"{mine[name] / max(mine[first], 1e-9):.2f}" for mine in (middle, room))
        row(options, name, spread(seconds), slower, f"{room[name] / 2**30:.2f}", larger, notes[-1])


def row(options, *cells, head=False):
    """Print a row, and append it to the CSV file."""
    print(f"| {' | '.join(cells)} |" + head * f"\n{'|---' * len(cells)}|", flush=True)
    if options.csv:
        with open(options.csv, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(cells)


def spread(seconds):
    return f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=[*SIDES])
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--repeats", type=int, default=5)
    add("--only", help="some sides, separated by commas; the others are compared with the first")
    add("--csv", help="file to append the rows to")
    for name, size in (("tokens", 1024), ("hidden", 1024), ("vocabulary", 151_936), ("chunk", 256)):
        add(f"--{name}", type=int, default=size, help="of the lens pass")
    add("--real", type=int, default=60, help="percentage of the padded tokens that are real, 20 to 100")
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, commit {commit()}\n")
    compare(options)


if __name__ == "__main__":
    main()
