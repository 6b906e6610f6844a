"""Run rows x settings x seeds, each an ordinary run; collect their results, by run and by step; report on them.

    python study/sweep.py study/laptop.toml --jobs 2     the runs that are not finished yet, two at a time
    python study/sweep.py study/laptop.toml --report     tables and curves, without running anything

    seeds = 8                          # a spec: seeds 0 to 7; a setting or a row may have its own, and a `program`
    baseline = "grpo"                  # the row that the others are compared with, seed by seed
    prepare = ["study/easy_sums.py runs/start/sums"]    # arguments of Python, run first, in this order
    [settings.weak]                    # fields of the config that all rows share, or those that it names as `rows`;
    model = "tiny/weak"                # it may name as `baseline` a setting that it is compared with
    [rows.grpo]                        # fields of the config, and its table; a row may name its `settings`
    config = "configs.toml:tiny_grpo"

The same command continues: finished runs stay, one with a checkpoint resumes, another starts again. Runs and their logs
are in runs/<spec>/<setting>-<row>-<seed>, their results in two CSV files beside the spec, where they stay.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from mpmath import betainc, findroot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import run_folder
from support.settings import ROOT, UserError, one_line

RUNS = ROOT / "runs"
KEY = ["setting", "row", "seed"]
TEXT = ["setting", "row", "commit", "settings"]  # columns that are no numbers
LAYERS = ["think_js", "attention_js", "entropy", "student_entropy"]
CURVES = ["reward", *LAYERS]
LOGGED = [*CURVES, *"think_loss attention_loss grad_norm response_length sampler_logprob_gap moved_weights".split()]
OWN = {"config", "program", "seeds", "rows", "settings", "baseline", "prepare"}  # keys of a spec that are no fields
FREE = set(oisd.FREE_ON_RESUME) - {"num_steps"}  # fields in which a finished run may differ from the spec


class Run(NamedTuple):
    """A run of a sweep."""

    setting: str
    row: str
    seed: int
    settings: str  # its command: program, then options
    folder: Path

    @property
    def names(self):
        return {self.setting, self.row, self.folder.name}

    @property
    def finished(self):
        return (self.folder / "final").exists()

    def check(self):
        """Check its command, and its folder if there is one: -> its settings. Raises: UserError."""
        program, *options = shlex.split(self.settings)
        module = importlib.import_module(program[:-3].replace("/", "."))
        _, config = oisd.load_config(options, getattr(module, "METHOD", oisd.Method()).config)
        made = self.folder / "config.toml"
        if made.exists():
            (found,) = tomllib.loads(made.read_text()).values()
            for name, value in {"program": config.program, **dataclasses.asdict(config)}.items():
                if name not in FREE and value not in ("auto", found.get(name)):
                    raise UserError(f"{self.folder} has {name} = {found.get(name)!r}, not {value!r}: move it away")
        return config

    def launch(self, launcher):
        """Start or continue the run."""
        words = [*shlex.split(self.settings), "--output_dir", str(self.folder)]
        if run_folder.checkpoints(self.folder) and self.check().resumable:
            words = [words[0], "--resume", str(self.folder)]
        elif self.folder.exists():
            with locked(self.folder):  # nobody else is training in it
                shutil.rmtree(self.folder)
        with open(f"{self.folder}.log", "a") as log:
            subprocess.call([*launcher, *words], cwd=ROOT, stdout=log, stderr=log)


def locked(folder):
    """Lock a folder: -> file that holds the lock while it is open. Raises: UserError if another process does."""
    return run_folder.open_folder("", str(folder), resuming=True)[1]


def read_spec(path):
    """Read a spec: -> it and its runs, seed by seed, so that an interrupted sweep is balanced. Raises: UserError."""
    try:
        spec = tomllib.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: {one_line(problem)}") from None
    settings = spec.setdefault("settings", {"": {}})
    rows = spec.setdefault("rows", {})
    unknown = spec.keys() - OWN
    unknown |= {spec.get("baseline", "baseline")} - rows.keys()
    for name, shared in settings.items():
        unknown |= set(shared.get("rows", [])) - rows.keys()
        unknown |= {shared.get("baseline", name)} - settings.keys()
    for own in rows.values():
        unknown |= set(own.get("settings", [])) - settings.keys()
    if unknown:
        raise UserError(f"{path}: unknown or missing: {', '.join(sorted(unknown))}")
    runs = []
    for (setting, shared), (row, own) in itertools.product(settings.items(), rows.items()):
        if row not in shared.get("rows", rows) or setting not in own.get("settings", settings):
            continue
        both = {"program": "oisd.py"} | spec | shared | own
        if "config" not in both or not isinstance(both.get("seeds"), int) or both["seeds"] < 1:
            raise UserError(f"{path}: row {row} lacks its table, as in: config = 'configs.toml:tiny', or its seeds")
        fields = ""
        for name, value in both.items():
            if name not in OWN:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                fields += f" --{name} {shlex.quote(text)}"
        for seed in range(both["seeds"]):
            command = f"{both['program']} --config {both['config']} --seed {seed}{fields}"
            folder = RUNS / path.stem / f"{setting}-{row}-{seed}".removeprefix("-")
            runs.append(Run(setting, row, seed, command, folder))
    return spec, sorted(runs, key=lambda run: run.seed)


def run_all(path, options):
    """Run what is not finished: -> exit code. Raises: UserError."""
    spec, runs = read_spec(path)
    if options.only:
        only = set(options.only.split(","))
        if unknown := only - {name for run in runs for name in run.names}:
            raise UserError(f"--only: {path} has no row, setting or run {', '.join(sorted(unknown))}")
        runs = [run for run in runs if only & run.names]
    if options.launcher == [sys.executable]:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // options.jobs)))
    with locked(RUNS / path.stem), ThreadPoolExecutor(options.jobs) as pool:
        for run in runs:
            run.check()
        collect(path, runs)
        missing = [run for run in runs if not run.finished]
        commands = spec.get("prepare", []) if missing else []
        for command in commands:
            subprocess.check_call([sys.executable, *shlex.split(command)], cwd=ROOT)
        ended = pool.map(lambda run: run.launch(options.launcher), missing)
        try:
            for count, (run, _) in enumerate(zip(missing, ended), start=1):
                verdict = "" if run.finished else f" is NOT FINISHED, see {run.folder}.log"
                print(f"{count} of {len(missing)}: {run.folder.name}{verdict}", flush=True)
                collect(path, [run])
        finally:
            pool.shutdown(cancel_futures=True)
    return 0 if all(run.finished for run in runs) else 1


def read_csv(path, name):
    """Read the lines of all runs: -> a table, empty if there is no file yet."""
    file = path.with_suffix(f".{name}.csv")
    return pd.read_csv(file, converters=dict.fromkeys(TEXT, str)) if file.exists() else pd.DataFrame(columns=KEY)


def collect(path, runs):
    """Write the lines of those runs that are finished and as in the spec; all other lines stay."""
    tables = {}
    for name in ("runs", "steps"):
        tables[name] = dict(list(read_csv(path, name).groupby(KEY, sort=False)))
    for run in runs:
        if not run.finished:
            continue
        try:
            run.check()
        except UserError as problem:
            print(f"left out: {problem}", file=sys.stderr)
            continue
        line, steps = summarize(run)
        tables["runs"][run[:3]] = line
        tables["steps"][run[:3]] = steps
    for name, table in tables.items():
        if table:
            lines = pd.concat(table.values()).infer_objects()  # missing scores are None
            text = lines.to_csv(index=False, float_format="%.6g")
            run_folder.write_atomically(path.with_suffix(f".{name}.csv"), text)


def summarize(run):
    """Summarize a finished run: -> its line of the runs file, and its lines of the steps file."""
    metrics = pd.DataFrame(run_folder.read_metrics(run.folder)).set_index("step")
    steps = metrics.reindex(columns=LOGGED).astype(float)
    first = steps.bfill().iloc[0]  # BuPO reads no lens in its first steps
    last = steps.ffill().iloc[-1]
    peak = steps.max()
    smooth = steps.rolling(3, center=True, min_periods=1).mean()
    reward, think_js = smooth["reward"], smooth["think_js"]
    start, end = first["reward"], steps["reward"].iloc[-5:].mean()
    gain = end - start if end > start else np.nan  # no step reaches a part of nan
    key = dict(zip(KEY, run))
    commit = (run.folder / "config.toml").read_text().partition("\n")[0].rpartition(" ")[2]
    line = key | {"commit": commit, "settings": run.settings}
    held_out = run.folder / "held_out.json"
    scores = list(json.loads(held_out.read_text()).values()) if held_out.exists() else [{}]
    for when, score in (("before", scores[0]), ("after", scores[-1])):
        line |= {when: score.get("accuracy"), f"{when}_error": score.get("standard_error")}
    line["area"] = steps["reward"].mean()
    line["steps_to_half"] = reward[reward >= start + 0.5 * gain].index.min()
    line["steps_to_nine_tenths"] = reward[reward >= start + 0.9 * gain].index.min()
    for name in LAYERS:
        line |= {f"{name}_first": first[name], f"{name}_last": last[name], f"{name}_peak": peak[name]}
    # The sign rule: while most answers of a group are wrong, the think loss pushes the layers apart.
    line["half_right_at"] = reward[reward >= 0.5].index.min()
    line["think_js_largest_at"] = think_js[think_js == think_js.max()].index.min()
    line |= {"moved_weights": last["moved_weights"], "seconds": metrics["seconds"].sum()}
    return pd.DataFrame([line]), steps.reset_index().assign(**key)[[*KEY, "step", *LOGGED]]


def t_interval(values):
    """Compute half the width of the 95 % interval of a mean, by Student's t."""
    n = len(values) - 1
    t = findroot(lambda t: betainc(n / 2, 0.5, 0, n / (n + t * t), regularized=True) - 0.05, 2.0)
    return float(t) * values.sem()


