"""Datasets, prompts and tokenizers. Bad input is a `UserError` before any model loads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from support.grader import Grader
from support.settings import UserError, derive_seed, nearest, one_line

Question = str | list[dict]  # a text, or a list of chat messages


@dataclass(frozen=True)
class Problem:
    row: int  # of the dataset
    prompt_ids: list[int]
    answer: str  # gold


def read_dataset(source: str):
    """Load `name[[:configuration]:split]`, a local file or an https address: -> datasets.Dataset.

    Raises: UserError.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the UserError reports it
    loaders = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
    suffix = Path(source.split("?")[0]).suffix
    local = suffix in loaders and "://" not in source
    if local and not Path(source).is_file():
        raise UserError(f"dataset {source!r}: there is no such file")
    if local and not Path(source).stat().st_size:
        raise UserError(f"dataset {source!r} is empty")
    try:
        if suffix in loaders:
            return datasets.load_dataset(loaders[suffix], data_files=source, split="train")
        name, *rest = source.split(":")
        return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train")
    except Exception as problem:  # datasets raises a dozen types here
        cause = problem.__cause__ or problem  # its own message says only that an error occurred
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        raise UserError(f"dataset {source!r} cannot be read: {reason}") from problem


def column(row: dict, name: str, source: str) -> Any:
    """Return `row[a][b]` for the field name `a.b`. Raises: UserError with the existing columns."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = list(value) if isinstance(value, dict) else []
            hint = nearest(part, known)
            raise UserError(f"dataset {source!r} has no field {name!r}, only {known}{hint}")
        value = value[part]
    return value


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, question: Question, system_prompt: str, thinking: bool
) -> list[int]:
    """Render a question with the model's chat template: -> token ids.

    `system_prompt` comes first unless the messages have one; "" removes theirs. `thinking`: passed
    to the template as `enable_thinking`. Raises: UserError if the template refuses the messages.
    """
    messages = as_messages(question)
    complete = [m for m in messages if isinstance(m, dict) and m.get("content")]
    complete = [m for m in complete if isinstance(m.get("role"), str)]
    if not messages or len(complete) < len(messages):
        raise UserError(f"question {question!r} is neither a text nor a list of messages")
    if not system_prompt:
        messages = [message for message in messages if message["role"] != "system"]
    elif messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=thinking
        )
    except TemplateError as problem:
        raise UserError(
            f"the chat template refuses the prompt ({one_line(problem)}); "
            'if it refuses the system message, add --system_prompt ""'
        ) from None
    if not ids:
        raise UserError("the chat template renders nothing; set chat_template")
    return ids


def as_messages(question: Question) -> list[dict]:
    """Return the messages of a question; a text is one message of the user."""
    return [{"role": "user", "content": question}] if isinstance(question, str) else question


def load_problems(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    question_field: str,
    answer_field: str,
    system_prompt: str,
    thinking: bool,
    max_prompt_tokens: int,
) -> tuple[list[Problem], int]:
    """Load the problems whose prompts fit: -> them, and the number of those that are too long.

    Raises: UserError for bad fields or rows, or if no problem is left.
    """
    dataset = read_dataset(source)
    problems, too_long = [], 0
    for index, row in enumerate(dataset):
        question = column(row, question_field, source)
        answer = column(row, answer_field, source)
        where = f"dataset {source!r}, row {index}"
        if not question or answer is None or not str(answer).strip():
            raise UserError(f"{where}: question {question!r} or answer {answer!r} is missing")
        try:
            ids = prompt_ids(tokenizer, question, system_prompt, thinking)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from None
        if len(ids) > max_prompt_tokens:
            too_long += 1
        else:
            problems.append(Problem(index, ids, str(answer).strip()))
    if not problems:
        limit = f"max_prompt_tokens = {max_prompt_tokens}"
        raise UserError(f"dataset {source!r}: none of its prompts has at most {limit} tokens")
    return problems, too_long


def step_problems(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """Choose the `size` problems of a step, from 0. Each epoch is a permutation, by `seed`."""
    places = range(step * size, (step + 1) * size)
    orders = {}
    for epoch in {place // len(problems) for place in places}:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        orders[epoch] = torch.randperm(len(problems), generator=generator).tolist()
    return [problems[orders[place // len(problems)][place % len(problems)]] for place in places]


def fingerprint(problems: Sequence[Problem]) -> str:
    """Describe the data for a later resumption: number of problems and a hash of their content."""
    digest = hashlib.sha256(repr(problems).encode()).hexdigest()
    return f"{len(problems)} problems, SHA-256 {digest[:16]}"


def check_golds(problems: Sequence[Problem], grader: Grader) -> None:
    """Check that every gold answer equals itself. Raises: UserError; no response could match it."""
    if bad := grader.check_golds([problem.answer for problem in problems]):
        first = problems[bad[0]]
        raise UserError(
            f"{len(bad)} gold answers cannot be graded, first {first.answer!r} in row {first.row}"
        )


def load_tokenizer(model: str, chat_template: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with `chat_template` if it is not empty. Raises: UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as problem:
        raise UserError(f"model = {model!r}: no tokenizer: {one_line(problem)}") from None
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"model = {model!r} has no chat template: set chat_template")
    return tokenizer


def end_token_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List every token that ends a response; models often have several, spread over two files.

    Raises: UserError if there is none.
    """
    ids = config.eos_token_id
    ids = {ids} if isinstance(ids, int) else set(ids or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError("neither generation config nor tokenizer has an end-of-sequence token")
    return sorted(ids)
