"""Why the scores can be believed: estimates against brute force and the textbook; the folder; the whole program."""

import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from conftest import PAPER_DATA, ROOT, make_toy, needs_paper_data

import evaluate
import inputs
import laptop
import oisd
from grader import Grader
from settings import UserError

# ----------------------------------------------------- Estimates -----------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets))), (n, c, k)


def test_pass_at_k_is_exact_for_huge_n():
    for n, c, k in ((5000, 1, 2500), (5000, 3, 4096), (10**4, 5000, 64), (4000, 7, 1)):
        assert evaluate.pass_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    assert 0 < evaluate.pass_at_k(10**5, 1, 1) == 1e-5


@pytest.mark.parametrize("n,c,k", [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match="k must be 1 to n"):
        evaluate.pass_at_k(n, c, k)


def rows_of(rights, **changes):
    row = {"finish": "stop", "tokens": 10, "answer": "7"} | changes
    return [row | {"right": bool(right)} for right in rights]


def test_errors_are_the_textbooks():
    """Three problems with 4, 2 and 1 of 4 right: shares 1, 1/2, 1/4, mean 7/12."""
    values = evaluate.score([rows_of([1, 1, 1, 1]), rows_of([1, 0, 1, 0]), rows_of([0, 0, 0, 1])], 4, [1, 2, 4])
    deviations = [1 - 7 / 12, 1 / 2 - 7 / 12, 1 / 4 - 7 / 12]
    error = math.sqrt(sum(d * d for d in deviations) / 2 / 3)
    assert evaluate.estimate(values["Avg@K"]) == pytest.approx((700 / 12, 100 * error))
    assert values["Pass@1"] == values["Avg@K"]
    assert values["Pass@2"] == [100, pytest.approx(500 / 6), 50] and values["Pass@4"] == [100, 100, 100]
    assert evaluate.estimate([3.0])[0] == 3 and math.isnan(evaluate.estimate([3.0])[1])


def test_avg_is_over_the_first_samples_and_all_else_over_all():
    values = evaluate.score([rows_of([1, 0, 0, 0]), rows_of([0, 0, 1, 1])], 2, [1])
    assert values["Avg@K"] == [50, 0] and values["Pass@1"] == [25, 50]
    rows = rows_of([1]) + rows_of([0], finish="length", answer=None) + rows_of([0], tokens=100, answer=None)
    values = evaluate.score([rows], 1, [1])
    assert values["truncated"] == [pytest.approx(100 / 3)] and values["no box"] == [pytest.approx(200 / 3)]
    assert values["tokens"] == [40]


def test_macro_average_weighs_benchmarks_equally():
    assert evaluate.macro([(0.2, 0.03), (0.6, 0.04)]) == pytest.approx((0.4, 0.025))
    assert math.isnan(evaluate.macro([(0.2, 0.03), (0.6, math.nan)])[1])


def test_bootstrap_draws_problems_and_weighs_benchmarks_equally():
    """Two and three problems: all 4 x 27 ways to draw them again are counted, and their quantiles are the ends."""
    benchmarks = [[0.0, 1.0], [0.0, 0.25, 2.0]]
    ways = itertools.product(*(itertools.product(values, repeat=len(values)) for values in benchmarks))
    means = sorted(statistics.fmean(map(statistics.fmean, way)) for way in ways)
    mean, low, high = evaluate.bootstrap(benchmarks)
    assert mean == pytest.approx(0.625)
    assert low == pytest.approx(means[math.ceil(0.025 * 108) - 1]) and high == pytest.approx(means[-math.ceil(2.7)])
    many = [math.sin(7 * i) for i in range(400)]  # for many problems: mean ± 1.96 standard errors
    mean, low, high = evaluate.bootstrap([many])
    error = evaluate.estimate(many)[1]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.05 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.05 * error)
    assert evaluate.bootstrap([many]) == (mean, low, high)


