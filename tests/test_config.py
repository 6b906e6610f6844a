"""Settings, tables and data: what is accepted, and the one line that refuses the rest."""

import dataclasses
import importlib
import json
import math
import tomllib

import evaluate
import oisd
import pytest
from support import models
from support.settings import UserError, field_docs

from conftest import ROOT, toy_arguments

TABLES = tomllib.loads((ROOT / "configs.toml").read_text())
PROGRAMS = {"oisd.py": oisd.Config}
for file in (ROOT / "baselines").glob("[!_]*.py"):
    PROGRAMS[f"baselines/{file.name}"] = importlib.import_module(f"baselines.{file.stem}").METHOD.config


@pytest.mark.parametrize("table", TABLES)
def test_a_table_and_its_bases_load_in_its_program_only(table):
    merged = dict(TABLES[table])
    while base := merged.pop("base", ""):
        merged = TABLES[base] | merged
    program = merged.pop("program", "oisd.py")
    words = ["--config", f"configs.toml:{table}"]
    _, config = oisd.load_config(words, PROGRAMS[program])
    assert merged.items() <= vars(config).items()
    for other in PROGRAMS.keys() - {program}:
        with pytest.raises(UserError, match=f"is for {program}: launch that instead of {other}"):
            oisd.load_config(words, PROGRAMS[other])


def test_what_ships_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, config = oisd.load_config([])
    assert config.model == str(ROOT / "tiny/middle") and config.test_data == str(ROOT / "tiny/sums/test.jsonl")
    (tmp_path / "tiny" / "middle").mkdir(parents=True)  # what is here comes first
    assert oisd.load_config([])[1].model == "tiny/middle"
    (tmp_path / "a.toml").write_text("[a]")  # the defaults, too
    _, config = oisd.load_config(["--config=a.toml:"])
    assert (config.train_data, config.test_data) == (str(ROOT / "tiny/sums/train.jsonl"), "")


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        oisd.main(["--help"])
    shown = capsys.readouterr().out
    for entry in dataclasses.fields(oisd.Config):
        assert f"--{entry.name} " in shown and field_docs(oisd.Config)[entry.name][1]


ROWS = {  # question and answer
    "solution": ("1+1", "1+1\n2"),
    "hashes": ("1+1", "#### 2"),
    "sentence": ("1+1", "Add. It is 2"),
    "wordy": ("1+1", "the sum of both of them"),
    "around": ("1+1", "Answer: 2"),
    "quoted": ("1+1", '{"value": 2}'),
    "date": ("1+1", "2024-01-05"),
    "us_date": ("1+1", "12-31-1999"),
    "list": ("1+1", ["2"]),
    "true": ("1+1", True),
    "long": ("1+1", "1" * 600),
    "huge": ("1+1", 10**600),
    "unclosed": ("1+1", "\\frac{1"),
    "infinite": ("1+1", math.inf),
    "null": ("1+1", None),
    "number": (12, "2"),
    "blank": (" ", "2"),
    "roles": ([{"content": "1+1"}], "2"),
    "image": ([{"role": "user", "content": [{"type": "image"}]}], "2"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "2"),
    "model": ([{"role": "user", "content": "1+1"}, {"role": "model", "content": "2"}], "2"),
    "solved": ([{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}], "2"),
}
FILES = {f"{name}.jsonl": json.dumps(dict(zip(("question", "answer"), row))) for name, row in ROWS.items()}
FILES |= {
    "bad.toml": "[a]\nnum_steps = '3'\n[b]\nnum_step = 3\n[c]\nbase = 'd'\n[d]\nbase = 'c'",
    "torn.toml": "[a",
    "torn.jsonl": '{"question": "1+1", "ans',
    "empty.jsonl": "",
    "latin.jsonl": b'{"question": "1", "answer": "1"}\n{"question": "\xe9", "answer": "1"}',
    "second.jsonl": '{"question": "1", "answer": "1"}\n5',
    "wide.csv": "question,answer\n1+1,(1,2)\n",
    "notes.txt": "1+1",
    "twice.csv": "question,answer,answer\n1,1,2\n",
    "rows.csv": "question,answer\n",
    "two.csv": "question,answer\n1,1\n2,2024-01-05\n3,\n",
    "gold.jsonl": '{"prompt": "1+1", "reward_model": {"ground_truth": "\\\\boxed{"}}',
}
LINES = (ROOT / "tests" / "bad_settings.tsv").read_text().splitlines()
BAD = [line.split("\t") for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("program,words,message", BAD)
def test_bad_input_gets_one_line(program, words, message, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if "need " in message:
        monkeypatch.setattr(models, "find_spec", lambda name: None)
    if program == "oisd":
        status = oisd.main([*toy_arguments(toy, tmp_path / "run"), *words.split()])
    else:
        fields = ["--question_field=prompt", "--answer_field=reward_model.ground_truth"]
        status = evaluate.main([f"--model={toy}", f"--output_dir={tmp_path / 'run'}", *fields, *words.split()])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()