def bootstrap(values):
    """Compute the 95 % interval of a mean by resampling seeds. Too narrow for few: with 3 it covers about 76 %."""
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    return np.quantile(np.array(values)[drawn].mean(1), [0.025, 0.975])


def spread(values):
    """Format mean ± standard deviation, and of how many values if some are missing."""
    found = values.dropna()
    if found.empty:
        return "-"
    deviation = f" ± {found.std():.1f}" if len(found) > 1 else ""
    missing = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{found.mean():.1f}{deviation}{missing}"


def differences(lines, baseline):
    """Format the differences of final accuracy, in points, and of the area, in per cent, with intervals."""
    if baseline is None or lines is baseline:
        return " | "
    both = lines.merge(baseline, on="seed", suffixes=("", "_base"))
    gains = 100 * (both["after"] - both["after_base"]).dropna()
    areas = 100 / both["area_base"].mean() * (both["area"] - both["area_base"])
    shown = []
    for values in (gains, areas):
        shown.append(f"{values.mean():+.1f} ± {t_interval(values):.1f}" if len(values) > 1 else "")
    if shown[1]:
        shown[1] += " [{:+.1f}, {:+.1f}]".format(*bootstrap(areas))
    return " | ".join(shown)


LEGEND = """Mean ± standard deviation over seeds; differences to {baseline}
paired by seed, ± half the 95 % interval by Student's t, in brackets that by bootstrap over seeds. Area: mean
reward over all steps; differences in % of the baseline's. Steps to 1/2 and 9/10 of the run's own gain in
reward. Divergences and entropies in nats: at the first step, the largest, at the last."""


