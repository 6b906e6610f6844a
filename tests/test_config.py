"""Settings, tables, data: what is accepted, and the one line that refuses the rest."""

import dataclasses
import tomllib

import pytest
from conftest import PAPER_DATA, ROOT, needs_paper_data, toy_arguments

import inputs
import oisd
from baselines.opsd import OpsdConfig
from baselines.ppo import PpoConfig
from settings import UserError, field_docs, toml_table
from test_oisd import with_config


def test_every_table_loads(capsys):
    for table in tomllib.loads((ROOT / "configs.toml").read_text()):
        kinds = {"ppo": PpoConfig, "opsd": OpsdConfig}
        kind = kinds.get(table.rpartition("_")[2], oisd.Config)
        name, config = oisd.load_config(["--config", f"configs.toml:{table}"], kind)
        assert name == table and type(config) is kind
    _, config = oisd.load_config(["--config", "configs.toml:octothinker_8b"])
    assert config.student_layer == 31 and config.prompts_per_step == 128  # from the table, and from its base
    name, config = oisd.load_config(["--config=configs.toml:qwen3_4b", "--think_weight", "0", "--learning_rate=2e-6"])
    assert (config.think_weight, config.learning_rate, config.student_layer) == (0.0, 2e-6, 6)
    with pytest.raises(SystemExit, match="0"):
        oisd.main(["--help"])
    shown = capsys.readouterr().out
    for entry in dataclasses.fields(oisd.Config):
        assert f"--{entry.name} " in shown and field_docs(oisd.Config)[entry.name][1]


BAD_INPUTS = [  # of the command line and the table
    (["--learning_rat", "1"], "did you mean '--learning_rate'"),
    (["--learning_rate", "fast"], "learning_rate = 'fast': it must be a valid number"),
    (["--learning_rate"], "expected one argument"),
    (["--learning_rate", "-1"], "greater than 0"),
    (["--num_steps", "1.5"], "valid integer"),
    (["--thinking", "maybe"], "valid boolean"),
    (["--sampler", "vlm"], "did you mean 'vllm'"),
    (["--dtype", "fp16"], "'float32' or 'bfloat16'"),
    (["--temperature", "nan"], "finite number"),
    (["--clip_low", "1.5"], "less than 1"),
    (["--dual_clip", "1"], "greater than 1"),
    (["--attention", "flash_attention_2"], "bfloat16 only"),
    (["--group_size", "1"], "greater than or equal to 2"),
    (["--mini_batch_prompts", "5"], "must divide"),
    (["--max_tokens_per_gpu", "10"], "cannot hold one rollout"),
    (["--vllm_memory", "2"], "less than or equal to 1"),
    (["--vllm_memory", "most"], "it must be a valid number"),
    (["--recompute_layers", "-1"], "greater than or equal to 0"),
    (["--model", ""], "at least 1 character"),
    (["tiny"], "unrecognized arguments: tiny"),
    (["--config", "configs.toml:tyni"], "did you mean 'tiny'"),
    (["--config", "configs.toml"], "FILE:TABLE"),
    (["--config", "nothing.toml:tiny"], "no file"),
    (["--resume", "nowhere"], "--resume takes the settings of the run"),
]
BAD_RUNS = [  # of what they name
    (["--tracker", "wandb"], "need wandb"),
    (["--student_layer", "3"], "has 3 layers"),
    (["--model", "./nowhere"], "./nowhere"),
    (["--train_data", "nowhere.jsonl"], "no such file"),
    (["--answer_field", "anser"], "did you mean 'answer'"),
    (["--max_prompt_tokens", "2", "--max_tokens_per_gpu", "500"], "at most max_prompt_tokens = 2"),
    (["--max_prompt_tokens", "500", "--max_tokens_per_gpu", "600"], "exceed the 128 positions"),
    (["--tensor_parallel", "2"], "launch a multiple of it"),
    (["--chat_template", "{{ messages.no.such }}"], "the chat template refuses the prompt"),
    (["--chat_template", "{# #}"], "renders nothing"),
    (["--output_dir", "/proc/none"], "output_dir = '/proc/none'"),
]


