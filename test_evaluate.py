"""`pytest test_evaluate.py`: on a CPU, in about a minute, why the scores can be believed.

In order: estimates against brute force and the textbook; the folder; the whole program with a model that answers sums
with a random digit. Golds, tricky pairs and hostile answers are test_oisd.py's, beside the grader.
"""

import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import evaluate
import oisd
from test_oisd import PAPER_DATA, ROOT, make_toy
from tools.grader import Grader

# ---------------------------------------------------------------------------------------------------------------------
# Estimates
# ---------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets))), (n, c, k)


def test_pass_at_k_grows_with_k_and_starts_at_the_average():
    for n, c in ((7, 3), (300, 1), (300, 150), (300, 300), (64, 0)):
        values = [evaluate.pass_at_k(n, c, k) for k in range(1, n + 1)]
        assert values == sorted(values) and values[0] == c / n and values[-1] == (c > 0)


def test_pass_at_k_is_exact_for_huge_n():
    for n, c, k in ((5000, 1, 2500), (5000, 3, 4096), (10**4, 5000, 64), (4000, 7, 1)):
        assert evaluate.pass_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    assert 0 < evaluate.pass_at_k(10**5, 1, 1) == 1e-5


@pytest.mark.parametrize("n,c,k", [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match="k must be 1 to n"):
        evaluate.pass_at_k(n, c, k)


@pytest.mark.parametrize("n,k", [(2, 1), (6, 1), (6, 2), (6, 3), (8, 3)])
def test_sampling_variance_is_unbiased(n, k):
    """For any chance p of a right answer, its mean over all outcomes is the variance of the estimator, exactly."""
    for p in (Fraction(1, 7), Fraction(1, 2), Fraction(9, 10)):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        values = [Fraction(evaluate.pass_at_k(n, c, k)).limit_denominator(10**4) for c in range(n + 1)]
        variance = sum(w * v**2 for w, v in zip(chance, values)) - (1 - (1 - p) ** k) ** 2
        estimated = sum(w * Fraction(evaluate.pass_variance(n, c, k)) for c, w in enumerate(chance))
        assert float(estimated) == pytest.approx(float(variance), rel=1e-12)
    assert evaluate.pass_variance(n, 1, n) is None  # nothing to learn it from
    share = Fraction(1, n)
    assert evaluate.pass_variance(n, 1, 1) == pytest.approx(float(share * (1 - share) / (n - 1)), rel=1e-14)


def rows_of(rights, answers=None, **changes):
    answers = answers or ["7" if right else "8" for right in rights]
    row = {"finish": "stop", "tokens": 10} | changes
    return [row | {"right": right, "answer": answer} for right, answer in zip(rights, answers)]


def test_errors_are_the_textbooks():
    """Three problems with 4, 2 and 1 of 4 right: shares 1, 1/2, 1/4, mean 7/12."""
    problems = [rows_of([1, 1, 1, 1]), rows_of([1, 0, 1, 0]), rows_of([0, 0, 0, 1])]
    classes = [[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 2, 0]]
    result = evaluate.score(problems, classes, 4, [1, 2, 4])
    deviations = [1 - 7 / 12, 1 / 2 - 7 / 12, 1 / 4 - 7 / 12]
    assert result["avg"]["value"] == pytest.approx(7 / 12)
    assert result["avg"]["se"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 2 / 3))
    binomial = [0, 0.5 * 0.5 / 3, 0.25 * 0.75 / 3]  # p (1-p) / (n-1)
    assert result["avg"]["sampling_se"] == pytest.approx(math.sqrt(sum(binomial)) / 3)
    assert result["pass"]["1"] == result["avg"]
    assert result["pass"]["2"]["value"] == pytest.approx((1 + 5 / 6 + 1 / 2) / 3)
    assert result["pass"]["4"] == {"value": 1.0, "se": 0.0, "sampling_se": None}
    assert result["maj"]["value"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert result["problems"] == [[4, 4, 1.0], [2, 2, 0.5], [1, 1, 0.0]]


def test_avg_and_maj_are_over_the_first_samples_and_pass_over_all():
    result = evaluate.score([rows_of([1, 0, 0, 0]), rows_of([0, 0, 1, 1])], [[0, 1], [1, 1]], 2, [1])
    assert (result["avg"]["value"], result["pass"]["1"]["value"], result["n"], result["K"]) == (0.25, 3 / 8, 4, 2)


def test_figures_beside_the_scores():
    rows = rows_of([1, 0, 0], ["7", None, "8"])
    rows[0]["finish"], rows[2]["tokens"] = "length", 100
    result = evaluate.score([rows], [[0, None, 1]], 3, [1])
    assert result["truncated"] == result["no_box"] == pytest.approx(1 / 3)
    assert (result["right_if_finished"], result["mean_tokens"], result["p95_tokens"]) == (0, 40, 100)
    assert result["avg"]["se"] is None  # of one problem
    assert evaluate.score([rows_of([1], finish="length")], [[0]], 1, [1])["right_if_finished"] is None


def test_majority():
    assert evaluate.majority([0, 0, 1]) == 1 and evaluate.majority([0, 1, 1]) == 0
    assert evaluate.majority([0, 1]) == 0.5 and evaluate.majority([0, 1, 2, 3]) == 0.25
    assert evaluate.majority([None, None, None, 0]) == 1 and evaluate.majority([None, None]) == 0
    assert evaluate.majority_variance([0, 0, 0]) == 0 and evaluate.majority_variance([0]) is None
    assert 0.1 < evaluate.majority_variance([0, 1, 1]) < 0.25


def test_classes_are_by_the_grader_not_by_string():
    answers = ["0.5", r"\frac{2}{4}", "3", "3.0", "03", "4", None, r"\frac12", r"x+1", r"1+x"]
    rows = [{"gold": r"\frac12", "response": "-" if a is None else rf"\boxed{{{a}}}"} for a in answers]
    with Grader(workers=2) as grader:
        evaluate.grade([rows], grader)
        assert evaluate.answer_classes(rows, grader) == [0, 0, 1, 1, 1, 2, None, 0, 3, 3]
    assert [row["answer"] for row in rows] == answers


def test_macro_average_weighs_benchmarks_equally():
    one, other = {"value": 0.2, "se": 0.03, "sampling_se": 0.01}, {"value": 0.6, "se": 0.04, "sampling_se": None}
    assert evaluate.macro([one, other]) == {"value": 0.4, "se": pytest.approx(0.025), "sampling_se": None}


def test_t_quantiles_are_the_tables():
    for freedom, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (29, 2.0452), (499, 1.9647)):
        assert evaluate.t_quantile(freedom) == pytest.approx(value, rel=3e-4)


