"""Datasets, prompts and tokenizers. Bad input is a `UserError` before any model loads."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from support.grader import Grader
from support.models import load_failure, read_config
from support.settings import UserError, derive_seed, nearest, one_line, type_and_message

Question = str | list[dict]  # a text, or a list of chat messages


@dataclass(frozen=True)
class Problem:
    row: int  # of the dataset
    prompt_ids: list[int]
    answer: str  # gold


# ---- Files -------------------------------------------------------------------------------------

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz")


def file_type(source: str) -> str:
    """Return the suffix of a dataset's file, without that of its compression; "" if unknown."""
    path = Path(source.partition("?")[0].lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in SUFFIXES else ""


def read_dataset(source: str) -> Sequence[dict]:
    """Load `name[[:configuration]:split]`, a local file or an https address: -> its rows.

    Raises: UserError.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the UserError reports it
    suffix = file_type(source)
    local = "://" not in source
    if suffix and local and not Path(source).is_file():
        raise UserError(f"dataset {source!r}: there is no such file")
    if suffix and local and not Path(source).stat().st_size:
        raise UserError(f"dataset {source!r} is empty")
    if not suffix and (not local or Path(source.partition(":")[0]).is_file()):
        names = ", ".join(SUFFIXES)
        raise UserError(f"dataset {source!r}: a file's name must end in {names}, or that and .gz")
    try:
        if suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=source, split="train")
        if not suffix:
            name, *rest = source.split(":")
            return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train")
        path = datasets.DownloadManager().download_and_extract(source)
        return parse_rows(Path(path).read_bytes(), suffix)
    except UserError as problem:
        raise UserError(f"dataset {source!r}, {problem}") from None
    except Exception as problem:  # datasets raises a dozen types here
        cause = problem.__cause__ or problem  # its own message says only that an error occurred
        raise UserError(
            f"dataset {source!r} cannot be read: {type_and_message(cause)}"
        ) from problem


def parse_rows(data: bytes, suffix: str) -> list[dict]:
    """Parse a JSON, CSV or TSV file. Raises: UserError with the line.

    Libraries guess types: in a column of numbers, 12345678901234567 becomes a rounded float, and
    007 becomes 7. Gold answers need the file's own text, so CSV stays text, and JSON's fractions
    are Decimal.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = 1 + data.count(b"\n", 0, problem.start)
        raise UserError(f"line {line} is not UTF-8 text: convert the file to UTF-8") from None
    if suffix in (".csv", ".tsv"):
        return parse_csv(text, "\t" if suffix == ".tsv" else ",")
    # one list, or an object per line
    whole = text.lstrip().startswith("[")
    rows: list[dict] = []
    for line, piece in enumerate([text] if whole else text.split("\n"), start=1):
        if not piece.strip():
            continue
        try:
            found = json.loads(piece, parse_float=Decimal)
        except ValueError as problem:
            raise UserError(f"line {line} is not JSON: {one_line(problem)}") from None
        rows += found if whole else [found]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {index} is {row!r}, not an object with fields")
    return rows


def parse_csv(text: str, delimiter: str) -> list[dict]:
    """Parse CSV with a header line; every value is a text. Raises: UserError with the line."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"line 1 names a column twice: {names}")
        for row in reader:
            if None in row or None in row.values():
                fix = f"must have {len(names)} fields, like the header: quote texts with commas"
                raise UserError(f"line {reader.line_num} {fix}")
            rows.append(row)
    except csv.Error as problem:
        raise UserError(f"line {reader.line_num} is not CSV: {problem}") from None
    return rows


def column(row: dict, name: str, source: str) -> Any:
    """Return the column `name`, or `row[a][b]` for the name `a.b`.

    Raises: UserError with the existing columns.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = list(value) if isinstance(value, dict) else []
            hint = nearest(part, known)
            raise UserError(f"dataset {source!r} has no field {name!r}, only {known}{hint}")
        value = value[part]
    return value


# ---- Questions and gold answers ----------------------------------------------------------------


def as_messages(question: Question) -> list[dict]:
    """Return the messages of a question, each with a text; a text is one message of the user.

    Raises: UserError if the last one is not the user's, or for anything else than text.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not isinstance(messages, list) or not messages:
        raise UserError(f"question {question!s:.200} is neither a text nor a list of messages")
    found = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        content = fields.get("content")
        if isinstance(content, list) and all(is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(fields.get("role"), str) or not isinstance(content, str):
            raise UserError(f"question {question!r:.200}: a message lacks its role or its text")
        if not content.strip():
            raise UserError(f"question {question!r:.200} is blank, or one of its messages is")
        found.append(fields | {"content": content})
    if found[-1]["role"] != "user":
        role = found[-1]["role"]
        raise UserError(f"question {question!r:.200} ends with the {role!r}, not with the 'user'")
    return found


def is_text_part(part: Any) -> bool:
    """Return whether a part of a message's content is text, not an image or the like."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part["text"], str)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, question: Question, system_prompt: str, thinking: bool
) -> list[int]:
    """Render a question with the model's chat template: -> token ids.

    `system_prompt` comes first unless the messages have one; "" removes theirs. `thinking`: passed
    to the template as `enable_thinking`. Raises: UserError if the template refuses the messages or
    drops the question.
    """
    messages = as_messages(question)
    if not system_prompt:
        messages = [message for message in messages if message["role"] != "system"]
    elif messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    except TemplateError as problem:
        raise UserError(
            f"the chat template refuses the prompt ({one_line(problem)}); "
            'if it refuses the system message, add --system_prompt ""'
        ) from None
    asked = "".join(messages[-1]["content"].split())
    if asked not in "".join(text.split()):  # templates may trim
        raise UserError(
            f"the chat template renders {text!r:.200} without the question: set chat_template"
        )
    return tokenizer(text, add_special_tokens=False).input_ids


