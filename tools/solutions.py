"""Reference solutions for the paper's problems, joined by question: the training data of `baselines/opsd.py`.

    python tools/solutions.py deepmath_solutions.jsonl

The paper's 5,000 problems have no solutions; their questions stand in DeepMath-103K, with three solutions each by
DeepSeek-R1. Of the first that has an end, what follows its `</think>` is taken. Questions are compared without regard
to white space. Each line: `prompt` (messages), `reward_model.ground_truth`, `solution`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inputs
import plumbing
from settings import UserError

PROBLEMS = "https://github.com/Trae1ounG/BuPO/raw/main/data/deepmath-5k.parquet"
FIELDS = "r1_solution_1", "r1_solution_2", "r1_solution_3"


def normal(question: str) -> str:
    return " ".join(question.split())


def solution_of(row: dict) -> str:
    """What the reader is to see: the first solution that was finished, without its thoughts; empty if there is none."""
    for text in (row.get(field) or "" for field in FIELDS):
        thoughts, ended, answer = text.rpartition("</think>")
        if answer.strip() and (ended or "<think>" not in thoughts + answer):
            return answer.strip()
    return ""


def join(problems: str, solutions: str) -> tuple[list[dict], int]:
    """-> the problems whose solution was found, in their order, and how many there are in all. Raises: UserError."""
    rows, known = inputs.read_dataset(problems), {}
    found, wanted = [], {normal(inputs.column(row, "question", problems)) for row in rows}
    dataset = inputs.read_dataset(solutions)
    inputs.column(dataset[0], FIELDS[0], solutions)  # a dataset of another kind is an error, not 0 of 5,000
    for row in dataset:
        question = normal(inputs.column(row, "question", solutions))
        if question in wanted and question not in known and (solution := solution_of(row)):
            known[question] = solution
    for row in rows:
        if solution := known.get(normal(row["question"])):
            answer = inputs.column(row, "reward_model.ground_truth", problems)
            entry = {"prompt": inputs.column(row, "prompt", problems), "reward_model": {"ground_truth": answer}}
            found.append(entry | {"solution": solution})
    return found, len(rows)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--problems", default=PROBLEMS)
    parser.add_argument("--solutions", default="zwhe99/DeepMath-103K")
    options = parser.parse_args(words)
    try:
        found, count = join(options.problems, options.solutions)
        if not found:
            raise UserError(f"{options.solutions} solves none of the {count} problems of {options.problems}")
    except UserError as problem:
        print(f"solutions: error: {problem}", file=sys.stderr)
        return 2
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in found)
    plumbing.write_atomically(options.output, lines)
    print(f"{len(found)} of {count} problems have a solution -> {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