def test_intervals_cover():
    """Of 2,000 draws of 8 normal differences, 95 % of the intervals hold the true mean."""
    generator, inside, reach = random.Random(0), 0, evaluate.t_quantile(7)
    for _ in range(2000):
        values = [generator.gauss(0.1, 0.3) for _ in range(8)]
        inside += abs(statistics.fmean(values) - 0.1) < reach * evaluate.standard_error(values)
    assert 0.935 < inside / 2000 < 0.965


def test_ks():
    assert evaluate.parse_ks("1,2,4,...,256", 300) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert evaluate.parse_ks("1,...,6,12", 12) == [1, 2, 4, 6, 12] and evaluate.parse_ks(None, 12) == [1, 2, 4, 8]
    for words in ("0", "2,1", "1,...", "...,4", "1,x", "", "1,,2"):
        with pytest.raises(oisd.UserError, match="ascending numbers"):
            evaluate.parse_ks(words, 8)


# ---------------------------------------------------------------------------------------------------------------------
# The whole program
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder, tied=True)
    return folder


def words(toy, folder, **changes):
    fields = {"model": toy, "benchmarks": f"sums={toy / 'train.jsonl'}", "output_dir": folder, "n": 6} | changes
    fields = {"sampler": "hf", "dtype": "float32", "max_response_tokens": 8, "sampler_batch": 10} | fields
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert evaluate.main(words(toy, folder)) == 0
    return folder


