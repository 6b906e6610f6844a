"""The study's sweeps and programs, and the pictures of layers."""

import dataclasses
import json
import re
import shutil
import threading
from unittest.mock import MagicMock

import oisd
import pandas as pd
import pytest
import torch
from study import ablations, sweep
from support.settings import ROOT
from test_oisd import gradients, random_model, random_rollouts, run_of, with_config
from tools import lens

from conftest import toy_arguments

SPEC = """seeds = 2
baseline = "grpo"
settings.short = {num_steps = 1, test_data = ""}
settings.long = {num_steps = 2, seeds = 1, rows = ["oisd"], baseline = "short", test_data = DATA}
rows.grpo = {FIELDS, think_weight = 0.0}
rows.oisd = {FIELDS}
"""


def test_a_sweep_runs_what_is_missing_and_reports_from_its_files(toy, tmp_path, monkeypatch, capsys):
    words = [f"--config={ROOT}/configs.toml:tiny", *toy_arguments(toy, "", checkpoint_every=1)[2:]]
    fields = [word[2:].replace("=", ' = "', 1) + '"' for word in words if word[2:5] not in ("out", "num", "tes")]
    text = SPEC.replace("FIELDS", ", ".join(fields)).replace("DATA", f'"{toy}/train.jsonl"')
    spec = tmp_path / "study.toml"
    spec.write_text(text)
    runs = tmp_path / "runs" / "study"
    launched = []
    both = threading.Barrier(2)

    def main(*options, call):
        launched.clear()
        monkeypatch.setattr("subprocess.call", call)
        return sweep.main([str(spec), *options]), launched[:], "".join(capsys.readouterr())

    def train(words, **_):  # in this process, as starting Python takes longer than the run
        launched.append(f"{words[-2]} {words[-1].rsplit('/', 1)[1]}")
        return oisd.main(words[words.index("oisd.py") + 1 :])

    monkeypatch.setattr(sweep, "RUNS", runs.parent)
    code, _, shown = main("--jobs", "2", "--only", "short-grpo-1,long", call=lambda *_, **__: both.wait(20))
    assert code == 1 and f"1 of 2: long-oisd-0 is NOT FINISHED, see {runs}/long-oisd-0.log" in shown
    assert "has no row, setting or run nothing" in main("--only", "grpo,nothing", call=train)[2]
    stopped = MagicMock(side_effect=KeyboardInterrupt)
    assert "sweep: stopped; the same command continues" in main("--launcher", "accelerate launch", call=stopped)[2]
    assert stopped.call_args.args[0][:3] == ["accelerate", "launch", "oisd.py"]
    inline = MagicMock(**{"return_value.__enter__.return_value.map": map})  # a run handles signals: in the main thread
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", inline)
    started = [f"--output_dir {name}" for name in ("short-oisd-0", "long-oisd-0", "short-oisd-1")]
    assert main("--only", "oisd", call=train)[:2] == (0, started)

    for part in ("short-oisd-1", "long-oisd-0/final", "short-oisd-0/final", "short-oisd-0/checkpoints"):
        shutil.rmtree(runs / part)  # a run that was deleted, one that was interrupted late, and one early
    with sweep.locked(runs / "short-oisd-0"):  # somebody trains in it
        assert main("--only", "short-oisd-0", call=train)[:2] == (2, [])
    only = ("--only", "grpo,long,short-oisd-0")
    continued = ["--output_dir short-grpo-0", "--output_dir short-oisd-0", "--resume long-oisd-0"]
    assert main(*only, call=train)[:2] == (0, [*continued, "--output_dir short-grpo-1"])
    assert main(*only, call=train)[:2] == (0, [])
    assert len(sweep.read_csv(spec, "runs")) == 5 and len(sweep.read_csv(spec, "steps")) == 6
    assert not re.search(r"\.\d{12}", spec.with_suffix(".runs.csv").read_text())  # %.6g

    with sweep.locked(runs):  # another sweep is at it
        assert main(call=train)[0] == 2
        shown = main("--report", call=train)[2]
    found = ("another process", "5 runs", "### short", "| grpo | 2 | - | - |", "| oisd, long minus short | 1 |")
    assert all(part in shown for part in found) and (tmp_path / "study.png").stat().st_size > 10_000
    spec.write_text(text.replace('checkpoint_every = "1"', 'checkpoint_every = "2"'))
    assert main(*only, call=train)[:2] == (0, [])
    spec.write_text(text.replace("num_steps = 2", "num_steps = 3"))
    assert "long-oisd-0 has num_steps = 2, not 3: move it away" in main(call=train)[2]
    shutil.rmtree(runs)  # another machine, which has only the CSV files
    assert "Left out: 4 runs" in main("--report", call=train)[2]