def report(path):
    """Print the tables and draw the curves of the runs that the spec asks for. Raises: UserError."""
    spec, every = read_spec(path)
    try:
        with locked(RUNS / path.stem):
            collect(path, every)
    except UserError as problem:  # a sweep is under way and collects by itself
        print(f"only what the CSV files have: {problem}", file=sys.stderr)
    found = read_csv(path, "runs")
    runs = found.merge(pd.DataFrame(every)).sort_values("seed", kind="stable")
    if runs.empty:
        raise UserError(f"{path} has no runs in its CSV files yet: leave --report out")
    if len(runs) < len(found):
        print(f"Left out: {len(found) - len(runs)} runs of the CSV files are not as the spec has them.\n")
    commits = ", ".join(sorted(set(runs["commit"])))
    print(f"{len(runs)} runs, commits {commits}. {LEGEND}".format(baseline=spec["baseline"]))
    by_row = dict(list(runs.groupby(["setting", "row"], sort=False)))
    for setting in spec["settings"]:
        rows = {row: by_row[setting, row] for row in spec["rows"] if (setting, row) in by_row}
        if not rows:
            continue
        print(f"\n### {setting or path.stem}\n\n| row | seeds | before % | after % | area % ", end="")
        print("| after: points | area: % | steps to 1/2 | to 9/10 | seconds |\n" + "|---" * 10 + "|")
        for row, lines in rows.items():
            before, after, area = (100 * lines[["before", "after", "area"]]).apply(spread)
            against = differences(lines, rows.get(spec["baseline"]))
            half, most = lines[["steps_to_half", "steps_to_nine_tenths"]].apply(spread)
            seconds = f"{lines['seconds'].mean():.0f}"
            print(f"| {row} | {len(lines)} | {before} | {after} | {area} | {against} | {half} | {most} | {seconds} |")
        print("\n| row | think JS | attention JS | entropy | student entropy ", end="")
        print("| half right at | think JS largest at | moved % |\n|---|---|---|---|---|---|---|---|")
        for row, lines in rows.items():
            means = lines.mean(numeric_only=True)
            cells = []
            for name in LAYERS:
                values = [means[f"{name}_{when}"] for when in ("first", "peak", "last")]
                cells.append(" ".join(f"{value:.3f}" for value in values).replace("nan", "-"))
            cells += lines[["half_right_at", "think_js_largest_at"]].apply(spread).to_list()
            print(f"| {row} | {' | '.join(cells)} | {spread(100 * lines['moved_weights'])} |")
    between = []
    for (setting, row), lines in by_row.items():
        if other := spec["settings"][setting].get("baseline"):
            against = differences(lines, by_row.get((other, row)))
            between.append(f"| {row}, {setting} minus {other} | {len(lines)} | {against} |")
    if between:
        print("\n### Settings\n\n| row | seeds | after: points | area: % |\n|---|---|---|---|", *between, sep="\n")
    draw(path, spec, read_csv(path, "steps").merge(runs[KEY]))
    return 0


