"""The study's sweeps and programs, and the pictures of layers."""

import contextlib
import csv
import json
import shutil
import sys

import oisd
import pytest
import torch
from safetensors.torch import load_file
from study import ablations, grids, sweep
from support.settings import ROOT, UserError
from test_oisd import gradients, random_model, random_rollouts, run_of, with_config
from tools import lens

from conftest import read_metrics, toy_arguments

PYTHON = [sys.executable]


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """Two runs of two steps: OISD and GRPO."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"num_steps": 2, "checkpoint_every": 1}
    assert oisd.main(toy_arguments(toy, folder / "oisd", **common)) == 0
    assert oisd.main(toy_arguments(toy, folder / "grpo", **common, think_weight=0, attention_weight=0)) == 0
    return folder / "oisd", folder / "grpo"


SPEC = """
seeds = 2
baseline = "grpo"
[settings.short]
num_steps = 1
[settings.long]
baseline = "short"
rows = ["oisd"]
num_steps = 2
seeds = 1
[rows.grpo]
{row}
think_weight = 0.0
[rows.oisd]
{row}
"""


class Inline(contextlib.nullcontext):
    """Stands in for the pool: a run handles signals, which only the main thread may."""

    def __enter__(self):
        return self

    def map(self, *arguments):
        return map(*arguments)

    def shutdown(self, cancel_futures):
        pass


def test_a_sweep_runs_what_is_missing_and_reports_from_its_files(toy, tmp_path, monkeypatch, capsys):
    fields = dict(word[2:].split("=", 1) for word in toy_arguments(toy, "unused")[2:])
    fields = {name: value for name, value in fields.items() if name not in ("output_dir", "num_steps", "seed")}
    fields["config"] = f"{ROOT}/configs.toml:tiny"
    row = "\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
    spec = tmp_path / "study.toml"
    spec.write_text(SPEC.format(row=row))
    launched = []

    def call(words, log=None):  # in this process, as starting Python takes longer than the run
        launched.append(words[-1].rsplit("/", 1)[1])
        return oisd.main(words[2:])

    monkeypatch.setattr(sweep, "call", call)
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", lambda jobs: Inline())
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    assert sweep.run_all(spec, 1, ["oisd"], PYTHON) == 0
    assert launched == ["short-oisd-0", "long-oisd-0", "short-oisd-1"]
    assert sweep.run_all(spec, 2, [], PYTHON) == 0 and sorted(launched[3:]) == ["short-grpo-0", "short-grpo-1"]
    other = tmp_path / "other" / "study.toml"
    other.parent.mkdir()
    other.write_text(spec.read_text().replace("num_steps = 2", "num_steps = 3"))
    with pytest.raises(UserError, match="long-oisd-0 has num_steps = 2, the spec 3: move it away"):
        sweep.run_all(other, 1, [], PYTHON)

    with (tmp_path / "study.runs.csv").open() as file:
        lines = {(line["setting"], line["row"], line["seed"]): line for line in csv.DictReader(file)}
    folder = tmp_path / "runs" / "study" / "long-oisd-0"
    metrics, found = read_metrics(folder), lines["long", "oisd", "0"]
    scores = json.loads((folder / "held_out.json").read_text())
    assert float(found["area"]) == pytest.approx(sum(m["reward"] for m in metrics) / 2, rel=1e-5)
    assert float(found["after"]) == pytest.approx(scores["2"]["accuracy"], rel=1e-5)
    assert float(found["think_js_last"]) == pytest.approx(metrics[1]["think_js"], rel=1e-5)
    assert len(lines) == 5 and len(sweep.read_csv(spec, "steps")) == 6

    assert sweep.main([str(spec), "--report"]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("### short", "### long", "| oisd, long minus short | 1 |"))
    assert (tmp_path / "study.png").stat().st_size > 10_000
    shutil.rmtree(tmp_path / "runs")  # another machine, which has only the CSV files
    assert sweep.run_all(spec, 1, [], PYTHON, missing=True) == 0 and len(launched) == 5
    for name in ("study.runs.csv", "study.steps.csv"):
        (other.parent / name).write_bytes((tmp_path / name).read_bytes())
    assert sweep.run_all(other, 1, [], PYTHON, missing=True) == 0 and launched[5:] == ["long-oisd-0"]


BASE = 'baseline = "a"\n[rows.a]\nconfig = "configs.toml:tiny"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 3\n" + BASE, "missing: seed"),
        ("seeds = 1\n[rows.a]", "a baseline, as in"),
        (BASE, "row a lacks its table"),
        ("seeds = 1\n" + BASE + "think_wight = 1", "unrecognized arguments: --think_wight"),
        ('seeds = 1\nprepare = ["tools/plan.py --config nowhere:x"]\n' + BASE, "ended with exit code 2"),
    ],
)
def test_a_bad_spec_gets_one_line(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    (tmp_path / "spec.toml").write_text(text)
    assert sweep.main([str(tmp_path / "spec.toml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "study").glob("[a-z]*.toml")), ids=lambda path: path.stem)
def test_the_programs_take_every_run_of_the_study_and_its_files_name_them(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    spec, planned = sweep.read_spec(path)
    commands = {run.key: " ".join(run.words) for run in planned}
    assert len(set(commands.values())) == len(planned) and spec["baseline"] in {run.row for run in planned}
    for run in planned:
        if run.seed == 0:
            run.check()
    for line in sweep.read_csv(path, "runs"):
        assert line["settings"] == commands[sweep.key_of(line)]


def test_statistics_of_a_sweep():
    assert sweep.t_interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert sweep.bootstrap([2.0] * 5) == (2.0, 2.0)
    low, high = sweep.bootstrap([0.0, 1.0] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    lines = [{"seed": seed, "after": value, "area": value} for seed, value in ((0, 0.5), (1, 0.75), (2, 0.5))]
    base = [{"seed": seed, "after": value, "area": value} for seed, value in ((2, 0.25), (0, 0.25), (7, 0.9))]
    assert sweep.differences(lines, base) == ["+25.0 ± 0.0", "+100.0 ± 0.0 [+100.0, +100.0]"]  # by seed
    assert sweep.spread([1.0, None, 2.0]) == "1.5 ± 0.7 (2 of 3)"
    assert sweep.first_at([0.1, 0.1, 0.4, 0.7, 0.7], 0.39) == 3


def of_sign(sign, **changes):
    """The tests' config as one of the ablations."""
    values = {name: getattr(with_config(**changes), name) for name in oisd.Config.__dataclass_fields__}
    return ablations.AblationConfig(**values, advantage_sign=sign)


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_one_sign_trains_the_internal_losses(sign, monkeypatch):
    """The other rollouts' clipped advantages are 0, as if they had no JS; GRPO's loss is as ever."""
    model, rollouts = random_model(), random_rollouts()
    weights = {"policy_weight": 0.0, "attention_weight": 1.0}
    _, both = gradients(model, with_config(**weights), rollouts)
    kept = [r for r in rollouts if (r.advantage > 0) == (sign == "positive")]
    for rollout in rollouts:
        rollout.advantage = rollout.advantage if rollout in kept else 0.0
    _, expected = gradients(model, with_config(**weights), rollouts)
    monkeypatch.setattr(oisd, "TappedModel", ablations.OneSign)
    _, found = gradients(model, of_sign(sign, **weights), random_rollouts())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert any((found[name] - both[name]).abs().max() > 1e-4 for name in found)


