"""Rows x seeds x settings, each an ordinary run; what they left as two CSV files; and what follows from those.

    python tools/sweep.py results/laptop.toml --jobs 2     what is not there yet, two runs at a time
    python tools/sweep.py results/laptop.toml --report     tables, curves: of the CSV files and what is there since

A spec:

    seeds = 8                          # 0 to 7
    baseline = "grpo"                  # the row that the others are compared with, seed by seed
    prepare = ["laptop.py runs/start/weak --slip 0.63"]    # Python programs to run before all else, in this order

    [settings.weak]                    # what all rows share: fields of the config
    model = "runs/start/weak"

    [rows.grpo]                        # fields of the config, and
    config = "configs.toml:tiny_grpo"  # its table; here or in a setting also `program` and `seeds`;
                                       # of a setting, `rows`: which it is for, and `baseline`: the setting with
                                       # which these are compared as well; of a row, `settings`

A sweep that was cut off goes on: finished runs stay, one that has a checkpoint resumes, another starts anew. Runs lie
in runs/<spec>/<setting>-<row>-<seed>, their output beside them as .log. The CSV files, beside the spec, have a line per
run and a line per step; they keep the lines of runs that are no longer on the disk, which --missing does not repeat.
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
import plumbing
from settings import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
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
OWN = {"config", "program", "seeds", "rows", "settings", "baseline"}
FREE = set(oisd.FREE_ON_RESUME) - {"num_steps"}  # fields that a run may have otherwise and still be the one asked for


# ----------------------------------------------------- Runs ----------------------------------------------------------


@dataclass
class Planned:
    """A run of a sweep."""

    setting: str
    row: str
    seed: int
    words: list[str]  # of its command: program, then options
    folder: Path

    @property
    def key(self) -> tuple[str, str, str]:
        return self.setting, self.row, str(self.seed)

    @property
    def names(self) -> set[str]:
        """By which --only knows it."""
        return {self.setting, self.row, self.folder.name}

    @property
    def finished(self) -> bool:
        return (self.folder / "final").exists()

    @property
    def kind(self) -> type[oisd.Config]:
        """The config of its program."""
        program = importlib.import_module(self.words[0].removesuffix(".py").replace("/", "."))
        own = [k for k in vars(program).values() if isinstance(k, type) and issubclass(k, oisd.Config)]
        return max(own, key=lambda k: len(k.__mro__))  # a baseline's own is a subclass

    def check(self) -> None:
        """Of its command, and of the folder if there is one: is it the run that is meant? Raises: UserError."""
        kind = self.kind
        _, config = oisd.load_config(self.words[1:], kind)
        made = self.folder / "config.toml"
        if made.exists():
            (found,) = tomllib.loads(made.read_text(encoding="utf-8")).values()
            own, common = ({field.name for field in dataclasses.fields(k)} for k in (kind, oisd.Config))
            if found.keys() - own or own - common - found.keys():
                raise UserError(f"{self.folder} was made by another program than {kind.program}: move that run away")
            unused = {"internal_mean"} if config.think_weight == config.attention_weight == 0 else set()
            for name, value in dataclasses.asdict(config).items():
                other = found.get(name, kind.formerly.get(name, getattr(kind, name)))
                if name not in FREE | unused and value != "auto" and other != value:
                    raise UserError(f"{self.folder} has {name} = {other!r}, the spec {value!r}: move that run away")

    def launch(self, launcher: list[str]) -> bool:
        """Go on from where it stands. -> whether it is finished."""
        if self.finished:
            return True
        if plumbing.checkpoints(self.folder) and self.kind.resumable:
            words = [self.words[0], "--resume", str(self.folder)]
        else:
            if self.folder.exists():
                with locked(self.folder / "lock"):  # another process may be at it
                    shutil.rmtree(self.folder)
            words = [*self.words, "--output_dir", str(self.folder)]
        with Path(f"{self.folder}.log").open("a") as log:
            call([*launcher, *words], log)
        return self.finished


RUNNING: set[subprocess.Popen] = set()


def call(command, log=None):
    """-> exit code."""
    with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        RUNNING.add(process)
        code = process.wait()
    RUNNING.discard(process)
    return code


def stop(number, _frame):
    """SIGTERM as Ctrl-C, which from a terminal reaches the runs by itself: they save."""
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


@contextlib.contextmanager
def locked(path, wait=False):
    """Raises: UserError if another process holds it, unless it may wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{path} is held by another process: wait for it") from None
        yield


