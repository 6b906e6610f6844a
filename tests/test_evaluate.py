"""Why the scores can be believed: exact estimates, and samples that no interruption changes."""

import itertools
import json
import math
import os
import shutil
from statistics import fmean

import evaluate
import oisd
import pytest
from baselines import ppo
from support.hf_sampler import HfSampler

from conftest import PAPER_DATA, ROOT, launch, needs_paper_data, output_of, read_lines, toy_arguments, write_lines
from conftest import evaluation_arguments as arguments


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == sum(map(any, subsets)) / len(subsets), (n, c, k)


def test_figures_and_standard_errors_by_hand():
    """Three problems with four samples each; of the first three samples 1, 2/3 and 0 are correct."""
    row = {"finish": "stop", "tokens": 10, "answer": "7"}
    samples = [[row | {"right": right == "1"} for right in rights] for rights in ("1111", "1010", "0001")]
    scores = [evaluate.score(rows, 3, [2]) for rows in samples]
    error = math.sqrt(((4 / 9) ** 2 + (1 / 9) ** 2 + (5 / 9) ** 2) / 2 / 3)
    assert evaluate.estimate([score["Avg@K"] for score in scores]) == pytest.approx((500 / 9, 100 * error))
    assert [score["Pass@2"] for score in scores] == pytest.approx([100, 500 / 6, 50])
    assert evaluate.macro([(0.2, 0.03), (0.6, 0.04)]) == pytest.approx((0.4, 0.025))


@pytest.fixture(scope="module")
def complete(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete") / "run"
    assert evaluate.main(arguments(toy, folder)) == 0
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".jsonl", ".md")}


def test_what_an_evaluation_leaves(complete):
    rows = read_lines(complete / "samples.jsonl")
    assert [(row["row"], row["sample"]) for row in rows] == list(itertools.product(range(7), range(5)))
    assert all(row["right"] == (row["response"] == f"\\boxed{{{row['gold']}}}") for row in rows)
    assert len({row["right"] for row in rows}) == 2 and len({row["seed"] for row in rows}) == len(rows)
    figures = json.loads((complete / "summary.json").read_text())["figures"]["sums"]
    assert list(figures) == ["Avg@K", "Pass@1", "Pass@2", "Pass@4", "truncated", "no box", "tokens"]
    assert figures["Avg@K"][0] == pytest.approx(100 * fmean(row["right"] for row in rows))


