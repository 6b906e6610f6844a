"""Run rows x settings x seeds, each an ordinary run; collect their results in two CSV files; report on them.

    python study/sweep.py study/laptop.toml --jobs 2     the runs that are not finished yet, two at a time
    python study/sweep.py study/laptop.toml --report     tables and curves, without running anything

A spec:

    seeds = 8                          # 0 to 7
    baseline = "grpo"                  # the row that the others are compared with, seed by seed
    prepare = ["-m support.laptop runs/start/weak --slip 0.63"]    # arguments of Python, run first, in this order

    [settings.weak]                    # fields of the config that all rows share
    model = "runs/start/weak"

    [rows.grpo]                        # fields of the config, and
    config = "configs.toml:tiny_grpo"  # its table; here or in a setting also `program` and `seeds`. A setting may
                                       # name its `rows`, and as `baseline` a setting that it is compared with;
                                       # a row may name its `settings`

The same command continues an interrupted sweep: finished runs stay, one with a checkpoint resumes, another starts
again. Runs are in runs/<spec>/<setting>-<row>-<seed>, with their output beside them as .log. The CSV files beside the
spec have a line per run and a line per step. They keep the lines of deleted runs, which --missing does not repeat.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import importlib
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import run_folder
from support.settings import ROOT, UserError, one_line

RUNS = ROOT / "runs"
CURVES = {
    "reward": "reward",
    "think_js": "think JS (nats)",
    "attention_js": "attention JS (nats)",
    "entropy": "entropy of the policy (nats)",
    "student_entropy": "entropy of the student's lens (nats)",
}
LOGGED = [*CURVES, "think_loss", "attention_loss", "grad_norm", "response_length"]
LOGGED += ["sampler_logprob_gap", "moved_weights"]
OWN = {"config", "program", "seeds", "rows", "settings", "baseline"}  # keys of a spec that are no fields
FREE = set(oisd.FREE_ON_RESUME) - {"num_steps"}  # fields in which a finished run may differ from the spec


# ----------------------------------------------------- Runs ----------------------------------------------------------


@dataclass
class Planned:
    """A run of a sweep."""

    setting: str
    row: str
    seed: int
    words: list[str]  # its command: program, then options
    folder: Path

    @property
    def key(self) -> tuple[str, str, str]:
        return self.setting, self.row, str(self.seed)

    @property
    def names(self) -> set[str]:
        """The names by which --only knows it."""
        return {self.setting, self.row, self.folder.name}

    @property
    def finished(self) -> bool:
        return (self.folder / "final").exists()

    @property
    def kind(self) -> type[oisd.Config]:
        """The config class of its program."""
        program = importlib.import_module(self.words[0].removesuffix(".py").replace("/", "."))
        return getattr(program, "METHOD", oisd.Method()).config

    def check(self) -> None:
        """Check its command and, if there is a run in its folder, that it is this one. Raises: UserError."""
        _, config = oisd.load_config(self.words[1:], self.kind)
        made = self.folder / "config.toml"
        if not made.exists():
            return
        (found,) = tomllib.loads(made.read_text(encoding="utf-8")).values()
        for name, value in {"program": config.program, **dataclasses.asdict(config)}.items():
            if name not in FREE and value != "auto" and found.get(name) != value:
                raise UserError(f"{self.folder} has {name} = {found.get(name)!r}, the spec {value!r}: move it away")

    def launch(self, launcher: list[str]) -> bool:
        """Start or continue the run: -> whether it is finished."""
        if self.finished:
            return True
        words = [*self.words, "--output_dir", str(self.folder)]
        if run_folder.checkpoints(self.folder) and self.kind.resumable:
            words = [self.words[0], "--resume", str(self.folder)]
        elif self.folder.exists():
            with locked(self.folder / "lock"):  # nobody else is training in it
                shutil.rmtree(self.folder)
        with Path(f"{self.folder}.log").open("a") as log:
            call([*launcher, *words], log)
        return self.finished


RUNNING: set[subprocess.Popen] = set()


def call(command, log=None):
    """Run a command: -> exit code."""
    with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        RUNNING.add(process)
        code = process.wait()
    RUNNING.discard(process)
    return code


def stop(number, _frame):
    """Treat SIGTERM like Ctrl-C, which a terminal sends to the runs as well."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock. Raises: UserError if another process holds it, unless `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{path} is held by another process: wait for it") from None
        yield


