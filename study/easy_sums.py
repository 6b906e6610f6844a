r"""Two tasks for SmolLM2-135M-Instruct: write train.jsonl and test.jsonl into a folder.

    python study/easy_sums.py runs/start/sums           5 + 8?             right now and then
    python study/easy_sums.py runs/start/next --next    47, 48, 49, ?      right about once in four times

    python oisd.py --config configs.toml:smollm2_easy

A question is a list of chat messages with one worked example, which teaches the box; no test question is in training.
"""

import argparse
import json
import random
from pathlib import Path


def sums():
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9) if (a, b) != (3, 4)]
    return ("3 + 4?", 7), [(f"{a} + {b}?", a + b) for a, b in pairs], 47


def following():
    starts = [start for start in range(10, 97) if start != 31]
    return ("31, 32, 33, ?", 34), [(f"{n}, {n + 1}, {n + 2}, ?", n + 3) for n in starts], 62


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--next", action="store_true", help="the number that follows, not sums")
    options = parser.parse_args()
    (question, answer), problems, train = (following if options.next else sums)()
    example = [{"role": "user", "content": question}, {"role": "assistant", "content": f"\\boxed{{{answer}}}"}]
    random.Random(0).shuffle(problems)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", problems[:train]), ("test", problems[train:])):
        rows = [{"question": [*example, {"role": "user", "content": q}], "answer": str(a)} for q, a in chosen]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
