"""Speed and memory as ratios: both sides in one run, each in a process of its own, taking turns.

    python tools/bench.py lens                     the lens pass: 1,024 tokens, hidden 1,024, vocabulary 151,936
    python tools/bench.py lens --dtype bfloat16 --tokens 256 --vocabulary 20000
    python tools/bench.py lens --parts             the lens pass in parts: products, rows of logits, sizes of chunks
    python tools/bench.py step --real 60           a training step on stored rollouts, 60 % of the padded rows real
    python tools/bench.py step --shape qwen3_4b    a step in that shape, in parts, against the plan and the card's peak
    python tools/bench.py attention                the attention loss, by tokens and by sampled steps
    python tools/bench.py packing                  packed rows against padded ones, a small Qwen3
    python tools/bench.py sampler                  the sampler without vLLM
    python tools/bench.py grader                   8,000 responses to MATH500; --data math500=FILE for a local copy
    python tools/bench.py memory --config configs.toml:smollm2_135m --max_tokens_per_gpu 512      one rank against two

Every side warms up once, then works `--repeats` times, one side after the other, so that a slow minute slows all. The
table has medians, the spread from least to most, and each side's median over that of ours; `--csv FILE` keeps every
single time. A side whose package is not installed is named and left out. On a GPU where there is one.

`lens`: forward and backward of clipped policy loss + JS between two layers; against plain autograd on whole logits,
against its own floor (the six products with the head alone), and against Liger's fused JSD loss (JSD alone, without
policy loss, from `liger-kernel`). `step`: random weights in the shape of SmolLM2-135M, 16 rollouts; GRPO (both weights
0, and no JS measured for the log), OISD, and `GRPOTrainer.compute_loss` of TRL on the same rollouts, padded. Memory is
the peak above what inputs, model and the gradients of the step before take. What a side's loss and gradient were is
read after its time is taken.

`grader`: `grader.py` with two workers, their start included, against math-verify called one by one in this
process on whole responses. The responses are made: 16 to each problem, half with its gold in the box, 40 % with
another problem's, 5 % without a box, 5 % cut off. `memory`: what each process of one and of two holds at its peak,
beyond what imports take, in a step of the config's model without its weights' values, sharded, on CPU; beside it what
`tools/plan.py` says.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# ----------------------------------------------------- Sides ---------------------------------------------------------
# A side is a function of the options that makes its inputs and returns the work to be timed. The work returns a
# function to be called after it: the facts that all sides must share, such as the loss.


def device_of():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lens_inputs(options, dtype=None):
    """-> final, student (N, D), head (V, D), what the pass looks at of a batch, config."""
    import torch

    import oisd

    torch.manual_seed(0)
    N, D, V, device = options.tokens, options.hidden, options.vocabulary, device_of()
    dtype = getattr(torch, dtype or options.dtype)
    final, student = (torch.randn(N, D, device=device).to(dtype).requires_grad_() for _ in range(2))
    head = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    targets, advantages = torch.randint(V, (N,), device=device), torch.randn(N, device=device)
    batch = lens_batch(targets, advantages, torch.full((N,), -10.0, device=device))
    return final, student, head, batch, replace(oisd.Config(), lens_chunk_tokens=options.chunk)


def lens_ours(options):
    import oisd

    final, student, head, batch, config = lens_inputs(options)

    def work():
        final.grad = student.grad = head.grad = None
        loss, *_ = oisd.LensPass.apply(final, student, head, batch, config)
        loss.backward()
        return lambda: {"loss": loss.item(), "gradient": head.grad.float().norm().item()}

    return work


def lens_batch(targets, advantages, old):
    """What a lens pass looks at of a batch, all tokens of equal weight."""
    batch = SimpleNamespace(target_ids=targets, advantages=advantages, token_scales=advantages.new_ones(len(targets)))
    batch.old_logprobs = batch.sampler_logprobs = old
    return batch


def dense_loss(final, student, head, batch, config):
    """The token loss of `LensPass` by autograd on whole logits."""
    import torch.nn.functional as F

    import oisd

    final_logits, student_logits = F.linear(final, head), F.linear(student, head)
    policy = (final_logits.float() / config.temperature).log_softmax(-1)
    logprobs = policy.gather(1, batch.target_ids[:, None])[:, 0]
    js = oisd.js_divergence(student_logits, final_logits, config.distill_temperature)
    policy_loss, think_loss = oisd.token_losses(logprobs, js, batch, slice(None), config)
    return policy_loss + config.think_weight * think_loss


def lens_dense(options):
    final, student, head, batch, config = lens_inputs(options)

    def work():
        final.grad = student.grad = head.grad = None
        loss = dense_loss(final, student, head, batch, config)
        loss.backward()
        return lambda: {"loss": loss.item(), "gradient": head.grad.float().norm().item()}

    return work


def lens_floor(options):
    import torch

    final, student, head, _, config = lens_inputs(options)
    hidden, weight = torch.cat([final.detach(), student.detach()]), head.detach()

    def work():
        for chunk in hidden.split(2 * config.lens_chunk_tokens):
            logits = chunk @ weight.T
            logits @ weight, logits.T @ chunk
        return dict

    return work


def lens_liger(options):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    final, student, head, batch, config = lens_inputs(options)
    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=final.is_cuda, chunk_size=config.lens_chunk_tokens
    )

    def work():
        final.grad = student.grad = head.grad = None
        loss = loss_of(student, head, final.detach(), head.detach(), batch.target_ids)
        loss.backward()
        return dict

    return work


def stored_rollouts(options):
    """-> a model in the shape of SmolLM2-135M, and 16 rollouts of at most 256 tokens, `--real` % of that on average."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import oisd

    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    torch.manual_seed(0)
    # Weights are float32, as a trainer's are; in bfloat16 the computation is.
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads), dtype=torch.float32).to(device_of())
    drawn = random.Random(0)
    rollouts = []
    for length in lengths_of(256, options.real):
        ids = [drawn.randrange(49152) for _ in range(length)]
        rollouts.append(oisd.Rollout(ids[:32], ids[32:], [0.0] * (length - 32), "stop", advantage=drawn.gauss(0, 1)))
    return model, rollouts


