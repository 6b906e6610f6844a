"""OPSD (arXiv 2601.18734): a model that has read the solution teaches itself without it.

    python baselines/opsd.py --config configs.toml:tiny_opsd
    python tools/solutions.py deepmath_solutions.jsonl
    accelerate launch baselines/opsd.py --config configs.toml:qwen3_4b_opsd

The student samples responses y to the question x. The same weights, with a reference solution s in
the prompt, read the same tokens. The student's next-token distributions are pulled toward theirs,
whatever the reward, over the complete vocabulary:

    L = 1/N sum_t JS( pi(. | x, y_<t) || sg pi(. | x, s, y_<t) )

Student and teacher are the final layer on two prompts. The teacher is the current model; OPSD's
paper keeps the initial one. `js_clip = 0.05` is the clip of OPSD's published code. In the log,
`think_js` is this JS.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from oisd import Config, LossSums, PackedBatch, Rollout, TappedModel
from support import problems, processes
from support.kernels import log_ratios
from support.problems import Problem
from support.settings import UserError
from support.types import AtLeastOne, NotNegative, Text

TEMPLATE = """{question}

Here is a reference solution:

{solution}

Make sure that you understand it. Then solve the problem yourself, in your own words."""


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class OpsdConfig(Config):
    program: ClassVar[str] = "baselines/opsd.py"
    table: ClassVar[str] = "tiny_opsd"
    prompt_limit: ClassVar[str] = "max_teacher_tokens"
    # OPSD
    js_clip: NotNegative = 0.05  # cap on each vocabulary entry's share of JS; 0 disables
    solution_field: Text = "solution"  # column with a reference solution; a.b for nested ones
    solution_template: Text = TEMPLATE  # the teacher's last message, with {question} and {solution}
    max_teacher_tokens: AtLeastOne = 8192  # longer teacher prompts are dropped and counted

    def __post_init__(self) -> None:
        if not self.think_weight:
            raise UserError("think_weight = 0: it is the weight of OPSD's loss")
        if self.attention_weight:
            raise UserError(f"attention_weight = {self.attention_weight}: OPSD has none, set it 0")
        for name in "importance_cap lens_grad lens_norm internal_mean policy_weight".split():
            value, default = getattr(self, name), getattr(Config, name)
            if value != default:
                raise UserError(f"{name} = {value!r}: OPSD does not use it, leave it {default!r}")
        template = self.solution_template
        if "{question}" not in template or "{solution}" not in template:
            raise UserError(f"solution_template = {template!r} lacks {{question}} or {{solution}}")
        super().__post_init__()


@dataclass(frozen=True)
class TaughtProblem(Problem):
    teacher_ids: list[int]  # the prompt with the solution


def load_problems(source: str, tokenizer, config: OpsdConfig) -> tuple[list[Problem], int]:
    """Load problems with their teachers' prompts. Raises: UserError if a solution is missing."""
    fitting, too_long = oisd.load_problems(source, tokenizer, config)
    dataset = problems.read_dataset(source)
    taught = []
    for problem in fitting:
        row = dataset[problem.row]
        try:
            solution = problems.column(row, config.solution_field)
        except UserError as missing:
            text = f"{missing}: OPSD's teacher reads a reference solution"
            raise UserError(f"dataset {source!r}, row {problem.row}: {text}") from None
        if not isinstance(solution, str) or not solution.strip():
            raise UserError(f"dataset {source!r}, row {problem.row}: the solution is {solution!r}")
        question = problems.column(row, config.question_field)
        messages = with_solution(question, solution, config.solution_template)
        ids = problems.prompt_ids(tokenizer, messages, config.system_prompt, config.thinking)
        if len(ids) > config.max_teacher_tokens:
            too_long += 1
        else:
            taught.append(TaughtProblem(problem.row, problem.prompt_ids, problem.answer, ids))
    if not taught:
        limit = config.max_teacher_tokens
        raise UserError(f"dataset {source!r}: no teacher's prompt has at most {limit} tokens")
    return taught, too_long


def with_solution(question: problems.Question, solution: str, template: str) -> list[dict]:
    """Put the solution into the last message of the question."""
    messages = problems.as_messages(question)
    parts = {"{question}": messages[-1]["content"], "{solution}": solution}
    # both at once, because either may contain braces
    content = re.sub("{question}|{solution}", lambda found: parts[found[0]], template)
    return [*messages[:-1], messages[-1] | {"content": content}]


class SelfTeacher(TappedModel):
    def losses(self, batch: PackedBatch) -> LossSums:
        """Compute think_weight JS to the model that sees the solution, over the response tokens."""
        with torch.no_grad():
            taught = [
                dataclasses.replace(rollout, prompt_ids=rollout.notes["teacher_ids"])
                for rollout in batch.rollouts
            ]
            teacher_batch = oisd.pack(taught, self.config, batch.input_ids.device)
            teacher_hidden = self.hidden_states(teacher_batch)[teacher_batch.predicted - 1]
        hidden = self.hidden_states(batch)[batch.predicted - 1]  # (N, D)
        self.clear_taps()
        size = self.config.lens_chunk_tokens
        chunks = zip(hidden.split(size), teacher_hidden.split(size))
        # recomputed in the backward pass, so that no logits are kept
        rows = [checkpoint(self.taught_rows, *chunk, use_reentrant=False) for chunk in chunks]
        js, entropy = (torch.cat(column) for column in zip(*rows))
        loss = js.sum()
        return LossSums(
            token_loss=self.config.think_weight * loss,
            step_loss=loss.new_zeros(()),
            token_parts={"think_loss": loss.detach()},
            step_parts={},
            metrics={
                "think_js": oisd.sum_and_count(js.detach()),
                "entropy": oisd.sum_and_count(entropy),
            },
        )

    def taught_rows(self, hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the clipped JS and the student's entropy: (n, D) twice -> (n,) twice."""
        tau, clip = self.config.distill_temperature, self.config.js_clip
        logits = F.linear(hidden, self.head)  # (n, V)
        log_p = oisd.log_softmax(logits, tau)
        log_q = oisd.log_softmax(F.linear(teacher_hidden, self.head).detach(), tau)
        ratio, teacher_ratio = log_ratios(log_p, log_q)
        terms = (log_p.exp() * ratio + log_q.exp() * teacher_ratio) / 2
        if clip:
            terms = terms.clamp(max=clip)
        policy = oisd.log_softmax(logits.detach(), self.config.temperature)
        return terms.sum(-1), -(policy.exp() * policy).sum(-1)


def before_updates(run: oisd.Run, rollouts: Sequence[Rollout]) -> None:
    """Give each rollout its teacher's prompt. All advantages are 1: the reward plays no part."""
    prompts = {problem.row: problem.teacher_ids for problem in run.problems}
    for rollout in rollouts:
        teacher_ids = prompts[rollout.row]
        rollout.advantage = 1.0
        rollout.notes = {"teacher_ids": teacher_ids}
        # a micro-batch needs room for the teacher's rows as well
        rollout.extra_tokens = max(0, len(teacher_ids) - len(rollout.prompt_ids))


METHOD = oisd.Method(OpsdConfig, SelfTeacher, before_updates, load_problems)

if __name__ == "__main__":
    processes.program(functools.partial(oisd.main, method=METHOD))