def read_spec(path):
    """Read a spec: -> it and its runs, seed by seed, so that an interrupted sweep is balanced. Raises: UserError."""
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: {one_line(problem)}") from None
    settings, rows = spec.get("settings", {"": {}}), spec.get("rows", {})
    unknown = spec.keys() - {"seeds", "baseline", "prepare", "settings", "rows"}
    unknown |= {spec.get("baseline", "a baseline, as in: baseline = 'grpo'")} - rows.keys()
    for shared in settings.values():
        unknown |= set(shared.get("rows", ())) - rows.keys()
        unknown |= {shared["baseline"]} - settings.keys() if "baseline" in shared else set()
    for own in rows.values():
        unknown |= set(own.get("settings", ())) - settings.keys()
    if unknown:
        raise UserError(f"{path}: unknown or missing: {', '.join(sorted(unknown))}")
    runs = []
    for (setting, shared), (row, own) in itertools.product(settings.items(), rows.items()):
        if row not in shared.get("rows", rows) or setting not in own.get("settings", settings):
            continue
        both = shared | own
        seeds = min((part["seeds"] for part in (shared, own) if "seeds" in part), default=spec.get("seeds", 0))
        if "config" not in both or not isinstance(seeds, int) or seeds < 1:
            raise UserError(f"{path}: row {row} lacks its table, as in: config = 'configs.toml:tiny', or its seeds")
        fields = {name: value for name, value in both.items() if name not in OWN}
        for seed in range(seeds):
            words = [both.get("program", "oisd.py"), "--config", both["config"], "--seed", str(seed)]
            for name, value in fields.items():
                words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
            folder = RUNS / path.stem / "-".join(filter(None, (setting, row, str(seed))))
            runs.append(Planned(setting, row, seed, words, folder))
    return spec, sorted(runs, key=lambda run: run.seed)


def run_all(path, jobs, only, launcher, missing=False):
    """Run what is not finished: -> exit code. Raises: UserError."""
    spec, every = read_spec(path)
    known = {key_of(line): line["settings"] for line in read_csv(path, "runs")} if missing else {}
    if unknown := set(only) - {name for run in every for name in run.names}:
        raise UserError(f"--only: neither a row, a setting nor a run of {path}: {', '.join(sorted(unknown))}")
    runs = [run for run in every if not only or run.names & set(only)]
    runs = [run for run in runs if known.get(run.key) != " ".join(run.words)]
    if launcher == [sys.executable]:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with locked(RUNS / path.stem / "lock"), ThreadPoolExecutor(jobs) as pool:
        for run in runs:
            run.check()
        for command in spec.get("prepare", []) if not all(run.finished for run in runs) else []:
            if code := call([sys.executable, *shlex.split(command)]):
                raise UserError(f"{path}: {command!r} of prepare ended with exit code {code}")
        done = pool.map(lambda run: run.launch(launcher), runs)
        try:
            for count, (run, finished) in enumerate(zip(runs, done), start=1):
                verdict = "" if finished else f" is NOT FINISHED, see {run.folder}.log"
                print(f"{count} of {len(runs)}: {run.folder.name}{verdict}", flush=True)
                write_csv(path, [run])
        except KeyboardInterrupt:
            raise UserError("stopped; the same command continues") from None
        finally:
            pool.shutdown(cancel_futures=True)
            write_csv(path, every)
    return 0 if all(run.finished for run in runs) else 1


# ----------------------------------------------------- CSV -----------------------------------------------------------


