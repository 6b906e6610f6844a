"""Datasets, prompts and tokenizers. Bad input is a `UserError` before any model loads."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from support.grader import Grader
from support.models import load_failure, read_config
from support.settings import UserError, derive_seed, nearest, type_and_message

Question = str | list[dict]  # a text, or a list of chat messages


@dataclass(frozen=True)
class Problem:
    row: int  # of the dataset
    prompt_ids: list[int]
    answer: str  # gold


# ---- Files -------------------------------------------------------------------------------------

TEXT = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (".parquet", *TEXT)
COMPRESSED = (".gz", ".bz2", ".xz")
_BLANK = re.compile(r"\s*")


def file_type(source: str) -> str:
    """Return the suffix of a dataset's file, without that of its compression; "" if unknown."""
    path = Path(source.partition("?")[0].lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in SUFFIXES else ""


def read_dataset(source: str) -> Sequence[dict]:
    """Load `name[[:configuration]:split]`, a local file or an https address: -> its rows.

    Raises: UserError.
    """
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
        if local and Path(source).suffix.lower() in TEXT:
            return parse_rows(Path(source).read_bytes(), suffix)
        import datasets  # here, because it takes a second

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the UserError reports it
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
    rows = parse_json(text)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {index} is {row!r}, not an object with fields")
    return rows


def parse_json(text: str) -> list:
    """Parse one list, or objects one after the other, by line or not. Raises: UserError."""
    decoder = json.JSONDecoder(parse_float=Decimal)
    rows, place = [], 0
    while (place := _BLANK.match(text, place).end()) < len(text):
        try:
            found, place = decoder.raw_decode(text, place)
        except ValueError as problem:
            line = getattr(problem, "lineno", 1 + text.count("\n", 0, place))
            reason = getattr(problem, "msg", problem)
            raise UserError(f"line {line} cannot be read as JSON: {reason}") from None
        rows += found if isinstance(found, list) else [found]
    return rows


def parse_csv(text: str, delimiter: str) -> list[dict]:
    """Parse CSV with a header line; every value is a text. Raises: UserError with the line."""
    csv.field_size_limit(sys.maxsize)  # by default 128 KiB, less than some solutions have
    file = io.StringIO(text, newline="")
    reader = csv.DictReader(file, delimiter=delimiter, strict=True, restval="")
    rows = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"line 1 names a column twice: {names}")
        for row in reader:
            if None in row:
                fix = f"more than the {len(names)} fields of the header: quote texts with commas"
                raise UserError(f"line {reader.line_num} has {fix}")
            rows.append(row)
    except csv.Error as problem:
        raise UserError(f"line {reader.reader.line_num} is not CSV: {problem}") from None
    return rows


def column(row: dict, name: str) -> Any:
    """Return the column `name`, or `row[a][b]` for the name `a.b`.

    Raises: UserError with the existing columns.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict):
            raise UserError(f"no field {name!r}, since {value!r:.50} has no parts")
        if part not in value:
            raise UserError(f"no field {name!r}, only {list(value)}{nearest(part, list(value))}")
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
        if content.strip():
            found.append(fields | {"content": content})
        elif fields["role"] != "system":
            raise UserError(f"question {question!r:.200} is blank, or one of its messages is")
    if not found or found[-1]["role"] != "user":
        raise UserError(f"question {question!r:.200} does not end with a message of the 'user'")
    return found


def is_text_part(part: Any) -> bool:
    """Return whether a part of a message's content is text, not an image or the like."""
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


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
    except Exception as problem:  # templates are programs
        reason = f"the chat template refuses the prompt: {type_and_message(problem)}"
        hint = 'if it takes no system message, add --system_prompt ""'
        raise UserError(f"{reason}; {hint}" if system_prompt else reason) from None
    asked = "".join(messages[-1]["content"].split())
    if asked not in "".join(text.split()):  # templates may trim
        raise UserError(
            f"the chat template renders {text!r:.200} without the question: set chat_template"
        )
    return tokenizer(text, add_special_tokens=False).input_ids


