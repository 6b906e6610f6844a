"""Settings, tables and data: what is accepted, and the one line that refuses the rest."""

import dataclasses
import importlib
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


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        oisd.main(["--help"])
    shown = capsys.readouterr().out
    for entry in dataclasses.fields(oisd.Config):
        assert f"--{entry.name} " in shown and field_docs(oisd.Config)[entry.name][1]


FILES = {
    "bad.toml": "[a]\nnum_steps = '3'\n[b]\nnum_step = 3\n[c]\nbase = 'd'\n[d]\nbase = 'c'",
    "torn.toml": "[a",
    "roles.jsonl": '{"question": [{"content": "1+1"}], "answer": "2"}',
    "null.jsonl": '{"question": "1+1", "answer": null}',
    "torn.jsonl": '{"question": "1+1", "ans',
    "empty.jsonl": "",
    "gold.jsonl": '{"prompt": "1+1", "reward_model": {"ground_truth": "\\\\boxed{"}}',
}
LINES = (ROOT / "tests" / "bad_settings.tsv").read_text().splitlines()
BAD = [line.split("\t") for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("program,words,message", BAD)
def test_bad_input_gets_one_line(program, words, message, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
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