def smoothed(values):
    """Average each value with its neighbors."""
    return [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def first_at(values, level):
    """Find the first step, from 1, whose smoothed value reaches the level."""
    return next((step for step, value in enumerate(smoothed(values), start=1) if value >= level), None)


def summarize(run):
    """Summarize a finished run: -> its line in the runs file, and its lines in the steps file."""
    metrics = run_folder.read_metrics(run.folder)
    commit = (run.folder / "config.toml").read_text().partition("\n")[0].rpartition(" ")[2]
    key = {"setting": run.setting, "row": run.row, "seed": run.seed}
    line = key | {"commit": commit, "settings": " ".join(run.words)}
    held_out = run.folder / "held_out.json"
    scores = list(json.loads(held_out.read_text()).values()) if held_out.exists() else []
    for when, index in (("before", 0), ("after", -1)):
        line[when] = scores[index]["accuracy"] if scores else None
        line[f"{when}_error"] = scores[index]["standard_error"] if scores else None

    def column(name):
        return [row[name] for row in metrics if row.get(name) is not None]

    rewards = column("reward")
    gain = statistics.fmean(rewards[-5:]) - rewards[0]
    line["area"] = statistics.fmean(rewards)
    for name, part in (("half", 0.5), ("nine_tenths", 0.9)):
        line[f"steps_to_{name}"] = first_at(rewards, rewards[0] + part * gain) if gain > 0 else None
    for name in list(CURVES)[1:]:
        values = column(name) or [None]
        line |= {f"{name}_first": values[0], f"{name}_last": values[-1]}
        line[f"{name}_peak"] = None if values == [None] else max(values)
    # The sign rule: while most answers of a group are wrong, the think loss pushes the layers apart.
    line["half_right_at"] = first_at(rewards, 0.5)
    smooth = smoothed(column("think_js"))
    line["think_js_largest_at"] = 1 + smooth.index(max(smooth)) if smooth else None
    line["moved_weights"] = metrics[-1].get("moved_weights")
    line["seconds"] = sum(row["seconds"] for row in metrics)
    return line, [dict(key, step=row["step"], **{name: row.get(name) for name in LOGGED}) for row in metrics]


def write_csv(path, runs):
    """Write the lines of those runs that are finished; all other lines stay."""
    with locked(RUNS / path.stem / "csv.lock", wait=True):  # a report may be asked for during a sweep
        tables = {"runs": {}, "steps": {}}
        for name, table in tables.items():
            for line in read_csv(path, name):
                table.setdefault(key_of(line), []).append(line)
        for run in runs:
            if not run.finished:
                continue
            try:
                run.check()
            except UserError as problem:
                print(f"left out: {problem}", file=sys.stderr)
                continue
            line, steps = summarize(run)
            tables["runs"][run.key], tables["steps"][run.key] = [line], steps
        for name, table in tables.items():
            lines = list(itertools.chain.from_iterable(table.values()))
            text = io.StringIO()
            columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))  # old lines may lack some
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            for line in lines:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
            run_folder.write_atomically(csv_path(path, name), text.getvalue())


def key_of(line):
    return line["setting"], line["row"], str(line["seed"])


def csv_path(path, name):
    return path.with_name(f"{path.stem}.{name}.csv")


def read_csv(path, name):
    """Read lines, with numbers where there are some and None where there is nothing."""

    def value_of(column, text):
        if column in ("setting", "row", "commit", "settings"):
            return text
        if column in ("seed", "step"):
            return int(text)
        return float(text) if text else None

    if not csv_path(path, name).exists():
        return []
    with csv_path(path, name).open(newline="") as file:
        return [{k: value_of(k, v) for k, v in line.items()} for line in csv.DictReader(file)]


# ----------------------------------------------------- Report --------------------------------------------------------


def t_interval(values, level=0.95):
    """Compute half the width of the interval of a mean, by Student's t."""
    from mpmath import betainc, findroot

    n = len(values) - 1
    t = findroot(lambda t: betainc(n / 2, 0.5, 0, n / (n + t * t), regularized=True) - (1 - level), 2.0)
    return float(t) * statistics.stdev(values) / (n + 1) ** 0.5