def test_gradient_norms_are_those_of_each_loss_alone():
    model, rollouts = random_model(), random_rollouts()
    run = run_of(model, with_config(attention_weight=0.5), torch.optim.SGD(model.parameters(), lr=1.0))
    found = ablations.gradient_norms(run, rollouts)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, norm in found.items():
        alone = {f"{other}_weight": 0.0 for other in found if other != name}
        _, gradient = gradients(model, with_config(**{"attention_weight": 0.5} | alone), rollouts)
        expected = torch.stack([g.norm() for g in gradient.values()]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-5)
    assert set(found) == {"policy", "think", "attention"}


@pytest.mark.parametrize("grid", ["bfloat16", "stochastic"])
def test_updates_are_of_float32_weights_however_coarse_the_grid(grid, toy, tmp_path):
    words = toy_arguments(toy, tmp_path / "run", num_steps=2, test_data="", weight_grid=grid)
    assert oisd.main(words, grids.METHOD) == 0
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in final.values())
    weights = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next number of bfloat16
    image = grids.image(weights, grid, torch.Generator().manual_seed(0))
    share = (image > 1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.01) if grid == "stochastic" else share == 0


# ----------------------------------------------------- Layers --------------------------------------------------------


def test_layers_are_measured_as_the_losses_measure_them(runs):
    """The student as in `losses`; the last layer is itself."""
    opened = lens.open_place(str(runs[0]), [])
    rollouts = opened.sample(5)
    rows = lens.measure_layers(opened, rollouts)
    with torch.no_grad():
        metrics = opened.model(opened.model.losses, oisd.pack(rollouts, opened.config)).metrics
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    think_js, entropy, _, attention_js = rows[opened.config.student_layer - 1]
    expected = [means[name] for name in ("think_js", "student_entropy", "attention_js")]
    assert [think_js, entropy, attention_js] == pytest.approx(expected, rel=1e-4)
    assert rows[-1] == [0, pytest.approx(means["entropy"], rel=1e-4), 1, 0]


def test_the_lens_tool_runs_on_runs(runs, tmp_path, capsys):
    for kind, places in (("table", runs), ("layers", runs), ("rule", runs[:1])):
        words = [kind, *map(str, places), "--output", str(tmp_path / "picture.png"), "--problems", "4"]
        assert lens.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count(f"\n{runs[1]},") == 3  # one line of CSV for each layer
    assert lens.main(["table", str(tmp_path / "nowhere")]) == 2
    assert "is no run: name the table" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_rule_reads_the_residual_stream_around_each_ffn(family):
    """Against the model's own hidden states and what its attention adds to them."""
    model, rollout = random_model(family, dtype=torch.float32), random_rollouts(1)[0]
    tapped = oisd.TappedModel(model, with_config())
    found = tapped(lens.ffn_entropies, tapped, oisd.pack([rollout], tapped.config)).detach()  # (2, 2, L, N)
    added = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: added.append(output[0][0]))
    last = []
    model.model.norm.register_forward_pre_hook(lambda _, taken: last.append(taken[0][0]))
    with torch.no_grad():
        output = model(torch.tensor([rollout.prompt_ids + rollout.response_ids]), output_hidden_states=True)
    states = [state[0] for state in output.hidden_states]
    before = [state + more for state, more in zip(states, added)]
    after = [*states[1:4], last[0]]  # Transformers' last hidden state is normed
    where = slice(len(rollout.prompt_ids) - 1, -1)
    for reading, norm in enumerate((True, False)):
        for place, streams in enumerate((before, after)):
            p = tapped.lens(torch.stack(streams)[:, where], norm).log_softmax(-1)
            torch.testing.assert_close(found[reading, place], -(p.exp() * p).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_rule_takes_the_last_positive_layer_below_the_teacher():
    before = [1.0, 1.0, 1.0, 1.0]
    with_norm, without = [1.5, 1.25, 0.75, 2.0], [0.5, 0.25, 0.75, 2.0]
    assert lens.report(torch.tensor([[before, with_norm], [before, without]])) == [2, 0]