def test_ks():
    assert evaluate.parse_ks("1,2,4,...,256", 300) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert evaluate.parse_ks("1,...,6,12", 12) == [1, 2, 4, 6, 12] and evaluate.parse_ks("", 12) == [1, 2, 4, 8]
    for words in ("0", "2,1", "1,...", "...,4", "1,x", ",", "1,,2"):
        with pytest.raises(UserError, match="ascending numbers"):
            evaluate.parse_ks(words, 8)


# ----------------------------------------------------- The whole program ---------------------------------------------


def words(toy, folder, **changes):
    fields = {"model": toy, "benchmarks": f"sums={toy / 'train.jsonl'}", "output_dir": folder, "n": 5} | changes
    fields = {"sampler": "hf", "dtype": "float32", "max_response_tokens": 8, "sampler_batch": 10} | fields
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert evaluate.main(words(toy, folder)) == 0
    return folder


def read_rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


def same(folder, whole):
    """The same samples and table to the byte, and nothing else is left."""
    for name in ("samples.jsonl", "table.md"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert read_summary(folder)["figures"] == read_summary(whole)["figures"]
    return sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_what_an_evaluation_leaves(toy, whole, tmp_path, capsys):
    assert evaluate.main(words(toy, tmp_path / "run")) == 0 and same(tmp_path / "run", whole)
    shown = capsys.readouterr().out
    assert "<user>0+1<assistant>" in shown and (whole / "table.md").read_text() in shown
    left = {path.name for path in whole.iterdir()}
    assert left == {"lock", "pass_at_k.png", "samples.jsonl", "settings.json", "summary.json", "table.md"}
    rows = read_rows(whole)
    keys = [(row["benchmark"], row["row"], row["sample"]) for row in rows]
    assert keys == [("sums", problem, sample) for problem in range(7) for sample in range(5)]
    assert all(row["right"] == (row["response"] == f"\\boxed{{{row['gold']}}}") for row in rows)
    assert {row["right"] for row in rows} == {True, False} and len({row["seed"] for row in rows}) == len(rows)
    figures = read_summary(whole)["figures"]["sums"]
    assert figures["Avg@K"][0] == pytest.approx(100 * statistics.fmean(row["right"] for row in rows))
    assert list(figures) == ["Avg@K", "Pass@1", "Pass@2", "Pass@4", "truncated", "no box", "tokens"]
    assert f"| Avg@K     | {figures['Avg@K'][0]:.2f} ± {figures['Avg@K'][1]:.2f}" in shown


SLOW = """
import sys, time, evaluate, laptop
generate = laptop.HfSampler._generate
laptop.HfSampler._generate = lambda *arguments: (time.sleep(0.5), generate(*arguments))[1]
evaluate.main(sys.argv[1:])
"""


def test_killed_and_resumed_is_uninterrupted(toy, whole, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words(toy, folder)], cwd=ROOT)
    path, deadline = folder / "samples-0.jsonl", time.monotonic() + 400
    while not path.exists() or path.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= path.read_bytes().count(b"\n") < 35
    with path.open("a") as file:
        file.write('\n{"run": "')  # the kill may have cut a line off
    assert evaluate.main(words(toy, folder)) == 0 and same(folder, whole)


@pytest.mark.parametrize("place", [laptop.HfSampler, Grader])
def test_ctrl_c_while_drawing_and_while_grading(place, toy, whole, tmp_path, monkeypatch, capsys):
    name = {laptop.HfSampler: "_generate", Grader: "grade"}[place]
    function, left = getattr(place, name), {"_generate": [1, 1], "grade": []}[name]

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        assert evaluate.main(words(toy, tmp_path / "run")) == 130
    assert "what was drawn is kept" in capsys.readouterr().err
    drawn = (tmp_path / "run" / "samples-0.jsonl").read_bytes().count(b"\n")
    assert drawn == {"_generate": 20, "grade": 35}[name]
    assert evaluate.main(words(toy, tmp_path / "run")) == 0 and same(tmp_path / "run", whole)