# Golds that no boxed answer equals: a solution, several sentences, a text around the answer; and
# dates, which math-verify takes for a difference or a quotient.
_SOLUTION = re.compile(r"\n|####|\w[.?]\s+[A-Z]|\b[Aa]nswer\b")
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?|\d\d?[./]\d\d?[./]\d{4}")
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_MOST_WORDS = 5  # of a gold; the longest of DeepMath and the benchmarks has 2


def gold_text(value: Any) -> str:
    """Write a gold answer as text. Raises: UserError unless it is a number or short LaTeX.

    Numbers are written in full, since 1e-05 in LaTeX is e - 5.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) >= 2**53:
        raise UserError(f"answer {value!r} may be rounded: store such integers as text")
    is_number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    text = str(value).strip() if is_number or isinstance(value, str) else ""
    if is_number or _SCIENTIFIC.fullmatch(text):
        number = Decimal(text)
        if not number.is_finite() or abs(number.adjusted()) > 500:
            raise UserError(f"answer {text:.200} is not finite, or has more than 500 digits")
        return format(number, "f")
    if value is None or (isinstance(value, str) and not text):
        raise UserError("the answer is missing")
    if not text:
        kind = type(value).__name__
        raise UserError(f"answer {value!r:.200} is a {kind}: name a column of numbers or text")
    words = re.findall("[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    if _SOLUTION.search(text) or _DATE.fullmatch(text) or len(words) > _MOST_WORDS:
        raise UserError(
            f"answer {text!r:.200} is a solution, a sentence or a date, which no boxed answer "
            "equals: name a column with the final answer alone"
        )
    return text


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
    problems, too_long, bad = [], 0, []
    for index, row in enumerate(read_dataset(source)):
        question = column(row, question_field, source)
        answer = column(row, answer_field, source)
        try:
            answer = gold_text(answer)
            ids = prompt_ids(tokenizer, question, system_prompt, thinking)
        except UserError as problem:
            bad.append(f"row {index}: {problem}")
            continue
        if len(ids) > max_prompt_tokens:
            too_long += 1
        else:
            problems.append(Problem(index, ids, answer))
    if bad:
        more = f" ({len(bad) - 1} more rows are bad)" if len(bad) > 1 else ""
        raise UserError(f"dataset {source!r}, {bad[0]}{more}")
    if not problems and not too_long:
        raise UserError(f"dataset {source!r} has no rows")
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


def check_golds(source: str, problems: Sequence[Problem], grader: Grader) -> None:
    """Check that a response can match every gold answer. Raises: UserError."""
    if bad := grader.check_golds([problem.answer for problem in problems]):
        first = problems[bad[0]]
        raise UserError(
            f"dataset {source!r}: {len(bad)} gold answers do not equal a boxed copy of themselves, "
            f"first row {first.row}: {first.answer!r:.200}; write numbers or short LaTeX"
        )


# ---- Tokenizers --------------------------------------------------------------------------------


def load_tokenizer(model: str, chat_template: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with `chat_template` if it is not empty. Raises: UserError."""
    rows = getattr(read_config(model), "vocab_size", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as problem:  # files of any kind, read by third-party code
        reason = load_failure(problem)
        raise UserError(f"model = {model!r}: its tokenizer cannot be read: {reason}") from None
    if not tokenizer("1+1").input_ids:  # without its files, Transformers makes an empty one
        raise UserError(f"model = {model!r} has no tokenizer: copy tokenizer.json into its folder")
    template = tokenizer.chat_template = chat_template or tokenizer.chat_template
    if not template:
        raise UserError(f"model = {model!r} has no chat template: set chat_template")
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if not rows or index < rows:
            continue
        # A special token that no prompt has does no harm: Gemma 3 1B has one, for images.
        if index not in added or not added[index].special or token in template:
            raise UserError(
                f"model = {model!r}: its tokenizer has the token {token!r} with id {index}, its "
                f"embedding has {rows} rows: call resize_token_embeddings, or remove the token"
            )
    return tokenizer


def end_token_ids(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, rows: int
) -> list[int]:
    """List every token that ends a response; models often have several, spread over two files.

    `rows`: of the model's embedding. Raises: UserError if there is none, or for malformed ids.
    """
    found = config.eos_token_id
    ids = list(found) if isinstance(found, list | tuple) else [found]
    ids = [index for index in [*ids, tokenizer.eos_token_id] if index is not None]
    for index in ids:
        if type(index) is not int or not 0 <= index < rows:
            raise UserError(f"eos_token_id = {found!r}: {index!r} is not a token id below {rows}")
    if not ids:
        raise UserError("neither generation config nor tokenizer has an end-of-sequence token")
    return sorted(set(ids))
