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


def solution_of(row: dict) -> str:
    """Return what follows `</think>` in the first complete solution, or "" if there is none."""
    for name in ("r1_solution_1", "r1_solution_2", "r1_solution_3"):
        text = column(row, name) or ""
        answer = text.rpartition("</think>")[2].strip()
        if answer and "<think>" not in answer:
            return answer
    return ""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--problems", default="https://github.com/Trae1ounG/BuPO/raw/main/data/deepmath-5k.parquet")
    parser.add_argument("--solutions", default="zwhe99/DeepMath-103K")
    options = parser.parse_args(words)
    lines, known = [], {}
    try:
        problems = read_dataset(options.problems)
        for row in read_dataset(options.solutions):
            question = " ".join(column(row, "question").split())  # white space does not count
            known[question] = known.get(question) or solution_of(row)
        for row in problems:
            question = " ".join(column(row, "question").split())
            if solution := known.get(question):
                lines.append(json.dumps(row | {"solution": solution}, ensure_ascii=False, default=str) + "\n")
        if not lines:
            raise UserError(f"{options.solutions} solves none of the {len(problems)} problems of {options.problems}")
    except UserError as problem:
        print(f"solutions: error: {problem}", file=sys.stderr)
        return 2
    write_atomically(options.output, "".join(lines))
    print(f"{len(lines)} of {len(problems)} problems have a solution -> {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