def test_only_what_is_missing_is_drawn(toy, whole, tmp_path, monkeypatch):
    """More samples, more problems, fewer: the folder grows, and seeds do not depend on how many were asked for."""
    folder, drawn = tmp_path / "run", []
    stream = laptop.HfSampler.stream
    monkeypatch.setattr(laptop.HfSampler, "stream", lambda self, p, s: drawn.extend(s) or stream(self, p, s))
    for changes in ({"n": 2, "limit": 3}, {"n": 4, "limit": 3}, {}, {}):
        assert evaluate.main(words(toy, folder, **changes)) == 0
    assert same(folder, whole) and len(drawn) == len(set(drawn)) == 35
    assert evaluate.main(words(toy, folder, n=2, k="1,2")) == 0 and len(drawn) == 35
    assert list(read_summary(folder)["figures"]["sums"])[:3] == ["Avg@K", "Pass@1", "Pass@2"]


def test_two_processes_are_one(toy, whole, tmp_path):
    """18 and 17 of the 35 samples."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [word.replace("--n=", "--samples=") for word in words(toy, tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "evaluate.py"), *options], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(tmp_path / "run", whole)


def test_torn_and_foreign_lines_are_left_out_and_drawn_again(toy, whole, tmp_path, capsys):
    """The files of three processes that were cut off, continued by one."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    rows = read_rows(whole)
    for rank in range(3):
        lines = [json.dumps(row) for row in rows[rank:20:3]]
        (folder / f"samples-{rank}.jsonl").write_text("".join("\n" + line for line in lines))
    foreign = json.dumps(rows[30] | {"run": "0123456789ab", "response": "", "gold": "1"})
    with (folder / "samples-0.jsonl").open("ab") as file:
        file.write(b"\n" + "\n".join([foreign, '{"id": "sums/0"}', "[1]", "\x00", lines[0][:50]]).encode() + b"\xff")
    assert evaluate.main(words(toy, folder)) == 0 and same(folder, whole)
    assert "5 lines that were cut off or belong to another run are left out" in capsys.readouterr().out