def lengths_of(longest, percent):
    """Of 16 rows, one the longest: `percent` % of the padded tokens are real."""
    mean = (16 * percent - 100) / 15  # of all but the longest
    spread = min(mean, 100 - mean) * 0.8
    return [longest] + [round(longest / 100 * (mean + spread * (i - 7) / 7)) for i in range(15)]


def step_ours(options, **weights):
    import torch

    import oisd

    model, rollouts = stored_rollouts(options)
    config = replace(
        oisd.Config(), student_layer=10, dtype=options.dtype, recompute_layers=0, max_response_tokens=224,
        max_prompt_tokens=32, max_tokens_per_gpu=4096, lens_chunk_tokens=options.chunk, **weights,
    )  # fmt: skip
    model.set_attn_implementation(config.kernel)
    tapped = oisd.TappedModel(model, config).train()
    batch = oisd.pack(rollouts, config, device_of())
    with torch.no_grad():
        old = tapped(tapped.response_logprobs, batch)[0]
    batch = replace(batch, old_logprobs=old, sampler_logprobs=old)

    def work():
        model.zero_grad()
        sums = tapped(tapped.losses, batch)
        counts = len(batch.target_ids), max(1, len(batch.queries))
        (sums["token_loss"] / counts[0] + sums["step_loss"] / counts[1]).backward()
        return lambda: facts_of(sums["policy_loss"] / counts[0], model)

    return work


def facts_of(loss, model):
    import torch

    gradient = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    return {"policy loss": loss.item(), "gradient": gradient}


def step_grpo(options):
    return step_ours(options, think_weight=0.0, attention_weight=0.0, measure_js=False)


