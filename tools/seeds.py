"""OISD and GRPO on the laptop default, several seeds each: the README's table and `tools/figures/tiny.png`.

    python tools/seeds.py 3        seeds 0, 1, 2; runs that are already in runs/seeds/ are not repeated
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "seeds"
METHODS = {"OISD": [], "GRPO": ["--think_weight", "0", "--attention_weight", "0"]}
PANELS = (("reward", "reward"), ("think_js", "JS of layer 3 to the last (nats)"), ("entropy", "entropy (nats)"))


def train(method, seed):
    folder = RUNS / f"{method.lower()}-{seed}"
    if not (folder / "final").exists():
        command = [sys.executable, "oisd.py", "--seed", str(seed), "--output_dir", str(folder), *METHODS[method]]
        subprocess.run(command, check=True, cwd=ROOT)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return metrics, list(json.loads((folder / "held_out.json").read_text()).values())


def draw(results):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS):
        for method, runs in results.items():
            columns = list(zip(*([row[name] for row in metrics] for metrics, _ in runs)))
            means = [statistics.mean(column) for column in columns]
            spreads = [statistics.stdev(column) for column in columns]
            steps = range(1, len(means) + 1)
            axis.plot(steps, means, label=method)
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    (ROOT / "tools" / "figures").mkdir(exist_ok=True)
    figure.savefig(ROOT / "tools" / "figures" / "tiny.png", dpi=90)


def main(count):
    results = {method: [] for method in METHODS}
    for seed in range(count):
        for method in METHODS:
            results[method].append(train(method, seed))
    draw(results)
    for method, runs in results.items():
        for when, index in (("before", 0), ("after", -1)):
            scores = [100 * scores[index]["accuracy"] for _, scores in runs]
            each = ", ".join(f"{score:.1f}" for score in scores)
            print(f"{method} {when}: {statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f} % ({each})")
        print(f"{method} seconds a step: {statistics.mean(r['seconds'] for metrics, _ in runs for r in metrics):.2f}")
    after = {method: [100 * scores[-1]["accuracy"] for _, scores in runs] for method, runs in results.items()}
    pairs = [oisd - grpo for oisd, grpo in zip(after["OISD"], after["GRPO"])]
    print(f"OISD - GRPO after, paired by seed: {statistics.mean(pairs):+.1f} ± {statistics.stdev(pairs):.1f} points")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 2:
        sys.exit("how many seeds? at least 2: python tools/seeds.py 3")
    main(int(sys.argv[1]))