def read_spec(path):
    """-> the spec and its runs, seed by seed so that a sweep cut off is balanced. Raises: UserError."""
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: {one_line(problem)}") from None
    settings, rows = spec.get("settings", {"": {}}), spec.get("rows", {})
    chosen = {row: own.get("settings", list(settings)) for row, own in rows.items()}
    allowed = {setting: shared.get("rows", list(rows)) for setting, shared in settings.items()}
    unknown = spec.keys() - {"seeds", "baseline", "prepare", "settings", "rows"}
    unknown |= {*itertools.chain(*chosen.values())} - settings.keys()
    unknown |= {
        spec.get("baseline", "a baseline, as in: baseline = 'grpo'"),
        *itertools.chain(*allowed.values()),
    } - rows.keys()
    unknown |= {shared["baseline"] for shared in settings.values() if "baseline" in shared} - settings.keys()
    if unknown:
        raise UserError(f"{path}: unknown or missing: {', '.join(sorted(unknown))}")
    runs = []
    for (setting, shared), (row, own) in itertools.product(settings.items(), rows.items()):
        values = {name: value for name, value in (shared | own).items() if name not in OWN}
        program, config = ((shared | own).get(name, usual) for name, usual in (("program", "oisd.py"), ("config", "")))
        seeds = min((part["seeds"] for part in (shared, own) if "seeds" in part), default=spec.get("seeds", 0))
        if not config or not isinstance(seeds, int) or seeds < 1:
            raise UserError(f"{path}: row {row} lacks its table, as in: config = 'configs.toml:tiny', or its seeds")
        for seed in range(seeds) if row in allowed[setting] and setting in chosen[row] else ():
            words = [program, "--config", config, "--seed", seed]
            words += itertools.chain.from_iterable(
                (f"--{n}", str(v).lower() if isinstance(v, bool) else v) for n, v in values.items()
            )
            folder = RUNS / path.stem / "-".join(filter(None, (setting, row, str(seed))))
            runs.append(Planned(setting, row, seed, [str(word) for word in words], folder))
    return spec, sorted(runs, key=lambda run: run.seed)


def run_all(path, jobs, only, launcher, missing=False):
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
            raise UserError(f"stopped; {path} goes on where it was") from None
        finally:
            pool.shutdown(cancel_futures=True)
            write_csv(path, every)
    return 0 if all(run.finished for run in runs) else 1


# ----------------------------------------------------- CSV -----------------------------------------------------------


def first_at(values, level):
    """The first step, from 1, whose smoothed value reaches the level."""
    return next((step for step, value in enumerate(smoothed(values), start=1) if value >= level), None)


def smoothed(values):
    """Averaged over each and its neighbours."""
    return [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def summarise(run):
    """A finished run -> its line of each CSV file: one, and one per step."""
    metrics = plumbing.read_metrics(run.folder)
    commit = (run.folder / "config.toml").read_text().partition("\n")[0].rpartition(" ")[2]
    key = {"setting": run.setting, "row": run.row, "seed": run.seed}
    line = key | {"commit": commit, "settings": " ".join(run.words)}
    held_out = run.folder / "held_out.json"
    scores = list(json.loads(held_out.read_text()).values()) if held_out.exists() else []
    for when, index in (("before", 0), ("after", -1)):
        for name, field in (("", "accuracy"), ("_error", "standard_error")):
            line[when + name] = scores[index][field] if scores else None

    def column(name):
        return [row[name] for row in metrics if row.get(name) is not None]

    rewards = column("reward")
    start, gain = rewards[0], statistics.fmean(rewards[-5:]) - rewards[0]
    line["area"] = statistics.fmean(rewards)
    for name, part in (("half", 0.5), ("nine_tenths", 0.9)):
        line[f"steps_to_{name}"] = first_at(rewards, start + part * gain) if gain > 0 else None
    for name in list(CURVES)[1:]:
        values = column(name) or [None]
        line |= {f"{name}_first": values[0], f"{name}_last": values[-1]}
        line[f"{name}_peak"] = max(values) if values != [None] else None
    # The sign rule: while most answers of a group are wrong, the think loss pushes the layers apart.
    line["half_right_at"] = first_at(rewards, 0.5)
    line["think_js_largest_at"] = 1 + smooth.index(max(smooth)) if (smooth := smoothed(column("think_js"))) else None
    line["moved_weights"] = metrics[-1].get("moved_weights")
    line["seconds"] = sum(row["seconds"] for row in metrics)
    return line, [dict(key, step=row["step"], **{name: row.get(name) for name in LOGGED}) for row in metrics]


def write_csv(path, runs):
    """Lines of those runs that are finished; all others stay as they are in the files."""
    with locked(RUNS / path.stem / "csv.lock", wait=True):  # a report may be asked for while a sweep runs
        tables = {"runs": {}, "steps": {}}
        for name, table in tables.items():
            for line in read_csv(path, name):
                table.setdefault(key_of(line), []).append(line)
        for run in runs:
            if run.finished:
                try:
                    run.check()
                except UserError as problem:
                    print(f"left out: {problem}", file=sys.stderr)
                    continue
                line, steps = summarise(run)
                tables["runs"][run.key], tables["steps"][run.key] = [line], steps
        for name, table in tables.items():
            lines = list(itertools.chain.from_iterable(table.values()))
            text = io.StringIO()
            columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))  # old lines may lack some
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            for line in lines:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
            plumbing.write_atomically(csv_path(path, name), text.getvalue())


