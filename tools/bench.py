"""Speed and memory as ratios, both sides in one run.

    python tools/bench.py lens                                   1,024 tokens, hidden 1,024, vocabulary 151,936
    python tools/bench.py lens --tokens 256 --vocabulary 20000   smaller
    python tools/bench.py grader                                 8,000 responses to MATH500
    python tools/bench.py grader --data math500=FILE             with a local copy
    python tools/bench.py packing                                packed rows against padded ones, a small Qwen3
    python tools/bench.py memory --config configs.toml:smollm2_135m --max_tokens_per_gpu 512      one rank against two

`lens`: the lens pass against plain autograd on whole logits, forward and backward. Each side runs in a process of its
own, so that one's peak cannot hide behind the other's; the peak is the resident set above what inputs and imports take.
Both compute the same loss: clipped policy loss + JS between two layers.

`grader`: `grader.py` with two workers, their start included, against math-verify called one by one in this
process on whole responses. The responses are made: 16 to each problem, half with its gold in the box, 40 % with
another problem's, 5 % without a box, 5 % cut off.

`packing`: 16 rollouts, the longest of 256 tokens, all of them or on average 60 or 30 % of that; forward and backward of
all three losses on the packed row, against the same decoder on the rows padded to the longest (without the loss of
attention, in its favour).

`memory`: what each process of one and of two holds at its peak, beyond what imports take, in a step of the config's
model without its weights' values, sharded, on CPU; beside it what `tools/plan.py` says.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def side(name, tokens, hidden, vocabulary, chunk):
    import torch

    import oisd
    import plumbing

    config = replace(oisd.Config(), lens_chunk_tokens=chunk)
    torch.manual_seed(0)
    final, student = (torch.randn(tokens, hidden, requires_grad=True) for _ in range(2))
    head = (torch.randn(vocabulary, hidden) / hidden**0.5).requires_grad_()
    targets, advantages = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    old = torch.full((tokens,), -10.0)

    batch = SimpleNamespace(target_ids=targets, advantages=advantages, old_logprobs=old, sampler_logprobs=old)
    before, start = plumbing.peak_bytes(torch.device("cpu")), time.perf_counter()
    if name == "dense":
        logprobs, js, *_ = oisd.dense_token_stats(final, student[None], head, targets, config)
        policy, think = oisd.token_losses(logprobs, js, batch, slice(None), config)
        loss = policy + config.think_weight * think
    else:
        loss, *_ = oisd.LensPass.apply(final, student[None], None, head, batch, config)
    loss.backward()
    seconds, peak = time.perf_counter() - start, plumbing.peak_bytes(torch.device("cpu")) - before
    print(
        json.dumps({"loss": loss.item(), "gradient": head.grad.norm().item(), "seconds": seconds, "gib": peak / 2**30})
    )


def bench_lens(options):
    if options.side:
        return side(options.side, options.tokens, options.hidden, options.vocabulary, options.chunk)
    results = {}
    for name in ("dense", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:8}", "  ".join(f"{key} {value:.6g}" for key, value in results[name].items()))
    dense, chunked = results["dense"], results["chunked"]
    print(f"memory ratio {dense['gib'] / chunked['gib']:.2f}, time ratio {dense['seconds'] / chunked['seconds']:.2f}")


def made_responses(golds, copies, seed=0):
    """-> responses, their golds."""
    chance, responses, answers = random.Random(seed), [], []
    reasoning = "First, $x^2 + 3x = 12$, so that $x = \\frac{7}{2}$ or less; then we divide by 4. " * 5
    for gold in golds:
        for _ in range(copies):
            box = rf"\boxed{{{gold if chance.random() < 0.55 else chance.choice(golds)}}}"
            endings = f"The answer is {box}.", "So it must be 12.", f"The answer is {box[:-1]}"
            responses.append(reasoning + chance.choices(endings, (90, 5, 5))[0])
            answers.append(gold)
    return responses, answers


def bench_grader(options):
    from math_verify import parse, verify

    import evaluate
    import inputs
    import oisd
    from grader import Grader

    (benchmark,) = evaluate.find_benchmarks(options.data, oisd.Config()).values()
    rows = inputs.read_dataset(benchmark.source)
    golds = [str(inputs.column(row, benchmark.answer_field, benchmark.source)) for row in rows]
    responses, answers = made_responses(golds, options.copies)
    start = time.perf_counter()
    with Grader(workers=2) as grader:
        ours = grader.grade(responses, answers)
    clock = [time.perf_counter() - start]
    plain = [float(verify(parse(rf"\boxed{{{gold}}}"), parse(text))) for gold, text in zip(answers, responses)]
    clock.append(time.perf_counter() - start - clock[0])
    for name, verdicts, seconds in zip(("grader", "math-verify"), (ours, plain), clock):
        print(f"{name:12} {seconds:7.1f} s  {len(verdicts) / seconds:6.0f} a second  right {sum(verdicts):.0f}")
    differ = sum(a != b for a, b in zip(ours, plain))
    print(f"{len(responses)} responses; time ratio {clock[1] / clock[0]:.2f}; {differ} verdicts differ")


def bench_packing(options):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    import oisd

    shape = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2))
    tapped, full = oisd.TappedModel(model.train(), replace(oisd.Config(), student_layer=3, dtype="float32")), None
    for percent in (100, 60, 30):
        mean = (16 * percent - 100) / 15  # of all but the longest
        spread = min(mean, 100 - mean) * 0.8
        lengths = [256] + [round(2.56 * (mean + spread * (i - 7) / 7)) for i in range(15)]
        rollouts = [oisd.Rollout([1] * 8, [2] * (n - 8), [-9.0] * (n - 8), "stop", advantage=1.0) for n in lengths]
        ids = torch.ones(16, 256, dtype=torch.long)
        mask = torch.arange(256) < torch.tensor(lengths)[:, None]

        def packed(rollouts=rollouts):
            sums = tapped(tapped.losses, oisd.pack(rollouts, tapped.config))
            (sums["token_loss"] + sums["step_loss"]).backward()

        def padded(ids=ids, mask=mask):
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            final = hidden[mask]  # losses on real tokens only: what is compared is the decoder
            numbers = torch.zeros(len(final))
            batch = SimpleNamespace(target_ids=numbers.long(), advantages=numbers + 1, old_logprobs=numbers - 9)
            batch.sampler_logprobs = batch.old_logprobs
            oisd.LensPass.apply(final, final[None], None, tapped.head, batch, tapped.config)[0].backward()

        seconds = []
        for work in (packed, padded):
            work()  # warm
            times = []
            for _ in range(3):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            seconds.append(sorted(times)[1])
        full = full or seconds[0]
        share = sum(lengths) / (16 * 256)
        line = f"real tokens {100 * share:5.1f} %   packed {seconds[0]:6.2f} s, {100 * seconds[0] / full:.0f} % of full"
        print(f"{line}   padded {seconds[1]:6.2f} s   ratio {seconds[1] / seconds[0]:.2f}", flush=True)


def measure_memory(words):
    """One rank's part; the group comes from torchrun, or is one."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import oisd
    import plumbing
    from tools import plan

    _, config = oisd.load_config(words)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    torch.randn(256, 256).square().sum()  # what the first work takes for good
    before = plumbing.peak_bytes(torch.device("cpu"))
    model = oisd.TappedModel(oisd.load_model(config, empty_on="meta")[0], config).train()
    oisd.shard(model, init_device_mesh("cpu", (plumbing.world(),)), config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = oisd.pack(plan.longest_batch(config), config)
    plan.micro_batch(model, batch), optimizer.step(), optimizer.zero_grad()
    plan.micro_batch(model, batch), plan.micro_batch(model, batch)  # with the optimizer's state; with gradients
    print(f"measured {plumbing.peak_bytes(torch.device('cpu')) - before}", flush=True)
    dist.destroy_process_group()


def measured(words, ranks):
    """-> bytes at the peak of each rank, for a config as `oisd.py` takes it from the command line."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # freed memory goes back at once
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, "memory", "--side", "measured", *words]
    shown = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    return [int(line.split()[1]) for line in shown.splitlines() if line.startswith("measured")]


def bench_memory(options):
    import oisd
    from tools import plan

    if options.side:
        return measure_memory(options.words)
    for ranks in (1, 2):
        sizes = " and ".join(f"{size / 1e9:.2f}" for size in measured(options.words, ranks))
        planned = plan.plan(oisd.load_config(options.words)[1], ranks).training / 1e9
        print(f"{ranks} rank(s): measured {sizes} GB, planned {planned:.2f} GB each", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lens", "grader", "packing", "memory"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--data", default="math500", help="a benchmark of evaluate.py, or NAME=FILE")
    parser.add_argument("--copies", type=int, default=16, help="responses to each problem")
    parser.add_argument("--side", choices=["dense", "chunked", "measured"], help=argparse.SUPPRESS)
    options, options.words = parser.parse_known_args()
    if options.words and options.what != "memory":
        parser.error(f"unknown: {' '.join(options.words)}")
    globals()[f"bench_{options.what}"](options)


if __name__ == "__main__":
    main()