def same(folder, whole):
    """The same samples to the byte, and the same figures."""
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    results = [json.loads((path / "summary.json").read_text())["benchmarks"] for path in (folder, whole)]
    assert results[0] == results[1]
    return True


def test_what_an_evaluation_leaves(toy, whole, tmp_path, capsys):
    assert evaluate.main(words(toy, tmp_path / "run")) == 0 and same(tmp_path / "run", whole)
    shown = capsys.readouterr().out
    assert "<user>0+1<assistant>" in shown and "| Pass@4" in shown and "sums Avg@6" in shown
    left = {path.name for path in whole.iterdir()}
    assert left == {"lock", "pass_at_k.png", "samples.jsonl", "settings.json", "summary.json", "table.md"}
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(f"sums/{p}", s) for p in range(7) for s in range(6)]
    assert all(row["right"] == (row["response"] == f"\\boxed{{{row['gold']}}}") for row in rows)
    assert {row["right"] for row in rows} == {True, False} and len({row["seed"] for row in rows}) == len(rows)
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["first_prompt"] == "<user>0+1<assistant>" and settings["data"]["sums"]["rows"] == 7
    assert {"oisd", "torch", "transformers", "math-verify"} <= settings["versions"].keys()
    summary = json.loads((whole / "summary.json").read_text())["benchmarks"]["sums"]
    assert summary["avg"]["value"] == sum(row["right"] for row in rows) / len(rows)
    assert list(summary["pass"]) == ["1", "2", "4"] and summary["truncated"] == 0