def key_of(line):
    return line["setting"], line["row"], str(line["seed"])


def csv_path(path, name):
    return path.with_name(f"{path.stem}.{name}.csv")


def read_csv(path, name):
    """Lines with numbers where there are some, None where there is nothing."""

    def number(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    if not csv_path(path, name).exists():
        return []
    with csv_path(path, name).open(newline="") as file:
        lines = list(csv.DictReader(file))
    words = ("setting", "row", "commit", "settings")
    return [
        {k: v if k in words else int(v) if k in ("seed", "step") else number(v) for k, v in line.items()}
        for line in lines
    ]


# ----------------------------------------------------- Report --------------------------------------------------------


def t_interval(values, level=0.95):
    """Half the width of the interval of a mean, by Student's t."""
    from mpmath import betainc, findroot

    n = len(values) - 1
    t = findroot(lambda t: betainc(n / 2, 0.5, 0, n / (n + t * t), regularized=True) - (1 - level), 2.0)
    return float(t) * statistics.stdev(values) / (n + 1) ** 0.5


def bootstrap(values, draws=10_000, level=0.95):
    """Interval of a mean by resampling seeds (percentiles). Too narrow for few: of 3 seeds it covers about 76 %."""
    values = np.array(values)
    means = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))].mean(1)
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def paired(lines, baseline, field):
    """-> by seed, (line's, baseline's) where both have run."""
    base = {line["seed"]: line[field] for line in baseline if line[field] is not None}
    return [(line[field], base[line["seed"]]) for line in lines if line["seed"] in base and line[field] is not None]


def spread(values, scale=1, digits=1):
    """Mean ± standard deviation; where some have none, of how many it is."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "-"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    missing = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{statistics.fmean(found):.{digits}f}{deviation}{missing}"


def differences(lines, baseline):
    """Of final accuracy, in points, and of the area, in per cent of the baseline's: with their intervals."""
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


def report(path, baseline=""):
    spec, every = read_spec(path)
    spec["baseline"] = baseline or spec["baseline"]
    if spec["baseline"] not in spec["rows"]:
        raise UserError(f"--baseline {baseline}: {path} has no such row")
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
    print(
        f"{len(runs)} runs, commits {commits}. Mean ± standard deviation over seeds; differences to {spec['baseline']}"
    )
    print(
        "paired by seed, ± half the 95 % interval by Student's t, in brackets that by bootstrap over seeds. Area: mean"
    )
    print("reward over all steps; differences in % of the baseline's. Steps to 1/2 and 9/10 of the run's own gain in")
    print("reward. Divergences and entropies in nats: at the first step, the largest, at the last.")
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
            between.append([f"{row}, {setting} less {other}", len(lines), *found])
    if between:
        print("\n### Settings")
        print_table("row, seeds, after: points, area: %".split(", "), between)
    draw(path, spec, {key_of(line) for line in runs})
    return 0


def draw(path, spec, keys):
    """`<spec>.png`: a column per setting, of the rows with the most seeds; a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in read_csv(path, "steps") if key_of(line) in keys]
    settings = [name for name in spec.get("settings", {"": {}}) if any(line["setting"] == name for line in lines)]
    seeds = {}
    for line in lines:
        seeds.setdefault(line["setting"], {}).setdefault(line["row"], set()).add(line["seed"])
    names = [name for name in CURVES if any(line[name] is not None for line in lines)]
    figure, axes = plt.subplots(
        len(names),
        len(settings),
        figsize=(max(9, 4.6 * len(settings)), 2.5 * len(names)),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    looks = itertools.product(("-", "--"), plt.get_cmap("tab10").colors)
    styles = zip(spec["rows"], itertools.cycle(looks))
    style = {row: {"linestyle": line, "color": colour} for row, (line, colour) in styles}
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
    parser.add_argument("--baseline", default="", metavar="ROW", help="report differences to it, not to the spec's")
    options = parser.parse_args(words)
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    signal.signal(signal.SIGTERM, stop)
    try:
        if options.report:
            return report(options.spec, options.baseline)
        only = [name for name in options.only.split(",") if name]
        launcher = shlex.split(options.launcher) if options.launcher else [sys.executable]
        return run_all(options.spec, options.jobs, only, launcher, options.missing)
    except UserError as problem:
        print(f"sweep: error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
