"""Speed and memory as ratios, both sides in one run.

    python tools/bench.py lens                                   1,024 tokens, hidden 1,024, vocabulary 151,936
    python tools/bench.py lens --tokens 256 --vocabulary 20000   smaller
    python tools/bench.py grader                                 8,000 responses to MATH500
    python tools/bench.py grader --data math500=FILE             with a local copy
    python tools/bench.py packing                                packed rows against padded ones, a small Qwen3

`lens`: the lens pass against plain autograd on whole logits, forward and backward. Each side runs in a process of its
own, so that one's peak cannot hide behind the other's; the peak is the resident set above what inputs and imports take.
Both compute the same loss: clipped policy loss + JS between two layers.

`grader`: `tools/grader.py` with two workers, their start included, against math-verify called one by one in this
process on whole responses. The responses are made: 16 to each problem, half with its gold in the box, 40 % with
another problem's, 5 % without a box, 5 % cut off.

`packing`: 16 rollouts, the longest of 256 tokens, all of them or on average 60 or 30 % of that; forward and backward of
all three losses on the packed row, against the same decoder on the rows padded to the longest (without the loss of
attention, in its favour).
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def side(name, tokens, hidden, vocabulary, chunk):
    import torch

    import oisd

    config = replace(oisd.Config(), lens_chunk_tokens=chunk)
    torch.manual_seed(0)
    final, student = (torch.randn(tokens, hidden, requires_grad=True) for _ in range(2))
    head = (torch.randn(vocabulary, hidden) / hidden**0.5).requires_grad_()
    targets, advantages = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    old = torch.full((tokens,), -10.0)

    def token_loss(rows, logprobs, js):
        think = oisd.think_loss_sum(js, advantages[rows], config.advantage_clip)
        return oisd.policy_loss_sum(logprobs, old[rows], advantages[rows], config) + config.think_weight * think

    before, start = peak_bytes(), time.perf_counter()
    if name == "dense":
        logprobs, js, *_ = oisd.dense_token_stats(final, student, head, targets, config)
        loss = token_loss(slice(None), logprobs, js)
    else:
        loss, *_ = oisd.LensPass.apply(final, student, head, targets, token_loss, config)
    loss.backward()
    seconds, peak = time.perf_counter() - start, peak_bytes() - before
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
    import oisd
    from tools.grader import Grader

    (benchmark,) = evaluate.find_benchmarks(options.data, oisd.Config())
    source = evaluate.fetch(benchmark)
    golds = [str(oisd.column(row, benchmark.answer_field, source)) for row in oisd.read_dataset(source)]
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
            sums = tapped(oisd.pack(rollouts, tapped.config))
            (sums["token_loss_sum"] + sums["step_loss_sum"]).backward()

        def padded(ids=ids, mask=mask):
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            final = hidden[mask]  # losses on real tokens only: what is compared is the decoder
            loss = lambda rows, logprobs, js: (logprobs + js).sum()  # noqa: E731
            targets = torch.zeros(len(final), dtype=torch.long)
            oisd.LensPass.apply(final, final, tapped.head, targets, loss, tapped.config)[0].backward()

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lens", "grader", "packing"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--data", default="math500", help="a benchmark of evaluate.py, or NAME=FILE")
    parser.add_argument("--copies", type=int, default=16, help="responses to each problem")
    parser.add_argument("--side", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    {"lens": bench_lens, "grader": bench_grader, "packing": bench_packing}[options.what](options)


if __name__ == "__main__":
    main()