# Slow enough to be hit: a sampler that pauses before each batch, a grader before each call.
SLOW = """
import sys, time, evaluate, oisd
def slowed(function, seconds):
    return lambda *a: (time.sleep(seconds), function(*a))[1]
oisd.HfSampler._generate_batch = slowed(oisd.HfSampler._generate_batch, float(sys.argv[1]))
evaluate.grade = slowed(evaluate.grade, float(sys.argv[2]))
sys.exit(evaluate.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("phase,number", [("generating", 9), ("grading", 9), ("generating", 2)])
def test_killed_and_resumed_is_uninterrupted(toy, whole, tmp_path, phase, number):
    """kill -9 and Ctrl-C, while responses are generated and while they are graded."""
    folder, pauses = tmp_path / "run", {"generating": ("1", "0"), "grading": ("0", "60")}[phase]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *pauses, *words(toy, folder)], stderr=-1, cwd=ROOT, text=True
    )
    wanted, path, deadline = {"generating": 20, "grading": 42}[phase], folder / "samples-0.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < wanted:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    shown = process.communicate(timeout=30)[1]
    assert process.returncode == (-9 if number == 9 else 130)
    assert number == 9 or ("what is generated" in shown and "Traceback" not in shown)
    drawn = len(path.read_bytes().splitlines())
    assert 20 <= drawn < 42 if phase == "generating" else drawn == 42
    assert evaluate.main(words(toy, folder)) == 0 and same(folder, whole)


def test_only_what_is_missing_is_drawn(toy, whole, tmp_path, monkeypatch):
    """More samples, more problems, fewer: the folder grows, and seeds do not depend on how many were asked for."""
    folder, drawn = tmp_path / "run", []
    stream = oisd.HfSampler.stream
    monkeypatch.setattr(oisd.HfSampler, "stream", lambda self, p, s: drawn.extend(s) or stream(self, p, s))
    for changes in ({"n": 2, "limit": 3}, {"n": 4, "limit": 3}, {}, {}):
        assert evaluate.main(words(toy, folder, **changes)) == 0
    assert same(folder, whole) and len(drawn) == len(set(drawn)) == 42
    assert evaluate.main(words(toy, folder, n=2)) == 0 and len(drawn) == 42
    assert json.loads((folder / "summary.json").read_text())["benchmarks"]["sums"]["n"] == 2


@pytest.mark.parametrize("launcher", ["torch.distributed.run --nproc_per_node 2", "none"])
def test_two_processes_are_one(toy, whole, tmp_path, launcher):
    folder = tmp_path / "run"
    if launcher == "none":  # a folder of three processes, cut off, goes on with one
        lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
        folder.mkdir()
        (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
        for rank in range(3):
            (folder / f"samples-{rank}.jsonl").write_bytes(b"".join(lines[rank:30:3]))
        assert evaluate.main(words(toy, folder)) == 0 and same(folder, whole)
        return
    command = [sys.executable, "-m", *launcher.split(), str(ROOT / "evaluate.py"), *words(toy, folder)]
    command = [word.replace("--n=", "--samples=") for word in command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(folder, whole)


def test_truncated_and_foreign_lines_are_kept_aside_and_drawn_again(toy, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    foreign = json.loads(lines[3]) | {"run": "0123456789ab"}
    seed = json.loads(lines[4]) | {"seed": 1}
    bad = [
        json.dumps(foreign) + "\n",
        json.dumps(seed) + "\n",
        '{"id": "sums/0"}\n',
        "[1]\n",
        "\x00\x00\n",
        lines[9][:50],
    ]
    (folder / "samples-0.jsonl").write_text("".join([*lines[:3], *bad]))
    assert evaluate.main(words(toy, folder)) == 0 and same(folder, whole)
    shown = capsys.readouterr().out
    for line, wrong in (
        (4, "another run"),
        (5, "another run"),
        (6, "no sample"),
        (7, "no sample"),
        (8, "JSON"),
        (9, "cut off"),
    ):
        assert any(f"samples-0.jsonl line {line} " in text and wrong in text for text in shown.splitlines())
    assert (folder / "rejected.jsonl").read_text() == "".join(bad) + "\n"


def test_another_run_is_refused_and_says_what_differs(toy, whole, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    other = tmp_path / "other"
    make_toy(other, tied=False)
    copy = tmp_path / "sums.jsonl"
    copy.write_text((toy / "train.jsonl").read_text().replace('"1"', '"2"', 1))
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    for changes, message in (
        ({"temperature": 0.7}, "sampling.temperature is 0.7, there 1.0"),
        ({"seed": 1}, "sampling.seed is 1, there 0"),
        ({"thinking": True}, "sampling.thinking is True"),
        ({"max_response_tokens": 9}, "sampling.max_response_tokens is 9"),
        ({"model": other}, "model.model.safetensors is"),
        ({"chat_template": template}, "template.sha256 is"),
        ({"benchmarks": f"sums={copy}"}, "data.sums is"),
    ):
        assert evaluate.main(words(toy, whole, **changes)) == 2
        error = capsys.readouterr().err
        assert (
            "holds other samples" in error and message in error and error.splitlines()[-1].startswith("evaluate: error")
        )
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


BAD_INPUTS = [
    ({"model": "nowhere"}, "nowhere"),
    ({"benchmarks": "amc32"}, "did you mean 'amc23'"),
    ({"benchmarks": "amc23,amc23"}, "twice"),
    ({"benchmarks": "amc23=nowhere.parquet"}, "no file 'nowhere.parquet'"),
    ({"benchmarks": "amc23={toy}/train.jsonl"}, "another file"),
    ({"benchmarks": "nowhere.jsonl"}, "no such file"),
    ({"answer_field": "anser"}, "did you mean 'answer'"),
    ({"n": 0}, "at least 1"),
    ({"n": "many"}, "invalid int"),
    ({"k": "1,2,8"}, "Pass@8 needs 8 samples of each problem, not 6"),
    ({"temperature": 0}, "add --n 1"),
    ({"temperature": -1}, "more than 0"),
    ({"temperature": "hot"}, "it takes float"),
    ({"limit": -3}, "at least 1"),
    ({"sampler": "vlm"}, "did you mean 'vllm'"),
    ({"temprature": 1}, "did you mean '--temperature'"),
    ({"max_response_tokens": 4096}, "exceed the 128 positions"),
    ({"grade_only": "nowhere"}, "takes the folder of an evaluation"),
    ({"compare": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize("changes,message", BAD_INPUTS, ids=[str(changes) for changes, _ in BAD_INPUTS])
def test_bad_input_gets_one_line(changes, message, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes = {name: str(value).format(toy=toy) for name, value in changes.items()}
    assert evaluate.main(words(toy, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: error: ") and error.count("\n") == 1 and message in error


def test_a_gold_that_cannot_be_parsed_is_named(toy, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "\\\\boxed{"}\n')
    assert evaluate.main(words(toy, tmp_path / "run", benchmarks=f"bad={data}")) == 2
    assert "in row 1 does not equal itself" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(toy, whole, tmp_path):
    folder = tmp_path / "run"
    full = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *words(toy, folder)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),  # of any file, in bytes
    )
    assert full.returncode == 2 and full.stderr.splitlines()[-1].startswith("evaluate: error: ")
    assert "Traceback" not in full.stderr and (folder / "samples-0.jsonl").stat().st_size > 2000
    assert evaluate.main(words(toy, folder)) == 0 and same(folder, whole)


def test_two_evaluations_do_not_share_a_folder(toy, whole, capsys):
    with evaluate.locked(whole):
        assert evaluate.main(words(toy, whole)) == 2
    assert "another evaluation is writing there" in capsys.readouterr().err


def test_greedy_is_one_sample_without_chance(toy, tmp_path):
    for seed in (0, 1):
        assert evaluate.main(words(toy, tmp_path / str(seed), temperature=0, n=1, seed=seed)) == 0
    rows = [[json.loads(line)["response"] for line in (tmp_path / s / "samples.jsonl").open()] for s in "01"]
    assert rows[0] == rows[1] and len(set(rows[0])) < 3


def test_grading_again(toy, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    rows = [json.loads(line) | {"right": None} for line in (whole / "samples.jsonl").open()]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.main(["--grade_only", str(folder)]) == 0 and same(folder, whole)
    assert evaluate.main(["--grade_only", str(folder), "--n=3", "--k=1,3", "--limit=4"]) == 0
    result = json.loads((folder / "summary.json").read_text())["benchmarks"]["sums"]
    assert (len(result["problems"]), result["n"], list(result["pass"])) == (4, 3, ["1", "3"])
    assert evaluate.main(["--grade_only", str(folder), "--n=7"]) == 2
    assert "7 samples are missing" in capsys.readouterr().err


def test_compare_is_paired_by_problem(toy, whole, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    assert evaluate.main(words(toy, other, seed=5)) == 0
    capsys.readouterr()
    assert evaluate.main(["--compare", str(whole), str(other), "--output_dir", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    a, b = (
        [e[1] / 6 for e in json.loads((f / "summary.json").read_text())["benchmarks"]["sums"]["problems"]]
        for f in (whole, other)
    )
    values = [y - x for x, y in zip(a, b)]
    mean, reach = statistics.fmean(values), 2.4469 * statistics.stdev(values) / math.sqrt(7)  # t of 6 degrees
    assert f"{100 * mean:+.2f} [{100 * (mean - reach):+.2f}, {100 * (mean + reach):+.2f}]" in shown
    assert "sampling.seed is 5, there 0" in shown and (tmp_path / "both" / "pass_at_k.png").stat().st_size > 5000
    assert evaluate.main(words(toy, other, seed=5, limit=3)) == 0
    assert evaluate.main(["--compare", str(whole), str(other)]) == 2
    assert "not the same problems" in capsys.readouterr().err


@pytest.mark.skipif(not PAPER_DATA.exists(), reason="the paper's data sets are not part of the repository")
def test_the_built_in_benchmarks_are_the_known_files():
    files = {"amc23": "amc2023", "math500": "math500", "aime24": "aime_2024", "aime25": "aime_2025"}
    sources = ",".join(f"{name}={PAPER_DATA / file}.parquet" for name, file in files.items())
    found = evaluate.find_benchmarks(sources, oisd.Config())
    assert [(b.name, b.samples, b.rows) for b in found] == [
        ("amc23", 16, 40), ("math500", 16, 500), ("aime24", 32, 30), ("aime25", 32, 30)
    ]  # fmt: skip
    for benchmark in found:
        assert Path(evaluate.fetch(benchmark)).exists()
        assert len(oisd.read_dataset(benchmark.source)) == benchmark.rows