@pytest.mark.parametrize("arguments,message", BAD_INPUTS, ids=[" ".join(words) for words, _ in BAD_INPUTS])
def test_bad_settings_get_one_line(arguments, message, capsys):
    words = [] if "configs" in str(arguments) or "nothing" in str(arguments) else ["--config", "configs.toml:tiny"]
    assert oisd.main([*words, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("oisd: error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("arguments,message", BAD_RUNS, ids=[" ".join(words) for words, _ in BAD_RUNS])
def test_bad_input_gets_one_line(arguments, message, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert oisd.main([*toy_arguments(toy, tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("oisd: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_first(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    for words, message in (
        (["--attention", "flash_attention_2", "--dtype", "bfloat16"], "need flash-attn"),
        (["--lora_rank", "4"], "need peft"),
        (["--tracker", "wandb"], "need wandb"),
    ):
        assert oisd.main([*toy_arguments(toy, tmp_path / "run"), *words]) == 2
        assert message in capsys.readouterr().err


def test_bad_tables_get_one_line(tmp_path):
    for text, message in (
        ("[a]\nnum_steps = '3'", "valid integer"),
        ("[a]\nnum_step = 3", "did you mean 'num_steps'"),
        ("[a]\ngradient_checkpointing = true", "it is now recompute_layers"),
        ("[a]\njs_clip = 0.0", "it is now OPSD's alone"),
        ("[a]\nthinking = 1", "valid boolean"),
        ("[a]\nlearning_rate = true", "valid number"),
        ("[a]\nbase = 'b'\n[b]\nbase = 'a'", "its own base"),
        ("[a]\nbase = 'c'", "no table 'c'"),
        ("[a", "not valid TOML"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            oisd.load_config(["--config", f"{tmp_path / 'c.toml'}:a"])


def test_resolved_config_is_a_config(tmp_path):
    config = with_config(system_prompt='Zwölf "🙂"\n\\boxed{}', learning_rate=1e-6)
    for name in ("run", "a b.c"):  # the second is no bare key
        (tmp_path / "c.toml").write_text(toml_table(name, config), encoding="utf-8")
        assert oisd.load_config(["--config", f"{tmp_path / 'c.toml'}:{name}"]) == (name, config)
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        oisd.load_config(["--config", f"{tmp_path / 'c.toml'}:run"])


def test_step_problems_are_epochs_in_order():
    problems = [oisd.Problem(row, [1], "1") for row in range(10)]
    config = with_config(prompts_per_step=4, mini_batch_prompts=4)
    rows = [problem.row for step in range(5) for problem in oisd.step_problems(problems, step, config)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]


@needs_paper_data
def test_paper_data_loads(toy):
    fields = {"question_field": "prompt", "answer_field": "reward_model.ground_truth", "model": str(toy)}
    config = with_config(**fields, max_prompt_tokens=10**6, max_tokens_per_gpu=10**7)
    tokenizer = oisd.load_tokenizer(config)
    counts = {"deepmath-5k": 5000, "math500": 500, "amc2023": 40, "aime_2024": 30, "aime_2025": 30}
    for name, count in counts.items():
        problems, too_long = oisd.load_problems(str(PAPER_DATA / f"{name}.parquet"), tokenizer, config)
        assert (len(problems), too_long) == (count, 0)



PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"question": ["1+1", "2"], "answer": "2"}', "neither a text nor a list of messages"),
        ('{"question": [{"content": "1+1"}], "answer": "2"}', "neither a text nor a list of messages"),
        ('{"question": "", "answer": "2"}', "is missing"),
        ('{"question": "1+1", "answer": null}', "is missing"),
        ('{"question": "1+1", "ans', "cannot be read"),
        ("", "is empty"),
    ],
)
def test_bad_data_get_one_line(line, message, toy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(line and line + "\n")
    assert oisd.main(toy_arguments(toy, tmp_path / "run", train_data=data)) == 2
    error = capsys.readouterr().err
    assert error.startswith("oisd: error: ") and error.count("\n") == 1 and message in error and "data.jsonl" in error
    assert not (tmp_path / "run").exists()


def test_a_template_that_refuses_system_messages(toy):
    """The line names the way out, and it works where the data bring a system message of their own."""
    config = with_config(model=str(toy), chat_template=NO_SYSTEM)
    tokenizer = oisd.load_tokenizer(config)
    own = [{"role": "system", "content": "3"}, {"role": "user", "content": "1+1"}]
    for question in ("1+1", own):
        with pytest.raises(UserError, match=r'no system role.*--system_prompt ""'):
            inputs.prompt_ids(tokenizer, question, config)
        ids = inputs.prompt_ids(tokenizer, question, with_config(chat_template=NO_SYSTEM, system_prompt=""))
        assert "1+1" in tokenizer.decode(ids) and "3" not in tokenizer.decode(ids)