def bootstrap(values, draws=10_000, level=0.95):
    """Compute the interval of a mean by resampling seeds. Too narrow for few: with 3 it covers about 76 %."""
    values = np.array(values)
    means = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))].mean(1)
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def paired(lines, baseline, field):
    """Pair values by seed: -> (line's, baseline's) where both have run."""
    base = {line["seed"]: line[field] for line in baseline if line[field] is not None}
    return [(line[field], base[line["seed"]]) for line in lines if line["seed"] in base and line[field] is not None]


def spread(values, scale=1, digits=1):
    """Format mean ± standard deviation, and of how many values if some are missing."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "-"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    missing = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{statistics.fmean(found):.{digits}f}{deviation}{missing}"


def differences(lines, baseline):
    """Format the differences of final accuracy, in points, and of the area, in per cent, with intervals."""
    shown = ["", ""]
    if not baseline or lines is baseline:
        return shown
    gains = [100 * (mine - other) for mine, other in paired(lines, baseline, "after")]
    if len(gains) > 1:
        shown[0] = f"{statistics.fmean(gains):+.1f} ± {t_interval(gains):.1f}"
    areas = paired(lines, baseline, "area")
    if len(areas) > 1:
        scale = 100 / statistics.fmean(other for _, other in areas)
        areas = [scale * (mine - other) for mine, other in areas]
        low, high = bootstrap(areas)
        shown[1] = f"{statistics.fmean(areas):+.1f} ± {t_interval(areas):.1f} [{low:+.1f}, {high:+.1f}]"
    return shown


def print_table(header, rows):
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


LEGEND = """Mean ± standard deviation over seeds; differences to {baseline}
paired by seed, ± half the 95 % interval by Student's t, in brackets that by bootstrap over seeds. Area: mean
reward over all steps; differences in % of the baseline's. Steps to 1/2 and 9/10 of the run's own gain in
reward. Divergences and entropies in nats: at the first step, the largest, at the last."""


def report(path):
    """Print the tables and draw the curves of the runs that the spec asks for. Raises: UserError."""
    spec, every = read_spec(path)
    write_csv(path, every)  # a sweep may be under way
    commands, found = {run.key: " ".join(run.words) for run in every}, read_csv(path, "runs")
    runs = [line for line in found if line["settings"] == commands.get(key_of(line))]
    runs.sort(key=lambda line: line["seed"])
    if len(runs) < len(found):
        print(f"Left out: {len(found) - len(runs)} runs of {csv_path(path, 'runs')} are not as the spec has them.\n")
    if not runs:
        raise UserError(f"{csv_path(path, 'runs')} has no runs of this spec yet: leave --report out")
    by_row = {}
    for line in runs:
        by_row.setdefault((line["setting"], line["row"]), []).append(line)
    commits = ", ".join(sorted({line["commit"] for line in runs}))
    print(f"{len(runs)} runs, commits {commits}. {LEGEND}".format(baseline=spec["baseline"]))
    for setting in spec.get("settings", {"": {}}):
        if not any(name == setting for name, _ in by_row):
            continue
        baseline, outcomes, mechanisms = by_row.get((setting, spec["baseline"])), [], []
        for row in spec["rows"]:
            if lines := by_row.get((setting, row)):
                column = {name: [line.get(name) for line in lines] for name in lines[0]}
                shares = [spread(column[name], 100) for name in ("before", "after", "area")]
                steps = [spread(column[name]) for name in ("steps_to_half", "steps_to_nine_tenths")]
                seconds = f"{statistics.fmean(column['seconds']):.0f}"
                outcomes.append([row, len(lines), *shares, *differences(lines, baseline), *steps, seconds])
                cells = []
                for name in list(CURVES)[1:]:
                    three = (spread(column[f"{name}_{when}"], 1, 3) for when in ("first", "peak", "last"))
                    cells.append(" ".join(text.partition(" ")[0] for text in three))
                turns = [spread(column[name]) for name in ("half_right_at", "think_js_largest_at")]
                mechanisms.append([row, *cells, *turns, spread(column["moved_weights"], 100)])
        print(f"\n### {setting or path.stem}")
        header = "row, seeds, before %, after %, area %, after: points, area: %, steps to 1/2, to 9/10, seconds"
        print_table(header.split(", "), outcomes)
        header = "row, think JS, attention JS, entropy, student entropy, half right at, think JS largest at, moved %"
        print_table(header.split(", "), mechanisms)
    between = []
    for (setting, row), lines in by_row.items():
        if other := spec.get("settings", {}).get(setting, {}).get("baseline"):
            found = differences(lines, by_row.get((other, row)))
            between.append([f"{row}, {setting} minus {other}", len(lines), *found])
    if between:
        print("\n### Settings")
        print_table("row, seeds, after: points, area: %".split(", "), between)
    draw(path, spec, {key_of(line) for line in runs})
    return 0


def draw(path, spec, keys):
    """Draw `<spec>.png`: a column per setting, rows with the most seeds, a band of one standard deviation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = [line for line in read_csv(path, "steps") if key_of(line) in keys]
    settings = [name for name in spec.get("settings", {"": {}}) if any(line["setting"] == name for line in lines)]
    seeds = {}
    for line in lines:
        seeds.setdefault(line["setting"], {}).setdefault(line["row"], set()).add(line["seed"])
    names = [name for name in CURVES if any(line[name] is not None for line in lines)]
    figure = Figure(figsize=(max(9, 4.6 * len(settings)), 2.5 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(settings), squeeze=False, sharex="col")
    looks = itertools.product(("-", "--"), colormaps["tab10"].colors)
    styles = zip(spec["rows"], itertools.cycle(looks))
    style = {row: {"linestyle": line, "color": color} for row, (line, color) in styles}
    for setting, column in zip(settings, axes.T):
        for row in spec["rows"]:
            chosen = [line for line in lines if (line["setting"], line["row"]) == (setting, row)]
            most = max(map(len, seeds[setting].values()))
            if len(seeds[setting].get(row, ())) < max(1, most - 1):  # one less: the sweep goes on
                continue
            for name, axis in zip(names, column):
                values = {}
                for line in chosen:
                    if line[name] is not None:
                        values.setdefault(line["step"], []).append(line[name])
                if not values:
                    continue
                steps, samples = zip(*sorted(values.items()))
                means = np.array([statistics.fmean(sample) for sample in samples])
                band = np.array([statistics.stdev(sample) if len(sample) > 1 else 0.0 for sample in samples])
                axis.plot(steps, means, label=row, **style[row])
                axis.fill_between(steps, means - band, means + band, alpha=0.15, color=style[row]["color"], linewidth=0)
        for name, axis in zip(names, column):
            axis.set_title(CURVES[name], fontsize="medium")
            axis.grid(alpha=0.3)
        column[0].set_title(f"{setting}: {CURVES[names[0]]}", fontsize="medium")
        column[-1].set_xlabel("step")
    drawn = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=max(6, 3 * len(settings)), fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=80)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the processors (default: 1)")
    names = "runs of any of these rows or settings, or by name, as in weak-grpo-0"
    parser.add_argument("--only", default="", metavar="NAME,...", help=names)
    parser.add_argument("--missing", action="store_true", help="only runs that the CSV file has no line of")
    parser.add_argument("--launcher", help='in place of python; on several GPUs "accelerate launch"')
    parser.add_argument("--report", action="store_true", help="print tables and draw all curves; run nothing")
    options = parser.parse_args(words)
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    signal.signal(signal.SIGTERM, stop)
    try:
        if options.report:
            return report(options.spec)
        only = [name for name in options.only.split(",") if name]
        launcher = shlex.split(options.launcher) if options.launcher else [sys.executable]
        return run_all(options.spec, options.jobs, only, launcher, options.missing)
    except UserError as problem:
        print(f"sweep: error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
