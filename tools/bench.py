"""Peak memory and time of the lens pass against plain autograd on whole logits, forward and backward, in one run.

    python tools/bench.py                                        1,024 tokens, hidden 1,024, vocabulary 151,936
    python tools/bench.py --tokens 256 --vocabulary 20000        smaller

Each side runs in a process of its own, so that one's peak cannot hide behind the other's; the peak is the resident set
above what inputs and imports take. Both compute the same loss: clipped policy loss + JS between two layers.
"""

import argparse
import json
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--side", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return side(options.side, options.tokens, options.hidden, options.vocabulary, options.chunk)
    results = {}
    for name in ("dense", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:8}", "  ".join(f"{key} {value:.6g}" for key, value in results[name].items()))
    dense, chunked = results["dense"], results["chunked"]
    print(f"memory ratio {dense['gib'] / chunked['gib']:.2f}, time ratio {dense['seconds'] / chunked['seconds']:.2f}")


if __name__ == "__main__":
    main()