_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+|nan", re.IGNORECASE)
# Golds that no boxed answer equals: several lines or sentences, six words in a row, a text around
# the answer, a list or an object.
_SOLUTION = re.compile(
    r"""\n|####|\w[.?]\s+[A-Z]|([A-Za-z]{2,}\s+){5}[A-Za-z]{2}|\b[Aa]nswer\b|^[\[{]\s*["']"""
)
# math-verify takes a date for a difference or a quotient.
_DATE = re.compile(r"\d{4}[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./]\d{4}")


def gold_text(value: Any) -> str:
    """Write a gold answer as text. Raises: UserError unless it is a number or short LaTeX."""
    if value is None or value == "":
        raise UserError("the answer is missing")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        kind = type(value).__name__
        raise UserError(f"answer {value!r:.200} is a {kind}: name a column of numbers or text")
    if isinstance(value, float) and value.is_integer() and abs(value) >= 2**53:
        raise UserError(f"answer {value!r} may be rounded: store such integers as text")
    text = str(value).strip()
    if not isinstance(value, str) or _SCIENTIFIC.fullmatch(text):
        return number_text(text)
    if "\\begin" in text:
        text = " ".join(text.split())  # a matrix may have several lines
    if not text or _SOLUTION.search(text) or _DATE.fullmatch(text):
        raise UserError(
            f"answer {text!r:.200} is blank, a solution, a sentence or a date, which no boxed "
            "answer equals: name a column with the final answer alone"
        )
    return text


def number_text(text: str) -> str:
    """Write a number in full, since 1e-05 in LaTeX is e - 5. Raises: UserError."""
    number = Decimal(text)
    if not number.is_finite() or abs(number.adjusted()) > 500:
        raise UserError(f"answer {text:.200} is not finite, or has more than 500 digits")
    return format(number, "f")


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
        try:
            answer = gold_text(column(row, answer_field))
            question = column(row, question_field)
            ids = prompt_ids(tokenizer, question, system_prompt, thinking)
        except UserError as problem:
            bad.append(f"row {index}: {problem}")
            continue
        if len(ids) > max_prompt_tokens:
            too_long += 1
        else:
            problems.append(Problem(index, ids, answer))
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
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


def check_problems(source: str, problems: Sequence[Problem], rows: int, grader: Grader) -> None:
    """Check prompts against the `rows` of the embedding, golds against the grader.

    Raises: UserError if a token has no row, or if no response could match a gold answer.
    """
    for problem in problems:
        if max(problem.prompt_ids, default=0) >= rows:
            text = f"has token id {max(problem.prompt_ids)}, the embedding only {rows} rows"
            raise UserError(f"dataset {source!r}, row {problem.row}: its prompt {text}")
    if bad := grader.check_golds([problem.answer for problem in problems]):
        first = problems[bad[0]]
        raise UserError(
            f"dataset {source!r}: {len(bad)} gold answers do not equal a boxed copy of themselves, "
            f"first row {first.row}: {first.answer!r:.200}; write numbers or short LaTeX"
        )


# ---- Tokenizers --------------------------------------------------------------------------------


def load_tokenizer(model: str, chat_template: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with `chat_template` if it is not empty. Raises: UserError."""
    rows = read_config(model).vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as problem:  # files of any kind, read by third-party code
        reason = load_failure(problem)
        raise UserError(f"model = {model!r}: its tokenizer cannot be read: {reason}") from None
    if not tokenizer("1+1").input_ids:  # without its files, Transformers makes an empty one
        raise UserError(f"model = {model!r} has no tokenizer: copy tokenizer.json into its folder")
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(f"model = {model!r} has no chat template: set chat_template")
    # A special token that no prompt has does no harm: Gemma 3 1B has one, for images.
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows]
    if set(beyond) - special:
        raise UserError(
            f"model = {model!r}: its tokenizer has {len(beyond)} tokens more than the {rows} rows "
            "of its embedding: call resize_token_embeddings, or use the model's own tokenizer"
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
            raise UserError(
                f"eos_token_id {index!r} is not an id below {rows}, the embedding's rows"
            )
    if not ids:
        raise UserError("neither generation config nor tokenizer has an end-of-sequence token")
    return sorted(set(ids))
