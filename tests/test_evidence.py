"""What the study stands on: sweeps and their statistics, the lens pictures, the report."""

import contextlib
import csv
import dataclasses
import html.parser
import json
import re
import shutil
import sys
import tomllib

import pytest
import torch
from conftest import toy_arguments
from transformers import AutoModelForCausalLM

import oisd
from settings import UserError
from tools import grids, lens, report, sweep

PYTHON = [sys.executable]


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """Two runs of two steps with everything that the pictures need: OISD and GRPO."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"num_steps": 2, "checkpoint_every": 1, "rollouts_every": 1, "gradient_norms_every": 1}
    assert oisd.main(toy_arguments(toy, folder / "oisd", **common)) == 0
    assert oisd.main(toy_arguments(toy, folder / "grpo", **common, think_weight=0, attention_weight=0)) == 0
    return folder / "oisd", folder / "grpo"


# ----------------------------------------------------- Sweeps --------------------------------------------------------

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


def test_a_sweep_runs_what_is_missing_and_reports_from_its_files(toy, tmp_path, monkeypatch, capsys):
    fields = dict(word[2:].split("=", 1) for word in toy_arguments(toy, "unused")[2:])
    fields = {name: value for name, value in fields.items() if name not in ("output_dir", "num_steps", "seed")}
    fields["config"] = f"{sweep.ROOT}/configs.toml:tiny"
    row = "\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
    spec = tmp_path / "study.toml"
    spec.write_text(SPEC.format(row=row))
    launched = []

    def call(words, log=None):  # in this process, as starting Python takes longer than the run
        launched.append(words[-1].rsplit("/", 1)[1])
        return oisd.main(words[2:])

    class Inline(contextlib.nullcontext):  # a run handles signals, which only the main thread may
        def __enter__(self):
            return self

        def map(self, *arguments):
            return map(*arguments)

        def shutdown(self, cancel_futures):
            assert cancel_futures

    monkeypatch.setattr(sweep, "call", call)
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    assert sweep.run_all(spec, 1, ["long-oisd-0"], PYTHON) == 0 and launched.pop() == "long-oisd-0"
    shutil.rmtree(tmp_path / "runs")
    assert sweep.run_all(spec, 1, ["oisd"], PYTHON) == 0
    assert launched == ["short-oisd-0", "long-oisd-0", "short-oisd-1"]
    assert sweep.run_all(spec, 2, [], PYTHON) == 0 and sorted(launched[3:]) == ["short-grpo-0", "short-grpo-1"]
    assert sweep.run_all(spec, 1, [], PYTHON) == 0 and len(launched) == 5  # all is there
    other = tmp_path / "other" / "study.toml"
    other.parent.mkdir()
    other.write_text(spec.read_text().replace("num_steps = 2", "num_steps = 3"))
    with pytest.raises(UserError, match="long-oisd-0 has num_steps = 2, the spec 3: move that run away"):
        sweep.run_all(other, 1, [], PYTHON)
    with (tmp_path / "study.runs.csv").open() as file:
        lines = {(line["setting"], line["row"], line["seed"]): line for line in csv.DictReader(file)}
    assert len(lines) == 5
    folder = tmp_path / "runs" / "study" / "long-oisd-0"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found, scores = lines["long", "oisd", "0"], json.loads((folder / "held_out.json").read_text())
    assert float(found["area"]) == pytest.approx(sum(m["reward"] for m in metrics) / 2, rel=1e-5)
    assert float(found["after"]) == pytest.approx(scores["2"]["accuracy"], rel=1e-5)
    assert [float(found[f"think_js_{when}"]) for when in ("first", "last")] == pytest.approx(
        [metrics[0]["think_js"], metrics[1]["think_js"]], rel=1e-5
    )
    with (tmp_path / "study.steps.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    capsys.readouterr()
    sweep.report(spec)
    said = capsys.readouterr().out
    assert all(part in said for part in ("### short", "### long", "| oisd, long less short | 1 |"))
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert sweep.main([str(spec), "--report", "--baseline", "oisd"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| grpo | 2", "| oisd | 2"))]
    assert [bool(line.split("|")[6].strip()) for line in lines] == [True, False]  # the other way round
    assert sweep.main([str(spec), "--report", "--baseline", "none"]) == 2
    assert "has no such row" in capsys.readouterr().err
    for name in ("study.runs.csv", "study.steps.csv"):
        (other.parent / name).write_bytes((tmp_path / name).read_bytes())
    sweep.report(other)  # of runs that are not the spec's: none is deleted, none is taken for one of them
    said = capsys.readouterr()
    assert "Left out: 1 runs" in said.out and "### long" not in said.out and "### short" in said.out
    assert "long-oisd-0 has num_steps = 2" in said.err
    assert (other.parent / "study.runs.csv").read_bytes() == (tmp_path / "study.runs.csv").read_bytes()
    shutil.rmtree(tmp_path / "runs")  # another machine, which has the CSV files alone
    assert sweep.run_all(spec, 1, [], PYTHON, missing=True) == 0 and len(launched) == 5
    assert sweep.run_all(other, 1, [], PYTHON, missing=True) == 0 and launched[5:] == ["long-oisd-0"]
    assert len(sweep.read_csv(spec, "runs")) == len(sweep.read_csv(other, "runs")) == 5


CALLED = 'baseline = "a"\n[rows.a]\nconfig = "configs.toml:tiny"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 3\n" + CALLED, "missing: seed"),
        ("seeds = 1\n[rows.a]", "a baseline, as in"),
        (CALLED, "row a lacks its table"),
        ("seeds = 2\n" + CALLED + 'settings = ["x"]', "missing: x"),
        ("seeds = 2\n" + CALLED + '[settings.a]\nbaseline = "x"', "missing: x"),
        ("seeds = ", "spec.toml: Invalid value"),
        ("seeds = 1\n" + CALLED + "think_wight = 1", "there is no field|unrecognized arguments: --think_wight"),
        ("seeds = 1\n" + CALLED + "num_steps = 0\n[settings.a]\nseeds = 0", "lacks its table"),
        ('seeds = 1\nprepare = ["tools/plan.py --config nowhere:x"]\n' + CALLED, "ended with exit code 2"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused_in_a_line(text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    (tmp_path / "spec.toml").write_text(text)
    assert sweep.main([str(tmp_path / "spec.toml")]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("path", sorted((sweep.ROOT / "results").glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_of_the_study_is_one_that_the_program_takes(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    spec, runs = sweep.read_spec(path)
    commands = [" ".join(run.words) for run in runs]
    assert len(set(commands)) == len(commands) and spec["baseline"] in {run.row for run in runs}
    for run in runs:
        if run.seed == 0:
            run.check()


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    (tmp_path / "spec.toml").write_text("seeds = 1\n" + CALLED)
    folder = tmp_path / "runs" / "spec" / "a-0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("kept")
    with sweep.locked(folder / "lock"), pytest.raises(UserError, match="held by another process"):
        sweep.run_all(tmp_path / "spec.toml", 1, [], PYTHON)
    assert (folder / "metrics.jsonl").read_text() == "kept"


def test_a_run_of_another_program_is_not_taken_for_the_specs(runs, tmp_path, monkeypatch):
    """Between oisd.py and tools/grids.py, whose one field more has a default; and what cannot resume starts anew."""
    (settings,) = tomllib.loads((runs[0] / "config.toml").read_text()).values()
    words = [f"--{name}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    words += [f"--{name}={str(value).lower()}" for name, value in settings.items() if isinstance(value, bool)]
    shutil.copytree(runs[0], tmp_path / "run")
    made = sweep.Planned("", "", 0, ["oisd.py", *words], tmp_path / "run")
    made.check()
    grid = dataclasses.replace(made, words=["tools/grids.py", *words])
    with pytest.raises(UserError, match="another program than tools/grids"):
        grid.check()
    with (tmp_path / "run" / "config.toml").open("a") as file:
        file.write('weight_grid = "bfloat16"\n')
    grid.check()
    with pytest.raises(UserError, match="another program than oisd"):
        made.check()
    launched = []
    monkeypatch.setattr(sweep, "call", lambda words, log: launched.append(words))
    shutil.rmtree(tmp_path / "run" / "final")
    made.launch(PYTHON)
    grid.launch(PYTHON)
    assert "--resume" in launched[0] and "--resume" not in launched[1] and not (tmp_path / "run").exists()


def test_an_older_run_is_the_token_means(runs, tmp_path):
    """Before version 0.3 there was no `internal_mean`; without internal losses it makes no difference."""
    for run in runs:
        (settings,) = tomllib.loads((run / "config.toml").read_text()).values()
        older = {name: value for name, value in settings.items() if name != "internal_mean"}
        shutil.copytree(run, tmp_path / run.name)
        lines = [f"{name} = {json.dumps(value)}" for name, value in older.items()]
        (tmp_path / run.name / "config.toml").write_text("\n".join(["[toy]", *lines]))
        words = [f"--{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in older.items()]
        planned = [
            sweep.Planned("", "", 0, ["oisd.py", *words, f"--internal_mean={mean}"], tmp_path / run.name)
            for mean in ("token", "rollout")
        ]
        planned[0].check()
        if run.name == "oisd":
            with pytest.raises(UserError, match="has internal_mean = 'token', the spec 'rollout'"):
                planned[1].check()
        else:
            planned[1].check()


def test_statistics_of_a_sweep():
    """Student's t for three differences, and what the bootstrap of a constant must be."""
    assert sweep.t_interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert sweep.t_interval([1.0, 2.0] * 4) == pytest.approx(2.364624 * 0.5345225 / 8**0.5, rel=1e-6)
    assert sweep.bootstrap([2.0] * 5) == (2.0, 2.0)
    low, high = sweep.bootstrap([0.0, 1.0] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    lines = [{"seed": seed, "after": value, "area": value} for seed, value in ((0, 0.5), (1, 0.75), (2, 0.5))]
    base = [{"seed": seed, "after": value, "area": value} for seed, value in ((2, 0.25), (0, 0.25), (7, 0.9))]
    assert sweep.paired(lines, base, "after") == [(0.5, 0.25), (0.5, 0.25)]
    assert sweep.differences(lines, base) == ["+25.0 ± 0.0", "+100.0 ± 0.0 [+100.0, +100.0]"]
    assert sweep.spread([1.0, None, 2.0]) == "1.5 ± 0.7 (2 of 3)"
    assert sweep.first_at([0.1, 0.1, 0.4, 0.7, 0.7], 0.39) == 3
    assert sweep.first_at([0.1, 0.1], 0.4) is None


# ----------------------------------------------------- Lens ----------------------------------------------------------


def test_layers_are_measured_as_the_losses_measure_them(runs):
    """Of the student layer what `losses` says; the last layer is itself; an exit behind it is the whole model."""
    opened = lens.open_place(str(runs[0]), [])
    rollouts = opened.sample(5)
    rows = lens.measure_layers(opened, rollouts)
    with torch.no_grad():
        sums = opened.model(opened.model.losses, oisd.pack(rollouts, opened.config))
    student = rows[opened.config.student_layer - 1]
    N, S = oisd.counts(rollouts, opened.config)
    assert student["think_js"] == pytest.approx(sums["think_js"].item() / N, rel=1e-4)
    assert student["entropy"] == pytest.approx(sums["student_entropy"].item() / N, rel=1e-4)
    assert student["attention_js"] == pytest.approx(sums["attention_js"].item() / S, rel=1e-4)
    last = rows[-1]
    assert last["think_js"] == last["attention_js"] == 0 and last["agreement"] == 1
    assert last["entropy"] == pytest.approx(sums["entropy"].item() / N, rel=1e-4)
    with lens.early_exit(opened.model, 3):
        assert [r.response_ids for r in opened.sample(5)] == [r.response_ids for r in rollouts]
    with lens.early_exit(opened.model, 1):
        logits = opened.model.model(torch.tensor([rollouts[0].prompt_ids])).logits
    ((_, hidden),) = lens.look(opened, rollouts[:1])
    torch.testing.assert_close(opened.model.lens(hidden[0, 0]), logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_opens_as_the_weights_it_holds(runs):
    first, last = (lens.open_place(str(runs[0] / "checkpoints" / f"step_00000{step}"), []) for step in (1, 2))
    final = AutoModelForCausalLM.from_pretrained(runs[0] / "final").state_dict()
    for name, tensor in last.model.model.state_dict().items():
        assert torch.equal(tensor, final[name]), name
    assert any(not torch.equal(tensor, final[name]) for name, tensor in first.model.model.state_dict().items())


def test_a_baselines_run_opens_too_and_one_without_weights_says_so(runs, tmp_path):
    settings = (runs[0] / "config.toml").read_text().replace('"grpo"', '"gae"') + "gae_gamma = 1.0\n"
    (tmp_path / "config.toml").write_text(settings)
    with pytest.raises(UserError, match="has neither final/ nor a checkpoint yet"):
        lens.open_place(str(tmp_path), [])
    (tmp_path / "final").symlink_to(runs[0] / "final")
    assert lens.open_place(f"{tmp_path}=PPO", []).name == "PPO"


@pytest.mark.parametrize("kind", ["table", "attention", "layers", "agreement", "scores", "norms", "responses"])
def test_every_picture_is_drawn(kind, runs, tmp_path, capsys):
    places = list(map(str, runs[:1] if kind in ("attention", "norms") else runs))
    words = [kind, *places, "--output", str(tmp_path / "picture.png"), "--problems", "4"]
    assert lens.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "picture.png").stat().st_size > 5000
    if kind == "layers":
        assert len((tmp_path / "picture.csv").read_text().splitlines()) == 1 + 2 * 3


def test_what_a_picture_lacks_is_said_in_a_line(runs, toy, tmp_path, capsys):
    bare = tmp_path / "bare"
    assert oisd.main(toy_arguments(toy, bare, num_steps=1, rollouts_every=0)) == 0
    assert lens.main(["attention", str(runs[0]), "--output", str(tmp_path / "one.png"), "--tokens", "1"]) == 0
    for kind, said in (("norms", "--gradient_norms_every 1"), ("responses", "see rollouts_every")):
        assert lens.main([kind, str(bare), "--output", str(tmp_path / "none.png")]) == 2
        assert said in capsys.readouterr().err
    for words, said in (
        (["table", str(tmp_path / "nowhere")], "is no run: name the table"),
        (["table", str(runs[0]), "--problem", "99"], "has 7 problems"),
        (["responses", str(runs[0]), str(runs[1]), "--problem", "99"], "that step has"),
        (["table", str(runs[0]), "--student_layr", "1"], "unrecognized arguments: --student_layr"),
    ):
        assert lens.main(words) == 2, words
        assert said in capsys.readouterr().err, words
    with pytest.raises(SystemExit):
        lens.main(["scores", str(runs[0]), "--typo", "3"])


# ----------------------------------------------------- Report --------------------------------------------------------


class Balanced(html.parser.HTMLParser):
    open_tags, text = (), ""

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href"} & dict(attributes).keys() or dict(attributes).get("href", "#")[0] == "#", attributes
        if tag not in ("meta", "br"):
            self.open_tags = (*self.open_tags, tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open_tags[-1] == tag, (self.open_tags, tag, self.getpos())
        self.open_tags = self.open_tags[:-1]

    def handle_data(self, data):
        self.text += data


def test_a_report_is_one_page_that_needs_nothing(runs, tmp_path):
    assert report.main([*map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    page = Balanced()
    page.feed((tmp_path / "page.html").read_text())
    assert not page.open_tags
    rows = [json.loads(line) for line in (runs[0] / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    for expected in ("think_weight", "Settings that differ", rows[0]["response"], "gold"):
        assert expected in page.text, expected
    differing = page.text.partition("Settings that differ")[2].partition("all settings")[0]
    assert "attention_weight" in differing and "learning_rate" not in differing
    assert report.main([str(tmp_path)]) == 2


# ----------------------------------------------------- Grids ---------------------------------------------------------


def test_images_are_the_grids_own_numbers():
    weights = torch.randn(400, 250, generator=torch.Generator().manual_seed(0))
    for grid, spacing in (("bfloat16", 2**-7), ("float16", 2**-10), ("stochastic", 2**-7)):
        found = grids.image(weights, grid, torch.Generator().manual_seed(1))
        dtype = torch.float16 if grid == "float16" else torch.bfloat16
        assert torch.equal(found, found.to(dtype).float()), grid
        least = -14 if grid == "float16" else -126  # of normal numbers; below it neighbours are equally far apart
        exponent = (torch.frexp(weights).exponent - 1).clamp(min=least)
        steps = (found - weights).double() / (spacing * torch.exp2(exponent.double()))  # between neighbours: 1
        assert steps.abs().max() <= (1 if grid == "stochastic" else 0.5 + 1e-3), grid
    assert torch.equal(grids.image(found, grid, torch.Generator()), found)  # what is on the grid stays
    for sign in (1, -1):  # between 1 and its neighbour: to it as often as the weight is near
        quarter = torch.full((100_000,), sign * (1 + 0.25 * 2**-7))
        up = grids.image(quarter, "stochastic", torch.Generator().manual_seed(2)) == sign * (1 + 2**-7)
        assert up.float().mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 100_000) ** 0.5)


@pytest.mark.parametrize("grid", ["bfloat16", "stochastic"])
def test_updates_are_of_float32_weights_however_coarse_the_grid(grid, toy, tmp_path):
    """What is read lies on the grid; what is updated is what the same gradients would have made without a grid."""
    seen = []

    def watch(run, rollouts):
        grids.set_advantages(run, rollouts)
        if run.state["step"] == 0:
            weights = next(p for p in run.model.parameters() if p.ndim > 1)
            run.optimizer.register_step_pre_hook(lambda *_: seen.append((weights.clone(), weights.grad.clone())))
            run.optimizer.register_step_post_hook(lambda *_: seen.append((weights.clone(), None)))

    method = dataclasses.replace(grids.GRID, set_advantages=watch)
    assert oisd.main(toy_arguments(toy, tmp_path / "run", num_steps=3, weight_grid=grid), method) == 0
    shadow = torch.nn.Parameter(seen[0][0].clone())
    lr = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["tiny"]["learning_rate"]
    optimizer = torch.optim.AdamW([shadow], lr=lr, weight_decay=0.01)
    for (before, gradient), (after, _) in zip(seen[::2], seen[1::2]):
        assert torch.equal(before, shadow.data)  # the masters, brought back
        shadow.grad = gradient
        optimizer.step()
        assert torch.equal(after, after.bfloat16().float()) and not torch.equal(after, shadow.data)


def test_what_grids_cannot_do_is_said_in_a_line(toy, tmp_path, capsys):
    for fields, said in (
        ({"dtype": "bfloat16", "weight_grid": "float16"}, "rounded once more"),
        ({"weight_grid": "int8"}, "weight_grid"),
        ({"lora_rank": 4}, "lora_rank = 4"),
    ):
        assert oisd.main(toy_arguments(toy, tmp_path / "run", **fields), grids.GRID) == 2
        assert said in capsys.readouterr().err
    assert oisd.main(toy_arguments(toy, tmp_path / "run", num_steps=1), grids.GRID) == 0
    assert oisd.main(["--resume", str(tmp_path / "run"), "--num_steps", "2"], grids.GRID) == 2
    assert "--resume: the checkpoints of tools/grids.py" in capsys.readouterr().err