def draw(path, spec, steps):
    """Draw `<spec>.png`: a column per setting, rows with the most seeds, a band of one standard deviation."""
    seeds = steps.groupby(["setting", "row"])["seed"].nunique()
    most = seeds[seeds >= seeds.groupby("setting").transform("max") - 1]  # one less: the sweep goes on
    settings = [setting for setting in spec["settings"] if setting in seeds]
    by_step = steps.groupby(["setting", "row", "step"])
    means, deviations = by_step.mean(), by_step.std().fillna(0)
    figure = Figure(figsize=(max(9, 4.6 * len(settings)), 12.5), layout="constrained")
    axes = figure.subplots(len(CURVES), len(settings), squeeze=False, sharex="col")
    drawn = {}
    for (i, j), axis in np.ndenumerate(axes):
        name, setting = CURVES[i], settings[j]
        axis.set_title(f"{setting or path.stem}: {run_folder.CURVES[name]}", fontsize="medium")
        axis.grid(alpha=0.3)
        for number, row in enumerate(spec["rows"]):
            if (setting, row) in most:
                mean, band = means[name][setting, row], deviations[name][setting, row]
                color = f"C{number}"  # of ten
                (drawn[row],) = axis.plot(mean, color=color, linestyle="-" if number < 10 else "--")
                axis.fill_between(mean.index, mean - band, mean + band, alpha=0.15, color=color, linewidth=0)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=80)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [%(default)s]")
    parser.add_argument("--only", default="", metavar="NAME,...", help="rows, settings or runs, as in weak-grpo-0")
    parser.add_argument("--launcher", type=shlex.split, default=[sys.executable], help='as in "accelerate launch"')
    parser.add_argument("--report", action="store_true", help="print tables and draw all curves; run nothing")
    options = parser.parse_args(words)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    try:
        return report(options.spec) if options.report else run_all(options.spec, options)
    except (UserError, ImportError, subprocess.CalledProcessError) as problem:
        print(f"sweep: error: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print("sweep: stopped; the same command continues", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGINT))  # like Ctrl-C, the runs get it too
    sys.exit(main())