def step_trl(options):
    import logging
    import tempfile
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    model, rollouts = stored_rollouts(options)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), beta=0.0, loss_type="bnpo", temperature=1.0, num_generations=2,
        per_device_train_batch_size=16, bf16=options.dtype == "bfloat16", report_to=[], gradient_checkpointing=False,
        use_cpu=device_of().type == "cpu", max_completion_length=224,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward_funcs=lambda **_: [0.0], args=settings, train_dataset=Dataset.from_list([{"prompt": "a"}] * 16),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="a"),
    )  # fmt: skip
    model.train()
    longest = max(len(r.response_ids) for r in rollouts)
    completions = [r.response_ids + [0] * (longest - len(r.response_ids)) for r in rollouts]
    mask = [[1] * len(r.response_ids) + [0] * (longest - len(r.response_ids)) for r in rollouts]
    tensors = {"prompt_ids": [r.prompt_ids for r in rollouts], "completion_ids": completions, "completion_mask": mask}
    inputs = {name: torch.tensor(rows, device=device_of()) for name, rows in tensors.items()}
    inputs["prompt_mask"] = torch.ones_like(inputs["prompt_ids"])
    inputs["advantages"] = torch.tensor([r.advantage for r in rollouts], device=device_of())
    trainer.current_gradient_accumulation_steps = 1

    def work():
        model.zero_grad()
        with torch.autocast(device_of().type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        return lambda: facts_of(loss, model)

    return work


def attention_side(tokens, steps):
    """Forward and backward of the attention loss: one rollout of `tokens` tokens, sampled at `steps` of them."""

    def side(options):
        import torch

        import oisd

        torch.manual_seed(0)
        config = replace(oisd.Config(), attention_steps=steps, max_response_tokens=tokens, max_tokens_per_gpu=40_000)
        rollout = oisd.Rollout([1], [1] * (tokens - 1), [0.0] * (tokens - 1), "stop", advantage=1.0)
        rollout.old_logprobs = torch.zeros(tokens - 1)
        batch, device = oisd.pack([rollout], config, device_of()), device_of()
        taps = [oisd.Tap(), oisd.Tap()]
        for tap in taps:
            query, key = (torch.randn(1, heads, tokens, 64, device=device).requires_grad_() for heads in (16, 8))
            tap.see(query, key)

        def work():
            for tap in taps:
                tap.query.grad = tap.key.grad = None
            oisd.attention_js(*taps, batch, config).sum().backward()
            return dict

        return work

    return side


def packing_side(packed, percent):
    def side(options):
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        import oisd

        shape = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads)).to(device_of())
        tapped = oisd.TappedModel(model.train(), replace(oisd.Config(), student_layer=3, dtype="float32"))
        lengths = lengths_of(256, percent)
        rollouts = [oisd.Rollout([1] * 8, [2] * (n - 8), [-9.0] * (n - 8), "stop", advantage=1.0) for n in lengths]
        for rollout in rollouts:
            rollout.old_logprobs = torch.tensor(rollout.sampler_logprobs)
        batch, ids = oisd.pack(rollouts, tapped.config, device_of()), torch.ones(16, 256, dtype=torch.long)
        ids, mask = (x.to(device_of()) for x in (ids, torch.arange(256) < torch.tensor(lengths)[:, None]))

        def work_packed():
            sums = tapped(tapped.losses, batch)
            (sums["token_loss"] + sums["step_loss"]).backward()
            return dict

        def work_padded():
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            final = hidden[mask]  # losses on real tokens only: what is compared is the decoder
            numbers = torch.zeros(len(final), device=final.device)
            row = lens_batch(numbers.long(), numbers + 1, numbers - 9)
            oisd.LensPass.apply(final, final, tapped.head, row, tapped.config)[0].backward()
            return dict

        return work_packed if packed else work_padded

    return side


def sampler_side(ours):
    """64 responses of at most 96 tokens, of geometric lengths (mean about 32), to prompts of 4 to 40 tokens."""

    def side(options):
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        import laptop

        shape = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=6)).to(device_of()).eval()
        drawn, ends = random.Random(0), list(range(0, 8192, 32))
        prompts = [[1 + 32 * drawn.randrange(200) for _ in range(drawn.randrange(4, 41))] for _ in range(64)]
        settings = {"temperature": 1.0, "max_response_tokens": 96, "sampler_batch": 32, "dtype": "float32"}
        sampler = laptop.HfSampler(model, ends, SimpleNamespace(**settings), device_of())

        def work_ours():
            tokens = sum(len(sample[1]) for sample in sampler.stream(prompts, list(range(64))))
            return lambda: {"tokens": tokens}

        def work_plain():
            tokens = 0
            torch.manual_seed(0)
            for start in (0, 32):
                rows = prompts[start : start + 32]
                longest = max(map(len, rows))
                ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device_of())
                out = model.generate(
                    ids, attention_mask=(ids > 0).long(), do_sample=True, top_k=0, max_new_tokens=96,
                    eos_token_id=ends, pad_token_id=0,
                )[:, longest:]  # fmt: skip
                ended = torch.isin(out, torch.tensor(ends, device=out.device)).int()
                tokens += int(((ended.cumsum(1) - ended) == 0).sum())
            return lambda: {"tokens": tokens}

        return work_ours if ours else work_plain

    return side


SIDES = {
    "lens": {"ours": lens_ours, "dense": lens_dense, "floor": lens_floor, "liger JSD": lens_liger},
    "step": {"our GRPO": step_grpo, "our OISD": step_ours, "TRL's GRPO": step_trl},
    "attention": {f"{t} tokens {s} steps": attention_side(t, s) for t, s in ((1024, 64), (4096, 64), (16384, 64),
                                                                                (16384, 256), (16384, 1024))},
    "packing": {f"{name} {share} % real": packing_side(name == "packed", share)
                for share in (100, 60, 30) for name in ("packed", "padded")},
    "sampler": {"ours": sampler_side(True), "generate": sampler_side(False)},
}  # fmt: skip


# ----------------------------------------------------- Taking turns --------------------------------------------------


def serve(options):
    """A side's process: for every line on its input it works once and answers with time, peak memory and facts."""
    import torch

    import plumbing

    device = device_of()
    say, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    try:
        work = SIDES[options.what][options.side](options)
    except ImportError as problem:
        print(json.dumps({"missing": str(problem)}), file=say, flush=True)
        return
    print("{}", file=say, flush=True)
    for _ in sys.stdin:
        before, start = start_peak(device), time.perf_counter()
        facts = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - start, plumbing.peak_bytes(device) - before
        print(json.dumps({"seconds": seconds, "gib": peak / 2**30, **facts()}), file=say, flush=True)


