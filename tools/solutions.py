"""Join the paper's problems with reference solutions by question: the training data of `baselines/opsd.py`.

    python tools/solutions.py deepmath_solutions.jsonl

DeepMath-103K has three solutions to each problem, by DeepSeek-R1. The first complete one is used, without its thoughts.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.problems import column, read_dataset
from support.run_folder import write_atomically
from support.settings import UserError

FIELDS = "r1_solution_1", "r1_solution_2", "r1_solution_3"


def normal(question: str) -> str:
    return " ".join(question.split())


def solution_of(row: dict) -> str:
    """Return what follows `</think>` in the first complete solution, or "" if there is none."""
    for text in (row.get(field) or "" for field in FIELDS):
        thoughts, ended, answer = text.rpartition("</think>")
        if answer.strip() and (ended or "<think>" not in thoughts + answer):
            return answer.strip()
    return ""


def join(problems: str, solutions: str) -> tuple[list[dict], int]:
    """Find solutions: -> the problems that have one, in their order, and the number of all. Raises: UserError."""
    rows = read_dataset(problems)
    wanted = {normal(column(row, "question", problems)) for row in rows}
    dataset = read_dataset(solutions)
    column(dataset[0], FIELDS[0], solutions)  # another kind of dataset is an error, not 0 of 5,000
    known = {}
    for row in dataset:
        question = normal(column(row, "question", solutions))
        if question in wanted and not known.get(question):
            known[question] = solution_of(row)
    found = []
    for row in rows:
        if solution := known.get(normal(row["question"])):
            entry = {field: column(row, field, problems) for field in ("prompt", "reward_model")}
            found.append(entry | {"solution": solution})
    if not found:
        raise UserError(f"{solutions} solves none of the {len(rows)} problems of {problems}")
    return found, len(rows)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--problems", default="https://github.com/Trae1ounG/BuPO/raw/main/data/deepmath-5k.parquet")
    parser.add_argument("--solutions", default="zwhe99/DeepMath-103K")
    options = parser.parse_args(words)
    try:
        found, count = join(options.problems, options.solutions)
    except UserError as problem:
        print(f"solutions: error: {problem}", file=sys.stderr)
        return 2
    write_atomically(options.output, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in found))
    print(f"{len(found)} of {count} problems have a solution -> {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
