"""Count the errors of graders on answers that are right or wrong by rule.

    python tools/grading.py math500.parquet reward_model.ground_truth

takes the gold answers in a column of a file and writes 500 answers to them for each kind in
paraphrases.tsv. The project's grader is compared with math-verify, called as its README calls it,
and with TRL's accuracy reward where TRL is installed.
"""

import argparse
import collections
import importlib.util
import logging
import re
import sys
import time
from pathlib import Path

import math_verify

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import problems
from support.grader import Grader

TEMPLATES = Path(__file__).with_name("paraphrases.tsv")
UNICODE = {
    "-": "−",
    "^2": "²",
    "^3": "³",
    r"^\circ": "°",
    r"\pi": "π",
    r"\infty": "∞",
    r"\cup": "∪",
    r"\frac{1}{2}": "½",
}
WIDE = {ord("0") + digit: ord("０") + digit for digit in range(10)}


def make_pairs(golds: list[str], count: int = 500) -> list[tuple[str, str, str, bool]]:
    """Return (kind, gold, answer, whether it is right), `count` of each kind."""
    texts = [gold for gold in golds if not re.search(r"[=,]|\\in ", gold)]
    numbers = [int(gold) for gold in golds if gold.isdigit() and 1 < int(gold) < 10_000]
    templates = collections.defaultdict(list)
    for line in TEMPLATES.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            kind, gold, answer, verdict = line.split("\t")
            templates[kind, verdict == "right"].append((gold, answer))
    pairs = []
    for (kind, right), rows in templates.items():
        for index in range(count):
            fields = make_fields(texts[index % len(texts)], numbers[index % len(numbers)], index)
            gold, answer = (fill(template, fields) for template in rows[index % len(rows)])
            pairs.append((kind, gold, answer, right))
    return pairs


def make_fields(text: str, n: int, index: int) -> dict:
    """Return what the templates may name."""
    m = n + 1 + index % 97
    unicode = text
    for latex, char in UNICODE.items():
        unicode = unicode.replace(latex, char)
    fields = {"g": text, "unicode": unicode, "wide_g": text.translate(WIDE), "wide": str(n).translate(WIDE)}
    fields |= {"n": n, "m": m, "n1": n + 1, "difference": m - n, "hundredth": n / 100, "sixty_n": 60 * n}
    return fields | {"nine_n_1": 9 * n + 1, "bin": f"{n:b}", "oct": f"{n:o}"}


def fill(template: str, fields: dict) -> str:
    return re.sub(r"<(\w+)>", lambda name: str(fields[name[1]]), template)


def ours(golds: list[str], responses: list[str]) -> list[float]:
    with Grader(workers=1, seconds=60.0) as grader:
        return grader.grade(responses, golds)


def plain_math_verify(golds: list[str], responses: list[str]) -> list[bool]:
    parse = math_verify.parse
    return [math_verify.verify(parse(f"${gold}$"), parse(text)) for gold, text in zip(golds, responses)]


def trl_reward(golds: list[str], responses: list[str]) -> list[float | None]:
    from trl.rewards import accuracy_reward

    completions = [[{"role": "assistant", "content": text}] for text in responses]
    return accuracy_reward(completions, [f"${gold}$" for gold in golds])


def count_errors(pairs: list[tuple[str, str, str, bool]], grade) -> dict[tuple[str, bool], int]:
    """Return the number of wrong verdicts by (kind, whether the answers are right)."""
    golds = [gold for _, gold, _, _ in pairs]
    verdicts = grade(golds, [rf"\boxed{{{answer}}}" for _, _, answer, _ in pairs])
    errors = collections.Counter({(kind, right): 0 for kind, _, _, right in pairs})
    for (kind, _, _, right), verdict in zip(pairs, verdicts):
        errors[kind, right] += bool(verdict) != right
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("column", nargs="?", default="answer")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify reports each timeout
    golds = [problems.gold_text(problems.column(row, options.column)) for row in problems.read_dataset(options.file)]
    pairs = make_pairs(golds)
    graders = {"this grader": ours, "math-verify": plain_math_verify}
    if importlib.util.find_spec("trl"):
        graders["TRL"] = trl_reward
    errors, speed = {}, {}
    for name, grade in graders.items():
        start = time.perf_counter()
        errors[name] = count_errors(pairs, grade)
        speed[name] = len(pairs) / (time.perf_counter() - start)
    sizes = collections.Counter((kind, right) for kind, _, _, right in pairs)
    print(f"| answers, and which errors | {' | '.join(graders)} |\n|---|{'---:|' * len(graders)}")
    for (kind, right), size in sizes.items():
        what = f"{kind}: right, refused" if right else f"{kind}: wrong, accepted"
        print(f"| {what} of {size} | {' | '.join(str(errors[name][kind, right]) for name in graders)} |")
    print(f"| verdicts a second | {' | '.join(f'{speed[name]:.0f}' for name in graders)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
