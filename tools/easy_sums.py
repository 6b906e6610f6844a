r"""Sums that SmolLM2-135M-Instruct gets right now and then: write train.jsonl and test.jsonl into a folder.

    python tools/easy_sums.py easy_sums

    python oisd.py --config configs.toml:smollm2_135m --train_data easy_sums/train.jsonl \
        --test_data easy_sums/test.jsonl --question_field question --answer_field answer --prompts_per_step 4 \
        --group_size 8 --mini_batch_prompts 4 --max_response_tokens 12 --learning_rate 1e-5 \
        --num_steps 24 --gradient_checkpointing false --eval_samples 4

A question is a list of chat messages with one worked example, which teaches the box; the test sums are not in training.
"""

import json
import random
import sys
from pathlib import Path

EXAMPLE = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "\\boxed{7}"}]


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9) if (a, b) != (3, 4)]
    random.Random(0).shuffle(pairs)
    for name, chosen in (("train", pairs[:47]), ("test", pairs[47:])):
        rows = [
            {"question": [*EXAMPLE, {"role": "user", "content": f"{a} + {b}?"}], "answer": str(a + b)}
            for a, b in chosen
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
