"""One process: what a run computes, reports, leaves and survives."""

import itertools
import json
import math
import os
import resource
import signal
from statistics import fmean
from types import SimpleNamespace

import oisd
import pytest
import torch
from safetensors.torch import load_file
from support import grader, hf_sampler, models, problems, processes, run_folder
from support.hf_sampler import HfSampler
from support.settings import UserError
from test_oisd import random_model, run_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import read_lines, read_metrics, toy_arguments, write_lines


@pytest.fixture(autouse=True)
def grade_by_spelling(monkeypatch):
    """Compare the toy's digits without grader processes."""
    monkeypatch.setattr(grader.Grader, "_verdict", lambda self, pair: pair[1] in (pair[0], None))


def test_a_sequence_depends_on_its_own_seed_only(monkeypatch):
    """Draw the same tokens in a batch that finished sequences leave and in one that they stay in."""
    model = random_model(dtype=torch.float32)
    sampler = HfSampler(model, list(range(0, 61, 7)), torch.device("cpu"), 1.0, 40, 256, "float32")
    prompts = [[1 + i % 5] * (2 + i % 4) for i in range(12)]
    found = []
    for segment in (3, 1000):
        monkeypatch.setattr(hf_sampler, "SEGMENT", segment)
        found.append([sample[:3] for sample in sorted(sampler.stream(prompts, list(range(12))))])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_sampling_draws_from_the_softmax():
    """Compare 20,000 draws at temperature 0.5 with the probabilities, by chi-squared."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    draws = 20_000
    sampling = hf_sampler.SeededSampling(range(draws), temperature=0.5, end_ids=[1, 4])
    tokens = sampling(torch.zeros(draws, 1), logits.expand(draws, 5)).argmax(-1)
    expected = (logits / 0.5).softmax(-1)
    errors = tokens.bincount(minlength=5) - draws * expected
    assert (errors**2 / (draws * expected)).sum() < 18.5  # 99.9 % quantile, 4 degrees of freedom
    torch.testing.assert_close(torch.tensor(sampling.logprobs)[:, 0], expected.log()[tokens])


STEP = {"num_steps": 1, "rollouts_every": 1, "test_data": "", "prompts_per_step": 12, "mini_batch_prompts": 6}
STEP |= {"group_size": 3, "max_response_tokens": 6, "temperature": 1.6, "max_tokens_per_gpu": 100}
STEP |= {"learning_rate": 0.01, "weight_decay": 0.5, "max_grad_norm": 0.05, "max_logprob_gap": 100}


def test_a_step_is_what_it_says(toy, tmp_path):
    """Recompute rewards and advantages from the written rollouts, then metrics and weights with a fresh model."""
    arguments = toy_arguments(toy, tmp_path, **STEP)
    assert oisd.main(arguments) == 0
    rows = read_lines(tmp_path / "rollouts" / "step_000001.jsonl")
    training = read_lines(toy / "train.jsonl")
    for index, row in enumerate(rows):
        problem = training[row["row"]]
        _, box, rest = row["response"].rpartition("\\boxed{")
        answer, closed, _ = rest.partition("}")
        assert row["row"] == rows[index // 3 * 3]["row"]  # a group is of one problem
        assert row["prompt"] == f"<user>{problem['question']}<assistant>"
        assert row["reward"] == bool(box and closed and answer == problem["answer"]), row
        assert row["finish_reason"] == ("stop" if row["response"].endswith("<eos>") else "length")
    groups = torch.tensor([row["reward"] for row in rows]).view(12, 3)
    advantages = oisd.group_advantages(groups.flatten(), 3)
    assert [row["advantage"] for row in rows] == pytest.approx(advantages.tolist())

    _, config = oisd.load_config(arguments)
    model, _ = oisd.load_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    run = run_of(model, config, optimizer)
    tokenizer = AutoTokenizer.from_pretrained(toy)
    rollouts = []
    for row in rows:
        prompt, response = (tokenizer(row[part]).input_ids for part in ("prompt", "response"))
        rollouts.append(oisd.Rollout(prompt, response, [0.0] * row["tokens"], "stop", advantage=row["advantage"]))
    oisd.set_old_logprobs(run, rollouts)
    expected = oisd.update_policy(run, rollouts)
    expected |= {
        "step": 1,
        "reward": groups.mean().item(),
        "response_length": fmean(row["tokens"] for row in rows),
        "truncated_fraction": fmean(row["finish_reason"] == "length" for row in rows),
        "zero_std_fraction": fmean(len(set(group)) == 1 for group in groups.tolist()),
        "sampler_logprob_gap": 0,
        "grader_failures": 0,
    }
    (metrics,) = read_metrics(tmp_path)
    assert metrics.pop("moved_weights") > 0.5
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in load_file(tmp_path / "final" / "model.safetensors").items():
        # AdamW moves by about learning_rate, whatever the gradient's size
        far = (tensor - model.state_dict()[name]).abs() > 0.02 * config.learning_rate
        assert far.float().mean() < 1e-3, name  # where a gradient is nearly 0, float32 may miss its sign
    assert 0 < expected["truncated_fraction"] < 0.5 and expected["clip_fraction"] > 0  # else the test says little


TEMPLATE = (
    "{% for m in messages %}{{ {'system': 0, 'user': 1}[m.role] }}={{ m.content }},{% endfor %}"
    "{{ 8 if enable_thinking else 9 }}{{ '+' if add_generation_prompt }}"
)
OWN = [{"role": "system", "content": "7"}, {"role": "user", "content": "2+1"}]


def test_prompts_have_the_system_message_and_thinking_flag(toy, tmp_path):
    """The configured system message gives way to one of the data."""
    data = write_lines(tmp_path / "data.jsonl", [{"question": question, "answer": "1"} for question in ("0+1", OWN)])
    changes = {"chat_template": TEMPLATE, "train_data": data, "system_prompt": "4", "thinking": "true"}
    _, config = oisd.load_config(toy_arguments(toy, "unused", **changes))
    tokenizer = problems.load_tokenizer(config.model, config.chat_template)
    loaded, _ = oisd.load_problems(config.train_data, tokenizer, config)
    expected = ["0=4,1=0+1,8+", "0=7,1=2+1,8+"]
    assert [problem.prompt_ids for problem in loaded] == [tokenizer(text).input_ids for text in expected]


def test_what_a_run_draws_scores_and_leaves(toy, tmp_path, capsys):
    """Keep the weights still: every step draws other responses, every evaluation the same, each at its interval."""
    run = tmp_path / "run"
    rows = [{"question": "0+1", "answer": "1"}, {"question": "1+1+1", "answer": "3"}]
    data = write_lines(tmp_path / "train.jsonl", rows)
    steps = {"num_steps": 5, "rollouts_every": 2, "eval_every": 2, "eval_problems": 3, "eval_samples": 40}
    small = {"prompts_per_step": 1, "mini_batch_prompts": 1, "learning_rate": 1e-9, "max_prompt_tokens": 5}
    assert oisd.main(toy_arguments(toy, run, train_data=data, **steps, **small)) == 0
    assert "1 training problems, 1 too long; 3 held out, 0 too long" in capsys.readouterr().out
    paths = sorted((run / "rollouts").iterdir())
    assert [path.name for path in paths] == ["step_000002.jsonl", "step_000004.jsonl"]
    second, fourth = ([row["response"] for row in read_lines(path)] for path in paths)
    assert second != fourth
    assert len(set(second)) > 1
    scores = json.loads((run / "held_out.json").read_text())
    assert list(scores) == ["0", "2", "4", "5"]
    assert all(score == scores["0"] for score in scores.values())
    assert 0 < scores["0"]["accuracy"] < 1 and (scores["0"]["problems"], scores["0"]["samples"]) == (3, 40)
    assert (run / "curves.png").stat().st_size > 10_000


def test_several_end_tokens_and_a_bfloat16_export(toy, tmp_path):
    """Start from bfloat16 files with a second end token, spread their weights, and export their like."""
    source, run = tmp_path / "model", tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(toy).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(toy)
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("}")]
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    changes = {"num_steps": 1, "rollouts_every": 1, "learning_rate": 1e-9, "test_data": "", "model": source}
    assert oisd.main(toy_arguments(toy, run, **changes, dtype="bfloat16", spread_weights="true")) == 0
    rows = read_lines(run / "rollouts" / "step_000001.jsonl")
    assert all(row["response"].endswith(("}", "<eos>")) == (row["finish_reason"] == "stop") for row in rows)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((run / "final" / name).read_text()) == json.loads((source / name).read_text())
    stored = load_file(run / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    differing = [(stored[name] != tensor).flatten() for name, tensor in load_file(source / "model.safetensors").items()]
    assert torch.cat(differing).float().mean() < 1e-3  # spread weights still look like the published ones


def test_spread_weights_move_as_much_as_the_float32_ones():
    """Rounded to bfloat16 nothing changes at first. A step of 0.1 cells then moves a tenth of the weights by one."""
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weight[0, :2] = torch.tensor([0.0, 0.1])  # these stay: zero, and what is not in the middle of a cell
    model = torch.nn.Linear(50, 50, bias=False)
    model.weight.data = weight.clone()
    start = models.bfloat16_images(model)
    models.spread_weights(model, seed=0)
    assert models.moved_weights(model, start) == 0
    assert torch.equal(model.weight[0, :2], weight[0, :2])
    cell = (weight.abs().view(torch.int32) + 2**16).view(torch.float32) - weight.abs()
    cells = ((model.weight + 0.1 * cell).bfloat16().float() - weight) / cell
    for part in (weight > 0, weight < 0):  # away from zero, and toward it
        assert cells[part].mean().item() == pytest.approx(0.1, rel=0.25)


def test_a_model_learns(toy, tmp_path):
    """From a third to nearly all correct, where every sum is 2."""
    data = write_lines(tmp_path / "twos.jsonl", [{"question": f"{a}+{2 - a}", "answer": "2"} for a in range(3)] * 8)
    changes = {"train_data": data, "test_data": data, "num_steps": 12, "eval_samples": 8}
    assert oisd.main(toy_arguments(toy, tmp_path / "run", **changes)) == 0
    scores = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert scores["0"]["accuracy"] < 0.5 and scores["12"]["accuracy"] > 0.8, scores


def test_only_a_later_signal_quits_at_once(monkeypatch):
    """A launcher forwards Ctrl-C to processes that already got it, so one within a second changes nothing."""
    quits = []
    monkeypatch.setattr(processes.os, "_exit", quits.append)
    with processes.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not quits
        signals.since -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert quits == [128 + signal.SIGTERM]


ROLLOUTS = ({"system_prompt": 'Zwölf "🙂"\n\\boxed{}'}, signal.SIGTERM, (problems, "step_problems"), "step_000002")
UPDATES = ({"lora_rank": 4}, signal.SIGINT, (run_folder, "rollout_metrics"), "step_000003")


@pytest.mark.parametrize("changes,number,place,saved", [ROLLOUTS, UPDATES], ids=["all weights", "adapters"])
def test_resumed_is_uninterrupted(toy, tmp_path, monkeypatch, capsys, changes, number, place, saved):
    """Stop before or after the updates of step 3 and resume: all numbers equal those of one run, bit for bit.

    Output of steps after the newest complete checkpoint, and lines that a crash has cut short, are moved aside.
    """
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert oisd.main(toy_arguments(toy, whole, eval_every=1, **changes)) == 0
    call = getattr(*place)
    calls = itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return call(*arguments)

    monkeypatch.setattr(*place, interrupted)
    assert oisd.main(toy_arguments(toy, parted, checkpoint_every=0, eval_every=1, **changes)) == 128 + number
    assert f"{saved} is complete; continue with: python oisd.py --resume {parted}" in capsys.readouterr().err
    (parted / "checkpoints" / "step_000009.part").mkdir()
    (parted / "rollouts" / "step_000009.jsonl").touch()
    with (parted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9}\n{"step": 10, "rew')
    settings = (parted / "config.toml").read_text()
    assert oisd.main(["--resume", str(parted)]) == 0
    assert (parted / "config.toml").read_text() == settings  # read and written again
    assert (parted / "checkpoints" / "step_000004").exists()  # the last step's, whatever checkpoint_every
    assert (parted / "abandoned" / "metrics.jsonl").read_text() == '{"step": 9}\n{"step": 10, "rew\n'
    assert (parted / "abandoned" / "step_000009.jsonl").exists()
    assert len(read_metrics(whole)) == 4 and read_metrics(parted) == read_metrics(whole)
    assert (parted / "held_out.json").read_text() == (whole / "held_out.json").read_text()
    folders = toy, whole / "final", parted / "final"
    start, one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = [name for name in start if not torch.equal(start[name], one[name])]
    linear = [name for name in start if ".layers." in name and start[name].ndim == 2]
    assert changed == (linear if "lora_rank" in changes else list(start))


def test_what_would_change_results_is_refused(toy, tmp_path, capsys):
    run = tmp_path / "run"
    data = write_lines(tmp_path / "train.jsonl", read_lines(toy / "train.jsonl"))
    assert oisd.main(toy_arguments(toy, run, num_steps=1, train_data=data)) == 0
    assert oisd.main(toy_arguments(toy, run)) == 2
    assert "holds a run; continue it by --resume" in capsys.readouterr().err
    changes = {"model": "other", "seed": 7, "student_layer": 2, "think_weight": 0.0, "attention_weight": 0.0}
    changes |= {"internal_mean": "token", "temperature": 0.5, "learning_rate": 0.1, "dtype": "bfloat16"}
    for name, value in changes.items():
        assert oisd.main(["--resume", str(run), f"--{name}={value}"]) == 2
        assert f"--resume: {name} = {value!r}, but the run in" in capsys.readouterr().err
    assert set(oisd.FREE_ON_RESUME) <= set(oisd.Config.__dataclass_fields__)
    write_lines(data, read_lines(data)[:4])
    assert oisd.main(["--resume", str(run), "--num_steps=2", "--max_tokens_per_gpu=99", "--checkpoint_every=1"]) == 2
    shown = capsys.readouterr().err
    assert f"what {run} started with has changed: train_data is 4 problems" in shown and "was 7 problems" in shown


@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_wrong_weights_in_the_sampler_stop_the_run(toy, tmp_path, monkeypatch, capsys, factor):
    """Stop before they update anything, so that a checkpoint can be saved. A gap of NaN is too large as well."""
    other, _ = oisd.load_model(oisd.load_config(toy_arguments(toy, tmp_path))[1])
    with torch.no_grad():
        other.model.norm.weight.mul_(factor)
    served = itertools.chain([None], itertools.repeat(other))
    monkeypatch.setattr(HfSampler, "sync", lambda self, model: setattr(self, "model", next(served) or self.model))
    assert oisd.main(toy_arguments(toy, tmp_path / "run", test_data="")) == 1
    shown = capsys.readouterr().err
    assert "stopped after step 1: log-probs of sampler and trainer differ" in shown
    assert "the weights did not reach the sampler" in shown and "step_000001 is complete" in shown


@pytest.mark.parametrize("bad,kept", [(3, "step_000001 is complete"), (4, "no checkpoint yet")])
def test_a_gradient_that_is_nan_stops_the_run(toy, tmp_path, monkeypatch, capsys, bad, kept):
    """It updates nothing. Weights in the middle of a step are not saved."""
    calls = itertools.count(1)
    adamw = torch.optim.AdamW

    def watched(groups, **settings):
        groups[0]["params"][0].register_hook(lambda gradient: gradient * (torch.nan if next(calls) == bad else 1))
        return adamw(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    assert oisd.main(toy_arguments(toy, tmp_path / "run", test_data="", checkpoint_every=0)) == 1
    assert f"stopped after step 1: the gradient norm is nan; {kept}" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_full_disk_costs_only_the_checkpoint(toy, tmp_path, monkeypatch, capsys):
    """No file may exceed 300 kB, so the checkpoint of step 4 fails: no half of it is left, and step 2 is intact."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
        assert oisd.main(toy_arguments(toy, run)) == 2 and not run.exists()  # it was noticed before the first step
    assert oisd.main(toy_arguments(toy, run, num_steps=2)) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        assert oisd.main(["--resume", str(run), "--num_steps", "4"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().err
    assert "the checkpoint of step 4 was not written" in shown and "step_000002 is complete" in shown
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]


def test_two_runs_never_share_a_folder(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened = [run_folder.open_folder("toy", "", False) for _ in range(2)]
    assert [str(folder) for folder, _ in opened] == ["runs/toy", "runs/toy-2"]
    assert oisd.main(toy_arguments(toy, "runs/toy")) == 2
    assert "another process is working in" in capsys.readouterr().err


def test_vllm_takes_what_the_fullest_gpu_has_left(monkeypatch):
    """Of 80 GB, 1 is in use and 1.5 are reserved. Two billion weights take 12 bytes each."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79e9, 80e9))
    device = torch.device("cuda", 0)
    model = torch.nn.Linear(1000, 2_000_000, bias=False, device="meta")
    assert processes.vllm_share(device, model) == 0.66  # (79 - 1.5 - 2 x 12) / 80
    with pytest.raises(UserError, match="leave vLLM nothing"):
        processes.vllm_share(device, torch.nn.Linear(1000, 6_500_000, device="meta"))
    monkeypatch.setattr(processes, "gather", lambda mine: [*mine, 0.61])  # another rank's
    assert processes.vllm_share(device, model) == 0.61


def test_js_is_averaged_by_sign_of_the_advantage():
    sums = oisd.by_sign("js", torch.tensor([0.1, 0.2, 0.6, 0.5]), torch.tensor([1.0, -2.0, -0.5, 0.0]))
    means = {name: float(total / count) for name, (total, count) in sums.items()}
    assert means == pytest.approx({"js": 0.35, "js_positive": 0.1, "js_negative": 0.4})
