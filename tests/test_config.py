"""Settings, tables and data: what is accepted, and the one line that refuses the rest."""

import dataclasses
import importlib
import tomllib

import evaluate
import oisd
import pytest
from support import models, problems
from support.grader import Grader
from support.settings import UserError, field_docs, toml_table

from conftest import PAPER_DATA, ROOT, needs_paper_data, toy_arguments

TABLES = tomllib.loads((ROOT / "configs.toml").read_text())
PROGRAMS = {"oisd.py": oisd.Config}
for file in (ROOT / "baselines").glob("[!_]*.py"):
    PROGRAMS[f"baselines/{file.name}"] = importlib.import_module(f"baselines.{file.stem}").METHOD.config


def load(*words, kind=oisd.Config):
    return oisd.load_config(["--config", *words], kind)[1]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_and_its_bases_load_in_its_program_only(table):
    merged = dict(TABLES[table])
    while base := merged.pop("base", ""):
        merged = TABLES[base] | merged
    program = merged.pop("program", "oisd.py")
    assert merged.items() <= vars(load(f"configs.toml:{table}", kind=PROGRAMS[program])).items()
    for other in PROGRAMS.keys() - {program}:
        with pytest.raises(UserError, match=f"is for {program}: launch that instead of {other}"):
            load(f"configs.toml:{table}", kind=PROGRAMS[other])


def test_the_command_line_overrides_and_help_lists_every_field(capsys):
    config = load("configs.toml:qwen3_4b", "--think_weight", "0", "--learning_rate=2e-6")
    assert (config.think_weight, config.learning_rate, config.student_layer) == (0.0, 2e-6, 6)
    with pytest.raises(SystemExit, match="0"):
        oisd.main(["--help"])
    shown = capsys.readouterr().out
    for entry in dataclasses.fields(oisd.Config):
        assert f"--{entry.name} " in shown and field_docs(oisd.Config)[entry.name][1]


def test_a_written_config_is_read_back(tmp_path):
    config = dataclasses.replace(load("configs.toml:tiny"), system_prompt='Zwölf "🙂"\n\\boxed{}', learning_rate=1e-6)
    (tmp_path / "c.toml").write_text(toml_table("a b.c", config), encoding="utf-8")
    assert load(f"{tmp_path / 'c.toml'}:a b.c") == config


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


@needs_paper_data
def test_the_papers_training_data_load_and_their_golds_can_be_graded(toy):
    fields = {"question_field": "prompt", "answer_field": "reward_model.ground_truth"}
    config = oisd.Config(**fields, max_prompt_tokens=10**6, max_tokens_per_gpu=10**7)
    tokenizer = problems.load_tokenizer(str(toy), "")
    loaded, too_long = oisd.load_problems(str(PAPER_DATA / "deepmath-5k.parquet"), tokenizer, config)
    assert (len(loaded), too_long) == (5000, 0)
    with Grader(workers=2) as grader:
        problems.check_golds(loaded, grader)
