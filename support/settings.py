"""Settings of a program: a pydantic dataclass, filled from defaults, TOML tables and command line.

The comment beside a field is its line in `--help`. A comment on a line of its own is the heading
of the fields below it. Every mistake is a `UserError`: one line with the field, the value and the
fix. `derive_seed` turns the one seed of a run into a seed for each random draw.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pydantic

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake the user can fix: printed as one line without a traceback, exit code 2."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Suggest the most similar of the known words: `; did you mean 'X'?`, or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def one_line(problem: BaseException) -> str:
    """Shorten a library's error message to one line."""
    return textwrap.shorten(str(problem) or type(problem).__name__, 300, placeholder=" ...")


def type_and_message(problem: BaseException) -> str:
    """Describe a library's error by its type and message, in one line."""
    kind = type(problem).__name__
    return f"{kind}: {one_line(problem)}" if str(problem) else kind


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def field_docs(kind: type) -> dict[str, tuple[str, str]]:
    """Read each field's heading and comment from the source: field -> (heading, comment)."""
    group, docs = "", {}
    for base in kind.__mro__[-2::-1]:  # a subclass adds fields or redefines them
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r"    # (.*)", line):
                group = heading[1]
            elif entry := re.fullmatch(r"    (\w+): .*?  # (.*)", line):
                docs[entry[1]] = docs.get(entry[1], (group,))[0], entry[2]
    return docs


def checked(kind: type, name: str, value: Any, origin: str) -> Any:
    """Validate one value. TOML values must have the field's type; command-line words are converted.

    Raises: UserError with the field, the value and what is allowed.
    """
    field_type = field_types(kind)[name]
    strict = origin != "command line"
    try:
        return pydantic.TypeAdapter(field_type).validate_python(value, strict=strict)
    except pydantic.ValidationError as problem:
        choices = get_args(field_type) if get_origin(field_type) is Literal else ()
        hint = nearest(str(value), choices)
        reason = problem.errors()[0]["msg"].replace("Input should", "it must")
        raise UserError(f"{origin}: {name} = {value!r}: {reason}{hint}") from None


def read_table(kind: type, address: str) -> tuple[str, dict[str, Any]]:
    """Read `FILE:TABLE` and its `base` tables: -> the table's name and its checked values.

    `FILE:` means the file's only table. Raises: UserError.
    """
    file, _, table = address.rpartition(":") if ":" in address else (address, "", "")
    path = Path(shipped(file))
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--config {address}: there is no file {file!r}") from None
    except ValueError as problem:  # TOML's own errors, and bytes that are no text
        raise UserError(f"--config {file}: not valid TOML: {one_line(problem)}") from None
    known = [name for name, content in tables.items() if isinstance(content, dict)]
    if not table and len(known) != 1:
        raise UserError(f"--config {address}: name a table, FILE:TABLE, one of {', '.join(known)}")
    name = table = table or known[0]
    merged, visited, fields = {}, [], list(field_types(kind))
    while name:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"{file} has no table {name!r}, only {', '.join(known)}{hint}")
        if name in visited:
            raise UserError(f"{file}: table {name!r} is its own base")
        visited.append(name)
        base = tables[name].pop("base", "")
        for key, value in tables[name].items():
            merged.setdefault(key, (value, f"{file}:{name}"))
        name = base
    program = merged.pop("program", (kind.default_program, ""))[0]
    if program not in (kind.program, *kind.also_takes):
        raise UserError(f"table {table!r} is for {program}: launch that instead of {kind.program}")
    for key, (_, origin) in merged.items():
        if key not in fields:
            hint = nearest(key, fields)
            raise UserError(f"{origin}: there is no field {key!r}{hint}; see --help")
    return table, {
        key: checked(kind, key, value, origin) for key, (value, origin) in merged.items()
    }


def shipped(path: str) -> str:
    """Find what ships with the program, such as `tiny/middle`, from any working directory."""
    below_root = f"{ROOT}/{path}"
    only_there = path and not os.path.exists(path) and os.path.exists(below_root)
    return below_root if only_there else path


def with_paths(settings: Any) -> Any:
    """Apply `shipped` to the fields that are paths."""
    found = {name: shipped(getattr(settings, name)) for name in settings.paths}
    return dataclasses.replace(settings, **found)


def toml_table(name: str, settings: Any) -> str:
    """Write settings as a TOML table that `read_table` reads back."""
    # JSON strings, numbers and booleans are valid TOML; so is a JSON string as a table's name.
    values = dataclasses.asdict(settings).items()
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values]
    lines.insert(0, f"program = {json.dumps(settings.program)}")
    return "\n".join([f"[{json.dumps(name, ensure_ascii=False)}]", *lines, ""])