def test_another_run_is_refused_and_says_what_differs(toy, whole, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    other = tmp_path / "other"
    make_toy(other, tied=False)
    copy = tmp_path / "sums.jsonl"
    copy.write_text((toy / "train.jsonl").read_text().replace('"1"', '"2"', 1))
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    for changes, message in (
        ({"temperature": 0.7}, "holds other samples: temperature is 0.7, there 1.0; name"),
        ({"seed": 1}, "holds other samples: seed is 1, there 0; name"),
        ({"thinking": True}, "thinking is True"),
        ({"max_response_tokens": 9}, "max_response_tokens is 9"),
        ({"model": other}, "model.safetensors is"),
        ({"chat_template": template}, "chat_template is"),
        ({"benchmarks": f"sums={copy}"}, "data sums is 7 rows"),
    ):
        assert evaluate.main(words(toy, whole, **changes)) == 2
        assert message in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


BAD_INPUTS = [
    ({"model": "nowhere"}, "nowhere"),
    ({"benchmarks": "amc32"}, "did you mean 'amc23'"),
    ({"benchmarks": "amc23,amc23"}, "twice"),
    ({"benchmarks": "amc23=nowhere.parquet"}, "'nowhere.parquet': there is no such file"),
    ({"benchmarks": "mine="}, "NAME=SOURCE"),
    ({"benchmarks": "own=nowhere.jsonl"}, "no such file"),
    ({"answer_field": "anser"}, "did you mean 'answer'"),
    ({"n": 0}, "at least 1"),
    ({"n": "many"}, "invalid int value: 'many'"),
    ({"k": "1,2,8"}, "Pass@8 needs 8 samples of each problem, not 5"),
    ({"temperature": 0}, "greater than 0"),
    ({"limit": -3}, "at least 1"),
    ({"sampler": "vlm"}, "did you mean 'vllm'"),
    ({"temprature": 1}, "did you mean '--temperature'"),
    ({"max_response_tokens": 4096}, "exceed the 128 positions"),
    ({"output_dir": "{toy}/config.json/run"}, "Not a directory"),
    ({"grade_only": "nowhere"}, "No such file or directory: 'nowhere/settings.json'"),
    ({"compare": "nowhere"}, "No such file or directory: 'nowhere/summary.json'"),
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
    assert "in row 1" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_two_evaluations_do_not_share_a_folder(toy, tmp_path, capsys):
    lock = str(tmp_path / "lock")
    hold = f"import fcntl\nfile = open({lock!r}, 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint()\ninput()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert evaluate.main(words(toy, tmp_path)) == 2
        other.communicate(b"\n")
    assert "another evaluation is writing there" in capsys.readouterr().err


def test_greedy_is_one_sample_without_chance(toy, tmp_path, capsys):
    arguments = {"benchmarks": f"sums={toy / 'train.jsonl'}", "n": 1}
    for seed in (0, 1):
        assert evaluate.main([*words(toy, tmp_path / str(seed), seed=seed, **arguments), "--greedy"]) == 0
    rows = [[row["response"] for row in read_rows(tmp_path / seed)] for seed in "01"]
    assert rows[0] == rows[1] and len(rows[0]) == 7
    assert evaluate.main([*words(toy, tmp_path), "--greedy"]) == 2
    assert "5 samples would be 5 times the same" in capsys.readouterr().err


def test_grading_again(toy, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    rows = [row | {"right": None, "answer": "?"} for row in read_rows(whole)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lock").touch()
    assert evaluate.main(["--grade_only", str(folder)]) == 0 and same(folder, whole)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]))
    assert evaluate.main(["--grade_only", str(folder)]) == 2
    assert "3 samples of sums are missing" in capsys.readouterr().err


def test_compare_is_paired_by_problem(toy, whole, tmp_path, capsys):
    other = tmp_path / "other"
    assert evaluate.main(words(toy, other, seed=5)) == 0
    capsys.readouterr()
    assert evaluate.main(["--compare", str(whole), str(other), "--output_dir", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    a, b = ([[r["right"] for r in read_rows(f) if r["row"] == row] for row in range(7)] for f in (whole, other))
    mean, low, high = evaluate.bootstrap([[100 * (sum(y) - sum(x)) / 5 for x, y in zip(a, b)]])
    assert shown.count(f"| {mean:+.2f} [{low:+.2f}, {high:+.2f}]") == 2  # the benchmark and the mean of one
    assert f"{other}: seed is 5, there 0" in shown and (tmp_path / "both" / "pass_at_k.png").stat().st_size > 5000
    assert evaluate.main(words(toy, other, seed=5, limit=3)) == 0
    assert evaluate.main(["--compare", str(whole), str(other)]) == 2
    assert "not the same problems" in capsys.readouterr().err


@needs_paper_data
def test_the_built_in_benchmarks_are_the_known_problems(toy):
    """With good golds, all of them; each is refused when it is given as another."""
    files = {"amc23": "amc2023", "math500": "math500", "aime24": "aime_2024", "aime25": "aime_2025"}
    sources = {name: f"{PAPER_DATA / file}.parquet" for name, file in files.items()}
    found = evaluate.find_benchmarks(",".join(f"{name}={source}" for name, source in sources.items()), oisd.Config())
    assert {name: benchmark.samples for name, benchmark in found.items()} == dict(zip(files, (16, 16, 32, 32)))
    config = oisd.Config(model=str(toy), max_prompt_tokens=2**50, max_tokens_per_gpu=2**60)
    tokenizer = inputs.load_tokenizer(config)
    with Grader(workers=2) as grader:
        for name, count in zip(files, (40, 500, 30, 30)):
            problems, record = evaluate.load_benchmark(found[name], tokenizer, config, grader)
            assert len(problems) == count and record.startswith(f"{count} rows")
        (swapped,) = evaluate.find_benchmarks(f"aime24={sources['aime25']}", config).values()
        with pytest.raises(UserError, match="holds other problems"):
            evaluate.load_benchmark(swapped, tokenizer, config, grader)