def test_the_newest_run_is_evaluated_as_it_was_trained(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 2
    assert "--model is missing: a Hugging Face name or a folder; runs/ has no run" in capsys.readouterr().err
    small = {"num_steps": 1, "eval_problems": 2}
    assert oisd.main(toy_arguments(toy, "runs/old", seed=3, **small)) == 0
    assert oisd.main(toy_arguments(toy, "runs/new", seed=4, temperature=0.5, **small)) == 0
    os.utime("runs/old/final", (0, 0))
    assert evaluate.main(["--samples=2"]) == 0
    shown = capsys.readouterr().out
    assert "evaluating runs/new/final\nheld_out: 2 problems x 2 samples -> runs/new/evaluation_1\n" in shown
    assert oisd.main(["--resume=runs/new", "--num_steps=2"]) == evaluate.main(["--samples=2"]) == 0
    everything = f"--benchmarks=all={toy / 'train.jsonl'}"
    assert evaluate.main(["--samples=2", "--run=runs/old", "--temperature=2", everything]) == 0
    assert "all: 7 problems x 2 samples -> runs/old/evaluation_1\n" in capsys.readouterr().out
    for folder, seed, temperature in (("new/evaluation_2", 4, 0.5), ("old/evaluation_1", 3, 2.0)):
        held = json.loads((tmp_path / "runs" / folder / "settings.json").read_text())["held"]
        expected = {"sampler": "hf", "max_response_tokens": 8, "dtype": "float32", "seed": seed}
        assert expected | {"temperature": temperature} == {name: held[name] for name in [*expected, "temperature"]}
    assert evaluate.main(["--run=runs"]) == evaluate.main(["--run=runs/old", "--model=a"]) == 2
    shown = capsys.readouterr().err
    assert "runs is no finished run" in shown and "leave --model out" in shown


def test_a_baselines_run_is_evaluated_and_one_without_held_out_problems_is_not(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = toy_arguments(toy, "runs/ppo", num_steps=0)[2:]
    config = f"--config={ROOT}/configs.toml:tiny_ppo"
    assert oisd.main([config, *words, "--attention_weight=0"], ppo.METHOD) == 0
    assert evaluate.main(["--samples=1", "--limit=1"]) == 0
    assert oisd.main(toy_arguments(toy, "runs/alone", num_steps=0, test_data="")) == 0
    assert evaluate.main(["--run=runs/alone"]) == 2
    assert "runs/alone has no test_data: name --benchmarks NAME=SOURCE" in capsys.readouterr().err


def test_interrupted_and_resumed_is_uninterrupted(toy, complete, tmp_path, monkeypatch, capsys):
    """Refuse a second process meanwhile, and ignore the torn lines of a kill."""
    path = tmp_path / "samples-0.jsonl"
    generate = HfSampler._generate

    def interrupted(*values):
        if path.read_text():  # the first batch
            assert evaluate.main(arguments(toy, tmp_path)) == 2
            raise KeyboardInterrupt
        return generate(*values)

    monkeypatch.setattr(HfSampler, "_generate", interrupted)
    assert evaluate.main(arguments(toy, tmp_path)) == 130
    assert "error: another process" in capsys.readouterr().err
    monkeypatch.undo()
    path.write_bytes(path.read_bytes() + b'\n\x00\n{"row": "\xff')
    assert evaluate.main(arguments(toy, tmp_path)) == 0
    assert contents(tmp_path) == contents(complete)


def test_two_processes_are_one(toy, complete, tmp_path):
    output_of(launch(ROOT / "evaluate.py", *arguments(toy, tmp_path / "run")))
    assert contents(tmp_path / "run") == contents(complete)


def test_samples_of_other_settings_weights_or_data_are_not_mixed(toy, untied_toy, complete, capsys):
    for changes, message in (
        ({"temperature": 0.7}, "holds other samples: temperature is 0.7, was 1.0; name another"),
        ({"model": untied_toy}, "model.safetensors is"),
        ({"answer_field": "question"}, "data sums is 7 rows"),
    ):
        assert evaluate.main(arguments(toy, complete, **changes)) == 2
        assert message in capsys.readouterr().err


def test_stored_samples_are_graded_again(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "run")
    rows = read_lines(complete / "samples.jsonl")
    write_lines(folder / "samples.jsonl", [row | {"right": None, "answer": "?"} for row in rows])
    assert evaluate.main(["--grade_only", str(folder)]) == 0
    assert contents(folder) == contents(complete)


@needs_paper_data
def test_the_papers_data_are_the_known_problems_and_can_be_graded(toy):
    """Benchmarks have hashes; a gold that cannot be graded is refused, in the training data too."""
    files = {"amc23": "amc2023", "math500": "math500", "aime24": "aime_2024", "aime25": "aime_2025"}
    files["train"] = "deepmath-5k"
    sources = ",".join(f"{name}={PAPER_DATA / file}.parquet" for name, file in files.items())
    fields = {"question_field": "prompt", "answer_field": "reward_model.ground_truth"}
    config = evaluate.Config(model=str(toy), benchmarks=sources, **fields)
    tokenizer = evaluate.problems.load_tokenizer(str(toy), "")
    with evaluate.Grader(workers=2) as grader:
        for benchmark in evaluate.find_benchmarks(config).values():
            loaded, _ = evaluate.load_benchmark(benchmark, tokenizer, config, grader)
    assert len(loaded) == 5000  # of the training data