def start_peak(device):
    """`plumbing.peak_bytes` starts anew from what is held now. -> that, bytes."""
    import torch

    import plumbing

    plumbing.reset_peak(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set becomes what it is now
    return plumbing.peak_bytes(device)


class Side:
    """A side in a process of its own."""

    def __init__(self, name, env=()):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, env={**os.environ, **dict(env)}, text=True, **pipes)
        self.shown = []
        threading.Thread(target=lambda: self.shown.append(self.process.stderr.read()), daemon=True).start()
        self.missing = self.answer().get("missing")

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            time.sleep(0.5)
            sys.exit("".join(self.shown) + "bench: a side failed")
        return json.loads(line)

    def work(self):
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def take_turns(options):
    """All sides, in turn. -> {side: [answer of each repeat]}, with the peak memory of one more process in each."""
    names = options.only.split(",") if options.only else list(SIDES[options.what])
    if unknown := [name for name in names if name not in SIDES[options.what]]:
        sys.exit(f"bench: --only {unknown[0]!r}: the sides are {', '.join(SIDES[options.what])}")
    sides = {name: Side(name) for name in names}
    for name, side in sides.items():
        if side.missing:
            print(f"left out: {name} ({side.missing})", flush=True)
    sides = {name: side for name, side in sides.items() if not side.missing}
    answers = {name: [] for name in sides}
    for turn in range(-1, options.repeats):
        for name, side in sides.items():
            answer = side.work()
            if turn >= 0:
                answers[name].append(answer)
    for name, side in sides.items():
        side.close()
        alone = Side(name, {"MALLOC_MMAP_THRESHOLD_": "65536"}.items())  # slow, but what is freed goes back at once
        alone.work()
        gib = alone.work()["gib"]
        alone.close()
        answers[name] = [answer | {"gib": gib} for answer in answers[name]]
    return answers


def compare(options):
    answers = take_turns(options)
    first = next(iter(answers))
    base = statistics.median(a["seconds"] for a in answers[first])
    room = statistics.median(a["gib"] for a in answers[first])
    print(f"| {options.what} | seconds, median (least to most) | over {first} | extra GiB | over {first} | |")
    print("|---|---|---|---|---|---|")
    for name, rows in answers.items():
        times, gib = [row["seconds"] for row in rows], statistics.median(row["gib"] for row in rows)
        middle = statistics.median(times)
        facts = ", ".join(f"{key} {rows[-1][key]:.7g}" for key in rows[-1] if key not in ("seconds", "gib"))
        spread = f"{middle:.4g} ({min(times):.4g} to {max(times):.4g})"
        print(f"| {name} | {spread} | {middle / base:.2f} | {gib:.2f} | {gib / max(room, 1e-9):.2f} | {facts} |")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            lines = [(name, row["seconds"], row["gib"]) for name, rows in answers.items() for row in rows]
            csv.writer(file).writerows([("side", "seconds", "extra_gib"), *lines])


# ----------------------------------------------------- Two of their own kind -----------------------------------------


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
        planned = plan.trace(oisd.load_config(options.words)[1], ranks).training / 1e9
        print(f"{ranks} rank(s): measured {sizes} GB, planned {planned:.2f} GB each", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SIDES, "grader", "memory"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="some sides, separated by commas; the first is what others are held to")
    parser.add_argument("--csv", help="file for every single time")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=256, help="lens_chunk_tokens")
    parser.add_argument("--real", type=int, default=60, help="per cent of the padded tokens that are real, 7 to 100")
    parser.add_argument("--data", default="math500", help="a benchmark of evaluate.py, or NAME=FILE")
    parser.add_argument("--copies", type=int, default=16, help="responses to each problem")
    parser.add_argument("--parts", action="store_true", help="lens: its parts, by size of chunk")
    parser.add_argument("--shape", choices=["qwen3_4b", "qwen3_06b", "tiny"], help="step: its parts, in this shape")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options, options.words = parser.parse_known_args()
    if options.shape and options.what == "step":
        from tools import parts

        return parts.measure_step(options.shape, options.words, options.repeats, options.csv)
    if options.words and options.what != "memory":
        parser.error(f"unknown: {' '.join(options.words)}")
    if options.parts and options.what == "lens":
        import torch

        from tools import parts

        sizes = options.tokens, options.hidden, options.vocabulary
        parts.measure_lens(*sizes, getattr(torch, options.dtype), options.repeats, options.csv)
    elif options.what in SIDES:
        serve(options) if options.side else compare(options)
    else:
        {"grader": bench_grader, "memory": bench_memory}[options.what](options)


if __name__ == "__main__":
    main()
