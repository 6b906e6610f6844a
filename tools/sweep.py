"""Rows x seeds x settings, each an ordinary run; what they left as two CSV files; and what follows from those.

    python tools/sweep.py results/laptop.toml --jobs 2     what is not there yet, two runs at a time
    python tools/sweep.py results/laptop.toml --report     tables and curves, from the CSV files alone

A spec:

    seeds = 8                          # 0 to 7
    baseline = "grpo"                  # the row that the others are compared with, seed by seed
    prepare = ["laptop.py runs/start/weak --slip 0.63"]    # Python programs to run before all else, in this order

    [settings.weak]                    # what all rows share: fields of the config
    model = "runs/start/weak"

    [rows.grpo]                        # fields of the config, and
    config = "configs.toml:tiny_grpo"  # its table; here or in a setting also `program` and `seeds`;
                                       # of a setting, `rows`: which it is for; of a row, `settings`

A sweep that was cut off goes on: finished runs stay, one that has a checkpoint resumes, another starts anew. Runs lie
in runs/<spec>/<setting>-<row>-<seed>, their output beside them as .log. The CSV files, beside the spec, have a line per
run and a line per step; they keep the lines of runs that are no longer on the disk.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
CURVES = {
    "reward": "reward",
    "think_js": "think JS (nats)",
    "attention_js": "attention JS (nats)",
    "entropy": "entropy of the policy (nats)",
    "student_entropy": "entropy of the student's lens (nats)",
}
LOGGED = [
    *CURVES,
    "think_loss",
    "attention_loss",
    "grad_norm",
    "response_length",
    "sampler_logprob_gap",
    "moved_weights",
]
OWN = {"config", "program", "seeds", "rows", "settings"}


# ----------------------------------------------------- Runs ----------------------------------------------------------


def read_spec(path):
    """-> the runs, seed by seed so that a sweep cut off is balanced: (setting, row, seed, command's words)."""
    spec = tomllib.loads(path.read_text(encoding="utf-8"))
    if unknown := spec.keys() - {"seeds", "baseline", "prepare", "settings", "rows"}:
        sys.exit(f"{path}: unknown: {', '.join(sorted(unknown))}")
    settings, rows, runs = spec.get("settings", {"": {}}), spec.get("rows", {}), []
    named = {spec.get("baseline"), *itertools.chain.from_iterable(part.get("rows", []) for part in settings.values())}
    if missing := named - rows.keys():
        sys.exit(f"{path}: baseline or a setting names rows that are not there: {missing}")
    for row, setting in itertools.product(rows, settings):
        if "config" not in settings[setting] | rows[row] or "seeds" not in spec | settings[setting] | rows[row]:
            sys.exit(f"{path}: row {row} lacks its config or its seeds, as in: config = 'configs.toml:tiny'")
    for seed in range(1000):
        for (setting, shared), (row, own) in itertools.product(settings.items(), rows.items()):
            chosen = row in shared.get("rows", [row]) and setting in own.get("settings", [setting])
            values = shared | own
            if chosen and seed < min(part.get("seeds", spec.get("seeds", 1000)) for part in (shared, own)):
                fields = {name: value for name, value in values.items() if name not in OWN}
                words = [values.get("program", "oisd.py"), "--config", values["config"], "--seed", seed]
                words += itertools.chain.from_iterable((f"--{name}", value) for name, value in fields.items())
                runs.append((setting, row, seed, [str(word) for word in words]))
    return spec, runs


def check_command(folder, words):
    """A folder holds what the spec says now: beside it stands the command that it was made by."""
    command = Path(f"{folder}.command")
    command.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists() or not command.exists():
        command.write_text(" ".join(words))
    elif command.read_text() != " ".join(words):
        sys.exit(f"{folder} was made by other settings, {command.read_text()!r}: move it away")


def launch(folder, words, launcher):
    """One run, from where it stands. -> whether it is finished."""
    if (folder / "final").exists():
        return True
    if any(folder.glob("checkpoints/step_" + "[0-9]" * 6)):
        words = [words[0], "--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        words = [*words, "--output_dir", str(folder)]
    with Path(f"{folder}.log").open("a") as log:
        subprocess.run([*launcher, *words], cwd=ROOT, stdout=log, stderr=log, check=False)
    return (folder / "final").exists()


def run_all(path, jobs, only, launcher=(sys.executable,)):
    spec, runs = read_spec(path)
    if unknown := set(only) - {name for setting, row, *_ in runs for name in (setting, row)}:
        sys.exit(f"--only: neither a row nor a setting of {path}: {', '.join(sorted(unknown))}")
    runs = [run for run in runs if not only or {run[0], run[1]} & set(only)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    for command in spec.get("prepare", []):
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    folders = [RUNS / path.stem / "-".join(filter(None, (s, row, str(seed)))) for s, row, seed, _ in runs]
    for folder, (*_, words) in zip(folders, runs):
        check_command(folder, words)
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(launch, folders, (words for *_, words in runs), itertools.repeat(launcher))
        try:
            for count, (folder, finished) in enumerate(zip(folders, done), start=1):
                verdict = "" if finished else f" is NOT FINISHED, see {folder}.log"
                print(f"{count} of {len(runs)}: {folder.name}{verdict}", flush=True)
                failed += [] if finished else [folder]
                write_csv(path, runs, folders)
        except KeyboardInterrupt:  # the runs have got it too, and save
            sys.exit(f"stopped; {path} goes on where it was")
        finally:
            pool.shutdown(cancel_futures=True)
            write_csv(path, runs, folders)
    return 1 if failed else 0


# ----------------------------------------------------- CSV -----------------------------------------------------------


def first_at(values, level):
    """The first step, from 1, whose smoothed value reaches the level."""
    return next((step for step, value in enumerate(smoothed(values), start=1) if value >= level), None)


def smoothed(values):
    """Averaged over each and its neighbours."""
    return [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def summarise(folder, key, words):
    """A finished run -> its line of each CSV file: one, and one per step."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    header = (folder / "config.toml").read_text().partition("\n")[0]
    run = dict(key, commit=header.rpartition(" ")[2], settings=" ".join(words))
    held_out = folder / "held_out.json"
    scores = list(json.loads(held_out.read_text()).values()) if held_out.exists() else []
    for when, index in (("before", 0), ("after", -1)):
        for name, field in (("", "accuracy"), ("_error", "standard_error")):
            run[when + name] = scores[index][field] if scores else None

    def column(name):
        return [row[name] for row in metrics if row.get(name) is not None]

    rewards = column("reward")
    start, gain = rewards[0], statistics.fmean(rewards[-5:]) - rewards[0]
    run["area"] = statistics.fmean(rewards)
    run["steps_to_half"], run["steps_to_nine_tenths"] = (first_at(rewards, start + part * gain) for part in (0.5, 0.9))
    for name in list(CURVES)[1:]:
        values = column(name) or [None]
        run |= {f"{name}_first": values[0], f"{name}_last": values[-1]}
        run[f"{name}_peak"] = max(values, key=lambda value: abs(value - values[0])) if values != [None] else None
    # The sign rule: while most answers of a group are wrong, the think loss pushes the layers apart.
    run["half_right_at"] = first_at(rewards, 0.5)
    run["think_js_farthest_at"] = 1 + smooth.index(max(smooth)) if (smooth := smoothed(column("think_js"))) else None
    run["moved_weights"] = metrics[-1].get("moved_weights")
    run["seconds"] = sum(row["seconds"] for row in metrics)
    return run, [dict(key, step=row["step"], **{name: row.get(name) for name in LOGGED}) for row in metrics]


def write_csv(path, runs, folders):
    tables = {name: {} for name in ("runs", "steps")}
    for name, table in tables.items():
        for line in read_csv(path, name):
            table.setdefault((line["setting"], line["row"], str(line["seed"])), []).append(line)
    for (setting, row, seed, words), folder in zip(runs, folders):
        if (folder / "final").exists():
            run, steps = summarise(folder, {"setting": setting, "row": row, "seed": seed}, words)
            tables["runs"][setting, row, str(seed)], tables["steps"][setting, row, str(seed)] = [run], steps
    for name, table in tables.items():
        lines = list(itertools.chain.from_iterable(table.values()))
        temporary = csv_path(path, name).with_suffix(".part")
        with temporary.open("w", newline="") as file:
            columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))  # old lines may lack some
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for line in lines:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
        temporary.replace(csv_path(path, name))


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
    """Interval of a mean by resampling seeds (percentiles)."""
    values = np.array(values)
    means = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))].mean(1)
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def paired(lines, baseline, field):
    """-> (by seed, line - baseline) where both have run."""
    base = {line["seed"]: line[field] for line in baseline}
    return [line[field] - base[line["seed"]] for line in lines if line["seed"] in base and line[field] is not None]


def spread(values, scale=1, digits=1):
    values = [scale * value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def differences(lines, baseline):
    """Of final accuracy, in points, and of the area, in per cent of the baseline's: with their intervals."""
    if not baseline or lines is baseline:
        return "", ""
    gains = [100 * difference for difference in paired(lines, baseline, "after")]
    scale = 100 / statistics.fmean(line["area"] for line in baseline)
    areas = [scale * difference for difference in paired(lines, baseline, "area")]
    if len(gains) < 2:
        return "", ""
    low, high = bootstrap(areas)
    by_t, by_resampling = t_interval(gains), f"[{low:+.1f}, {high:+.1f}]"
    return f"{statistics.fmean(gains):+.1f} ± {by_t:.1f}", f"{statistics.fmean(areas):+.1f} {by_resampling}"


def print_table(header, rows):
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def report(path):
    spec = tomllib.loads(path.read_text(encoding="utf-8"))
    runs = read_csv(path, "runs")
    if not runs:
        sys.exit(f"{csv_path(path, 'runs')} has no runs yet: leave --report out")
    by_row = {}
    for line in sorted(runs, key=lambda line: line["seed"]):
        by_row.setdefault((line["setting"], line["row"]), []).append(line)
    commits = ", ".join(sorted({line["commit"] for line in runs}))
    print(
        f"{len(runs)} runs, commits {commits}. Mean ± standard deviation over seeds. Differences to {spec['baseline']}"
    )
    print("are paired by seed, with 95 % intervals: of accuracy by Student's t, of the area by bootstrap over seeds.")
    for setting in dict.fromkeys(line["setting"] for line in runs):
        baseline, outcomes, mechanisms = by_row.get((setting, spec["baseline"])), [], []
        for row in spec["rows"]:
            if lines := by_row.get((setting, row)):
                column = {name: [line[name] for line in lines] for name in lines[0]}
                steps = [spread(column[name]) for name in ("steps_to_half", "steps_to_nine_tenths")]
                points = spread(column["before"], 100), spread(column["after"], 100), spread(column["area"], 100)
                seconds = f"{statistics.fmean(column['seconds']):.0f}"
                outcomes.append([row, len(lines), *points, *differences(lines, baseline), *steps, seconds])
                middles = [
                    " ".join(
                        spread(column[f"{name}_{when}"], 1, 3).partition(" ")[0] for when in ("first", "peak", "last")
                    )
                    for name in list(CURVES)[1:]
                ]
                turns = [spread(column[name]) for name in ("half_right_at", "think_js_farthest_at")]
                mechanisms.append([row, *middles, *turns, spread(column["moved_weights"], 100)])
        print(f"\n### {setting or path.stem}")
        header = "row, seeds, before %, after %, area %, after: points, area: %, steps to 1/2, to 9/10, seconds"
        print_table(header.split(", "), outcomes)
        header = "row, think JS, attention JS, entropy, student entropy, half right at, think JS largest at, moved %"
        print_table(header.split(", "), mechanisms)
    print("\nDivergences and entropies: at the first step, farthest from that, at the last; nats.")
    draw(path, spec)


def draw(path, spec):
    """`<spec>.png`: a column per setting, a line per row that all seeds have, a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_csv(path, "steps")
    settings = list(dict.fromkeys(line["setting"] for line in lines))
    most = {s: max(line["seed"] for line in lines if line["setting"] == s) for s in settings}
    names = [name for name in CURVES if any(line[name] is not None for line in lines)]
    figure, axes = plt.subplots(
        len(names),
        len(settings),
        figsize=(4.6 * len(settings), 2.5 * len(names)),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    colours = dict(zip(spec["rows"], itertools.cycle(plt.get_cmap("tab10").colors)))
    for setting, column in zip(settings, axes.T):
        for row in spec["rows"]:
            chosen = [line for line in lines if (line["setting"], line["row"]) == (setting, row)]
            if not chosen or max(line["seed"] for line in chosen) < most[setting]:
                continue
            for name, axis in zip(names, column):
                values = {}
                for line in chosen:
                    if line[name] is not None:
                        values.setdefault(line["step"], []).append(line[name])
                steps, samples = zip(*sorted(values.items()))
                means = np.array([statistics.fmean(sample) for sample in samples])
                band = np.array([statistics.stdev(sample) if len(sample) > 1 else 0.0 for sample in samples])
                axis.plot(steps, means, label=row, color=colours[row])
                axis.fill_between(steps, means - band, means + band, alpha=0.15, color=colours[row], linewidth=0)
        for name, axis in zip(names, column):
            axis.set_title(CURVES[name], fontsize="medium")
            axis.grid(alpha=0.3)
        column[0].set_title(f"{setting}: {CURVES[names[0]]}", fontsize="medium")
        column[0].legend(fontsize="small")
        column[-1].set_xlabel("step")
    figure.savefig(path.with_suffix(".png"), dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the processors (default: 1)")
    parser.add_argument("--only", default="", metavar="NAME,...", help="these rows or settings (default: all)")
    parser.add_argument(
        "--launcher", default=sys.executable, help='on several GPUs "accelerate launch" (default: python)'
    )
    parser.add_argument("--report", action="store_true", help="print tables and draw curves; run nothing")
    options = parser.parse_args()
    if not options.spec.is_file() or options.jobs < 1:
        parser.error(f"no such file: {options.spec}" if options.jobs > 0 else "--jobs is at least 1")
    if options.report:
        return report(options.spec)
    only = [name for name in options.only.split(",") if name]
    return run_all(options.spec, options.jobs, only, options.launcher.split())


if __name__ == "__main__":
    sys.exit(main())