def run_settings(folder: Path, kind: type, given: dict[str, Any]) -> Any:
    """Read a finished run's settings, the `given` ones on top: -> a `kind`.

    Fields that only a baseline has are left out. Raises: UserError.
    """
    written = folder / "config.toml"
    if not (folder / "final").exists() or not written.exists():
        raise UserError(f"{folder} is no finished run: it lacks config.toml or final/")
    (found,) = tomllib.loads(written.read_text(encoding="utf-8")).values()
    known = {field.name for field in dataclasses.fields(kind)} & found.keys()
    values = {name: checked(kind, name, found[name], str(written)) for name in known}
    return with_paths(kind(**values | given))


class Parser(argparse.ArgumentParser):
    """A command line with an option for each field of a dataclass, or for some of them.

    Mistakes raise UserError.
    """

    def __init__(self, kind: type, name: str, description: str, fields: Sequence[str] = ()):
        formatter = functools.partial(
            argparse.RawDescriptionHelpFormatter, width=100, max_help_position=26
        )
        usage = "%(prog)s [--option value ...]"
        super().__init__(name, usage, description, allow_abbrev=False, formatter_class=formatter)
        self.kind, docs, groups, types = kind, field_docs(kind), {}, field_types(kind)
        for entry in dataclasses.fields(kind):
            if fields and entry.name not in fields:
                continue
            heading, text = docs[entry.name]
            groups[heading] = groups.get(heading) or self.add_argument_group(heading)
            shown = types[entry.name]
            shown = (
                " | ".join(get_args(shown)) if get_origin(shown) is Literal else type_name(shown)
            )
            alone = {"nargs": "?", "const": "true"} if shown == "bool" else {}  # `--thinking` alone
            text = f"{text} [{entry.default}]".replace("%", "%%")
            options = {"metavar": shown, "default": argparse.SUPPRESS, "help": text, **alone}
            groups[heading].add_argument(f"--{entry.name}", **options)

    def error(self, message: str):
        known = [word for action in self._actions for word in action.option_strings]
        wrong = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        hint = nearest(wrong[1], known) if wrong else ""
        raise UserError(f"command line: {message}{hint}; see --help")

    def given(self, arguments: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse the command line: -> the given fields, checked, and all other options."""
        words, types = vars(self.parse_args(arguments)), field_types(self.kind)
        fields = {
            name: checked(self.kind, name, word, "command line")
            for name, word in words.items()
            if name in types
        }
        return fields, {name: word for name, word in words.items() if name not in types}


def load_settings(
    kind: type, arguments: Sequence[str] | None, description: str, version: str, free: Sequence[str]
) -> tuple[str, Any]:
    """Build a run's settings: default < `base` < table < command line. -> (table name, settings).

    With `--resume FOLDER` they are the run's own; only the `free` fields may then change.
    `version`: of the program; a run of another version is refused. Raises: UserError.
    """
    parser = Parser(kind, kind.program, description)
    help_text = "table of a TOML file; its `base` names a table to inherit from"
    parser.add_argument("--config", metavar="FILE:TABLE", help=help_text)
    given, options = parser.given(arguments)
    folder = given.get("resume")
    if not folder:
        table, values = read_table(kind, options["config"] or f"configs.toml:{kind.table}")
        return table, with_paths(kind(**values | given))
    if options["config"]:
        raise UserError("--resume takes the settings of the run itself: leave --config out")
    if "output_dir" in given:
        raise UserError("--resume continues in the run's own folder: leave --output_dir out")
    written = Path(folder) / "config.toml"
    if not written.is_file():
        raise UserError(f"--resume: there is no run in {folder}")
    header = written.read_text(encoding="utf-8").partition("\n")[0]
    if f"version {version}," not in header:
        written_by = header.strip("# ")
        fix = "check out that commit, or start a new run"
        raise UserError(f"--resume: {folder} is of {written_by}, this is {version}: {fix}")
    table, values = read_table(kind, f"{folder}/config.toml:")
    before = dataclasses.asdict(kind(**values))
    for name, value in given.items():
        if name not in free and value != before[name]:
            raise UserError(
                f"--resume: {name} = {value!r}, but the run in {folder} has {before[name]!r}"
            )
    return table, with_paths(kind(**values | given | {"output_dir": folder}))


def derive_seed(*parts: int | str) -> int:
    """Hash (seed, purpose, step, ...) into a seed, so that there is no generator state to save."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2  # 62 bits: vLLM takes int64


def type_name(kind: Any) -> str:
    """Name a type for `--help`: `int` for `Annotated[int, ...]`, `int | str` for a union."""
    if isinstance(kind, str):  # a choice of a Literal
        return kind
    kind = kind.__origin__ if get_origin(kind) is Annotated else kind
    return " | ".join(map(type_name, get_args(kind))) if get_args(kind) else kind.__name__
