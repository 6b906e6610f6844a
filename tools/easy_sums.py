"""Problems that SmolLM2-135M gets right now and then: write train.jsonl and test.jsonl into a folder.

python tools/easy_sums.py easy_sums
"""

import json
import random
import sys
from pathlib import Path


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    pairs = [(a, b) for a in range(2, 40) for b in range(2, 40)]
    rng.shuffle(pairs)
    for name, chosen in (("train", pairs[:1000]), ("test", pairs[1000:1128])):
        rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in chosen]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