BASE = 'seeds = 1\nbaseline = "a"\n[rows.a]\nconfig = "configs.toml:tiny"\n'
BAD = {
    "spec.toml: Invalid value": "seeds =",
    "unknown or missing: baseline, seed": "seed = 3\n[rows.a]",
    "unknown or missing: b, c, d": BASE + 'settings = ["b"]\n[settings.e]\nrows = ["c"]\nbaseline = "d"',
    "row a lacks its table": BASE.replace("config", "model"),
    "No module named 'nothing'": BASE + 'program = "nothing.py"',
    "unrecognized arguments: --think_wight": BASE + "think_wight = 1",
    "exit status 2": 'prepare = ["-c exit(2)"]\n' + BASE,
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_spec_gets_one_line(message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    (tmp_path / "spec.toml").write_text(BAD[message])
    assert sweep.main([str(tmp_path / "spec.toml")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sweep: error: ") and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "study").glob("[a-z]*.toml")), ids=lambda path: path.stem)
def test_the_programs_take_every_run_of_the_study_and_its_files_name_them(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RUNS", tmp_path)
    spec, planned = sweep.read_spec(path)
    assert len({run.settings for run in planned}) == len(planned) and spec["baseline"] in {run.row for run in planned}
    for run in (run for run in planned if run.seed == 0):
        run.check()
    lines = sweep.read_csv(path, "runs")
    assert len(lines.merge(pd.DataFrame(planned))) == len(lines)


def test_statistics_of_a_sweep(tmp_path):
    assert sweep.t_interval(pd.Series([1.0, 2.0, 3.0])) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert sweep.bootstrap([0.0, 1.0] * 50) == pytest.approx([0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05], abs=0.011)
    lines = pd.DataFrame({"seed": [0, 1, 2], "after": [0.5, 0.75, 0.5], "area": [0.5, 0.75, 0.5]})
    base = pd.DataFrame({"seed": [2, 0, 7], "after": [0.25, 0.25, 0.9], "area": [0.25, 0.25, 0.9]})
    assert sweep.differences(lines, base) == "+25.0 ± 0.0 | +100.0 ± 0.0 [+100.0, +100.0]"  # by seed
    assert sweep.spread(pd.Series([1.0, None, 2.0])) == "1.5 ± 0.7 (2 of 3)"
    (tmp_path / "config.toml").write_text("# version 1, commit abc\n")
    scores = {n: {"accuracy": n / 10, "standard_error": 0} for n in (0, 4)}
    (tmp_path / "held_out.json").write_text(json.dumps(scores))
    columns = {"step": range(1, 6), "reward": [0.1, 0.1, 0.4, 0.7, 0.7], "think_js": [0.9, 0, 0, 0.5, 0.5]}
    pd.DataFrame(columns).assign(seconds=2).to_json(tmp_path / "metrics.jsonl", orient="records", lines=True)
    line, _ = sweep.summarize(sweep.Run("", "a", 0, "oisd.py", tmp_path))
    expected = {"commit": "abc", "before": 0, "after": 0.4, "area": pytest.approx(0.4), "think_js_largest_at": 5}
    expected |= {"steps_to_half": 3, "steps_to_nine_tenths": 3, "half_right_at": 4, "think_js_last": 0.5, "seconds": 10}
    assert line[[*expected]].iloc[0].to_dict() == expected


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_one_sign_trains_the_internal_losses(sign, monkeypatch):
    model, rollouts = random_model(), random_rollouts()
    weights = {"policy_weight": 0.0, "attention_weight": 1.0}
    _, both = gradients(model, with_config(**weights), rollouts)
    for rollout in rollouts:
        rollout.advantage *= (rollout.advantage > 0) == (sign == "positive")  # as if the others had no JS
    _, expected = gradients(model, with_config(**weights), rollouts)
    monkeypatch.setattr(oisd, "TappedModel", ablations.OneSign)
    config = ablations.AblationConfig(**dataclasses.asdict(with_config(**weights)), advantage_sign=sign)
    _, found = gradients(model, config, random_rollouts())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert any((found[name] - both[name]).abs().max() > 1e-4 for name in found)


def test_gradient_norms_are_those_of_each_loss_alone():
    model, rollouts = random_model(), random_rollouts()
    weights = {"policy": 1.0, "think": 1.0, "attention": 0.5}
    run = run_of(model, with_config(attention_weight=0.5), torch.optim.SGD(model.parameters(), lr=1.0))
    found = ablations.gradient_norms(run, rollouts)
    assert set(found) == set(weights) and all(parameter.grad is None for parameter in model.parameters())
    for name, norm in found.items():
        alone = {f"{other}_weight": weight * (other == name) for other, weight in weights.items()}
        _, gradient = gradients(model, with_config(**alone), rollouts)
        assert norm == pytest.approx(torch.stack([g.norm() for g in gradient.values()]).norm().item(), rel=1e-5)


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert oisd.main(toy_arguments(toy, folder, num_steps=2, dtype="bfloat16", spread_weights="true")) == 0
    return str(folder)


def test_layers_are_measured_as_the_losses_measure_them(run):
    """The student as in `losses`; the last layer is itself."""
    opened = lens.open_place(run, [])
    rollouts = opened.sample(5)
    rows = lens.measure_layers(opened, rollouts)
    with torch.no_grad():
        metrics = opened.model(opened.model.losses, oisd.pack(rollouts, opened.config)).metrics
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    think_js, entropy, _, attention_js = rows[opened.config.student_layer - 1]
    expected = [means[name] for name in ("think_js", "student_entropy", "attention_js")]
    assert [think_js, entropy, attention_js] == pytest.approx(expected, rel=1e-4)
    assert rows[-1] == [0, pytest.approx(means["entropy"], rel=1e-4), 1, 0]


def test_the_lens_tool_runs_on_runs(run, tmp_path, capsys):
    for words in (["table", run, run], ["layers", f"{run}=one"], ["rule", run]):
        assert lens.main([*words, f"--output={tmp_path}/picture.png", "--problems=4"]) == 0
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("\none,") == 3  # a line of CSV for each layer
    assert lens.main(["table", "nowhere"]) == 2
    assert "is no run: name the table" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_rule_reads_the_residual_stream_around_each_ffn(family):
    model, (rollout,) = random_model(family, dtype=torch.float32), random_rollouts(1)
    tapped, added, last = oisd.TappedModel(model, with_config()), [], []
    found = tapped(lens.ffn_entropies, tapped, oisd.pack([rollout], tapped.config)).detach()  # (2, 2, L, N)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: added.append(output[0]))
    model.model.norm.register_forward_pre_hook(lambda _, taken: last.append(taken[0]))
    with torch.no_grad():
        output = model(torch.tensor([rollout.prompt_ids + rollout.response_ids]), output_hidden_states=True)
    before = [state + more for state, more in zip(output.hidden_states, added)]
    after = [*output.hidden_states[1:4], *last]  # Transformers' last hidden state is normed
    streams = torch.stack([torch.cat(before), torch.cat(after)])[:, :, len(rollout.prompt_ids) - 1 : -1]
    for reading, norm in enumerate((True, False)):
        p = tapped.lens(streams, norm).log_softmax(-1)
        torch.testing.assert_close(found[reading], -(p.exp() * p).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_rule_takes_the_last_positive_layer_below_the_teacher():
    before = [1.0] * 4
    with_norm = [1.5, 1.25, 0.75, 2.0]
    without = [0.5, 0.25, 0.75, 2.0]
    assert lens.report(torch.tensor([[before, with_norm], [before, without]])) == [2, 0]
