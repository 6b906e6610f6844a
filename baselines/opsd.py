"""OPSD, on-policy self-distillation (arXiv 2601.18734): a model that has read the solution teaches itself without it.

    python baselines/opsd.py --config configs.toml:tiny_opsd
    python tools/solutions.py deepmath_solutions.jsonl
    accelerate launch baselines/opsd.py --config configs.toml:qwen3_4b_opsd

The student samples responses y to the question x. The same weights, with a reference solution s in the prompt, read
those very tokens, and the student's next-token distributions are drawn to theirs, whatever the reward:

    L = 1/N sum_t JS( pi(. | x, y_<t) || sg pi(. | x, s, y_<t) )                        over the whole vocabulary

Sampler, grader, optimizer, sharding and checkpoints are those of `oisd.py`. What differs plugs in where `oisd.Method`
says: student and teacher are the final layer on two prompts. The teacher is the model as it is, where OPSD's paper
keeps the initial one; `js_clip = 0.05` is the clip of OPSD's published code. In the log `think_js` is this JS.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inputs
import oisd
import plumbing
from inputs import Problem
from oisd import AtLeastOne, Config, NotNegative, PackedBatch, Rollout, TappedModel, Word, pack
from rows import log_ratios
from settings import UserError

TEMPLATE = """{question}

Here is a reference solution:

{solution}

Make sure that you understand it. Then solve the problem yourself, in your own words."""


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class OpsdConfig(Config):
    program: ClassVar[str] = "baselines/opsd.py"
    table: ClassVar[str] = "tiny_opsd"
    prompt_limit: ClassVar[str] = "max_teacher_tokens"
    formerly: ClassVar[dict[str, Any]] = {}
    advantage: Literal["none"] = "none"  # every token counts alike, whatever the reward
    js_clip: NotNegative = 0.05  # most that each term of the vocabulary adds to JS, as in OPSD's code; 0: no limit
    # OPSD
    solution_field: Word = "solution"  # column with a reference solution; a.b for nested ones
    solution_template: Word = TEMPLATE  # the teacher's last message, with {question} and {solution}
    max_teacher_tokens: AtLeastOne = 8192  # problems whose teacher has a longer prompt are dropped and counted

    def __post_init__(self) -> None:
        if not self.think_weight or self.attention_weight:
            weights = f"think_weight = {self.think_weight}, attention_weight = {self.attention_weight}"
            raise UserError(f"{weights}: OPSD's loss is weighted by think_weight, and the other has to be 0")
        foreign = (
            "policy_layer importance_cap lens_grad lens_norm internal_mean policy_weight advantage_sign "
            "gradient_norms_every"
        )
        for name in foreign.split():
            if getattr(self, name) != (usual := getattr(Config, name)):
                raise UserError(f"{name} = {getattr(self, name)!r}: OPSD has no such thing, leave it {usual!r}")
        if "{question}" not in self.solution_template or "{solution}" not in self.solution_template:
            raise UserError(f"solution_template = {self.solution_template!r} lacks {{question}} or {{solution}}")
        super().__post_init__()


@dataclass(frozen=True)
class TaughtProblem(Problem):
    teacher_ids: list[int]  # the prompt with the solution


def load_problems(source: str, tokenizer, config: OpsdConfig) -> tuple[list[Problem], int]:
    """As `inputs.load_problems`, with the teacher's prompts. Raises: UserError for a row without a solution."""
    problems, too_long = inputs.load_problems(source, tokenizer, config)
    dataset, taught = inputs.read_dataset(source), []
    for problem in problems:
        row = dataset[problem.row]
        try:
            solution = inputs.column(row, config.solution_field, source)
        except UserError as missing:
            raise UserError(f"OPSD's teacher reads a reference solution: {missing}; set solution_field") from None
        if not isinstance(solution, str) or not solution.strip():
            raise UserError(f"dataset {source!r}, row {problem.row}: the solution is {solution!r}")
        question = inputs.column(row, config.question_field, source)
        ids = inputs.prompt_ids(tokenizer, with_solution(question, solution, config.solution_template), config)
        if len(ids) > config.max_teacher_tokens:
            too_long += 1
        else:
            taught.append(TaughtProblem(problem.row, problem.prompt_ids, problem.answer, ids))
    if not taught:
        raise UserError(f"dataset {source!r}: no teacher's prompt has at most {config.max_teacher_tokens} tokens")
    return taught, too_long


def with_solution(question: str | list[dict], solution: str, template: str) -> list[dict]:
    """The question as messages, the solution in the last of them."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    parts = {"{question}": messages[-1]["content"], "{solution}": solution}
    content = re.sub("{question}|{solution}", lambda found: parts[found[0]], template)  # at once: they may hold braces
    return [*messages[:-1], messages[-1] | {"content": content}]


class SelfTeacher(TappedModel):
    def losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        """`token_loss` is think_weight JS to the model that sees the solution, summed over the response tokens."""
        with torch.no_grad():
            taught = [dataclasses.replace(r, prompt_ids=r.notes["teacher_ids"]) for r in batch.rollouts]
            seen = pack(taught, self.config, batch.input_ids.device)
            teacher_hidden = self.hidden_states(seen)[seen.predicted - 1]
        hidden = self.hidden_states(batch)[batch.predicted - 1]  # (N, D)
        self.clear_taps()
        size = self.config.lens_chunk_tokens
        chunks = zip(hidden.split(size), teacher_hidden.split(size))
        rows = [checkpoint(self.taught_rows, *chunk, use_reentrant=False) for chunk in chunks]  # no logits are kept
        js, entropy = (torch.cat(column) for column in zip(*rows))
        loss = js.sum()  # advantages are 1, so L_think is plain JS
        sums = {"token_loss": self.config.think_weight * loss, "step_loss": loss.new_zeros(())}
        return sums | {"think_loss": loss.detach(), "think_js": loss.detach(), "entropy": entropy.sum()}

    def taught_rows(self, hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """JS to the teacher, each term at most `js_clip`, and the student's entropy: (n, D) twice -> (n,) twice."""
        tau, clip = self.config.distill_temperature, self.config.js_clip
        logits = F.linear(hidden, self.head)  # (n, V)
        student = oisd._log_softmax(logits, tau)
        teacher = oisd._log_softmax(F.linear(teacher_hidden, self.head).detach(), tau)
        ratio, teacher_ratio = log_ratios(student, teacher)
        terms = (student.exp() * ratio + teacher.exp() * teacher_ratio) / 2
        policy = oisd._log_softmax(logits.detach(), self.config.temperature)
        return (terms.clamp(max=clip) if clip else terms).sum(-1), -(policy.exp() * policy).sum(-1)


def set_advantages(run: oisd.Run, rollouts: Sequence[Rollout]) -> None:
    """1 for every rollout; and each gets its teacher's prompt."""
    prompts = {problem.row: problem.teacher_ids for problem in run.problems}
    for rollout in rollouts:
        teacher_ids = prompts[rollout.row]
        more = max(0, len(teacher_ids) - len(rollout.prompt_ids))  # a micro-batch holds the teacher's rows as well
        rollout.advantage, rollout.notes = 1.0, {"teacher_ids": teacher_ids, "more_tokens": more}


OPSD = oisd.Method(OpsdConfig, SelfTeacher, set_advantages, load_problems)

if __name__ == "__main__":
    plumbing.program(functools.partial(oisd.main, method=OPSD))
