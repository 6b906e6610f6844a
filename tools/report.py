"""One HTML page of a run, or of several side by side: no network, no scripts, readable on a phone.

    python tools/report.py runs/tiny                                     -> report.html
    python tools/report.py runs/tiny runs/tiny_grpo --output grpo.html   what differs, curves, scores, rollouts, lens

`--lens N`: of how many held-out problems to show what each layer would have said; it loads each run's model, in
float32, and samples with Transformers. 0: none, and no model is loaded.
"""

import argparse
import dataclasses
import html
import io
import json
import sys
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import lens

import plumbing
from settings import UserError

CURVES = {name: title for title, names in plumbing.CURVES.items() for name in names[:1]}
CURVES |= {"grad_norm": "gradient norm", "moved_weights": "share of weights that bfloat16 sees moved"}
COLOURS = ("#1f6fb4", "#d9601a", "#2b8a3e", "#8b3fb0", "#a8322d", "#5f6a72")
STYLE = """
:root { font: 16px/1.45 system-ui, sans-serif; color: #1c2126; background: #fff }
body { max-width: 75rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5dbe0 }
h3 { font-size: 1rem; margin: 1rem 0 .3rem }
.wide { overflow-x: auto } .muted { color: #66717a; font-size: .85rem }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .25rem .6rem; text-align: left }
tr + tr { border-top: 1px solid #e4e8eb } td.n { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem }
.grid svg { width: 100%; height: auto }
.rollout { border-left: 4px solid #c9d0d5; margin: .5rem 0; padding: .1rem .6rem }
.right { border-color: #2b8a3e } .wrong { border-color: #c0392b }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; font-size: .82rem }
.lens td, .lens th { padding: .1rem .35rem; text-align: center; border: 2px solid transparent }
.lens td, .lens th { font: .75rem ui-monospace, monospace; white-space: nowrap }
.lens { border-collapse: separate; border-spacing: 1px } .lens tr + tr { border: 0 }
.lens td.same { border-color: #d9601a } .key { display: inline-block; width: .9em; height: .9em; border-radius: 2px }
"""


def escape(value) -> str:
    return html.escape(str(value))


def rows_of(cells, header=False) -> str:
    """One row of a table; numbers do not break."""
    tag = "th" if header else "td"
    number = ' class="n"' if not header else ""
    return "<tr>" + "".join(f"<{tag}{number if i else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"


def table_of(header, rows) -> str:
    body = "".join(map(rows_of, rows))
    return f'<div class="wide"><table>{rows_of(header, True)}{body}</table></div>'


@dataclasses.dataclass
class Report:
    """What a run has written."""

    folder: Path
    colour: str

    def __post_init__(self) -> None:
        if not (self.folder / "metrics.jsonl").is_file():
            raise UserError(f"{self.folder} is no run: it has no metrics.jsonl")
        text = (self.folder / "config.toml").read_text(encoding="utf-8")
        self.commit = text.partition("\n")[0].rpartition(" ")[2]
        ((self.table, self.settings),) = tomllib.loads(text).items()
        self.metrics = plumbing.read_metrics(self.folder)
        if not self.metrics:
            raise UserError(f"{self.folder} has not finished a step yet")
        scores = self.folder / "held_out.json"
        self.scores = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {}

    @property
    def name(self) -> str:
        return f'<span class="key" style="background:{self.colour}"></span> {escape(self.folder)}'

    def score(self, index: int) -> str:
        if not self.scores:
            return "-"
        found = list(self.scores.values())[index]
        return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f} %"

    def rollouts(self) -> tuple[int, list[dict]]:
        """Of the last step that was written."""
        files = sorted(self.folder.glob("rollouts/step_*.jsonl"))
        if not files:
            return 0, []
        lines = files[-1].read_text(encoding="utf-8").splitlines()
        return int(files[-1].stem[5:]), [json.loads(line) for line in lines]


def summary(runs: list[Report]) -> str:
    header = ("run", "table", "steps", "held out, before", "after", "reward, first", "last", "hours", "commit")
    rows = []
    for run in runs:
        first, last = run.metrics[0], run.metrics[-1]
        hours = sum(row["seconds"] for row in run.metrics) / 3600
        numbers = f"{first['reward']:.3f}", f"{last['reward']:.3f}", f"{hours:.2f}"
        scores = run.score(0), run.score(-1)
        rows.append((run.name, escape(run.table), last["step"], *scores, *numbers, escape(run.commit)))
    note = '<p class="muted">Held out: ± the standard error over problems. Hours: of the steps.</p>'
    return table_of(header, rows) + note


def settings(runs: list[Report]) -> str:
    names = sorted(set().union(*(run.settings for run in runs)) - {"output_dir", "resume"})
    values = {name: [json.dumps(run.settings.get(name), ensure_ascii=False) for run in runs] for name in names}
    header = ("field", *(run.name for run in runs))
    differing = [(escape(n), *map(escape, v)) for n, v in values.items() if len(set(v)) > 1]
    every = [(escape(n), *map(escape, v)) for n, v in values.items()]
    page = table_of(header, differing) if differing else ""
    return page + f"<details><summary>all settings</summary>{table_of(header, every)}</details>"


def curves(runs: list[Report]) -> str:
    pictures = []
    for name, title in CURVES.items():
        if all(row.get(name) is None for run in runs for row in run.metrics):
            continue
        figure, axis = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        for run in runs:
            points = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
            axis.plot(*zip(*points), color=run.colour) if points else None
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        plt.close(figure)
        pictures.append("<div>" + text.getvalue()[text.getvalue().index("<svg") :] + "</div>")
    return f'<div class="grid">{"".join(pictures)}</div>'


def held_out(runs: list[Report]) -> str:
    rows = []
    for run in runs:
        for step, found in run.scores.items():
            accuracy, error = 100 * found["accuracy"], 100 * found["standard_error"]
            drawn = f"{found['problems']} x {found['samples']}"
            rows.append((run.name, step, f"{accuracy:.2f} %", f"{error:.2f}", drawn))
    return table_of(("run", "step", "right", "standard error", "problems x samples"), rows) if rows else "<p>None.</p>"


def rollouts(runs: list[Report], problems: int, answers: int) -> str:
    """The same problems of every run, if they were written at the same step."""
    groups = []
    for run in runs:
        step, rows = run.rollouts()
        chosen = list(dict.fromkeys(row["row"] for row in rows))[:problems]
        groups.append([(step, [row for row in rows if row["row"] == number]) for number in chosen])
    page = []
    for place in range(max(map(len, groups), default=0)):
        columns = []
        for run, group in zip(runs, groups):
            if place < len(group):
                step, rows = group[place]
                right = sum(row["reward"] for row in rows)
                prompt = f"<pre><b>{escape(rows[0]['prompt'][-600:])}</b></pre>"
                parts = [f"<h3>{run.name}, step {step}: {right:.0f} of {len(rows)} right</h3>{prompt}"]
                for row in rows[:answers]:
                    kind, advantage = "right" if row["reward"] else "wrong", row["advantage"]
                    shown = f"{advantage:+.2f}" if isinstance(advantage, float) else "by token"
                    facts = f"reward {row['reward']:.0f}, advantage {shown}, {row['tokens']} tokens"
                    response = f"<pre>{escape(row['response'])}</pre>"
                    parts.append(f'<div class="rollout {kind}"><span class="muted">{facts}</span>{response}</div>')
                columns.append(f"<div>{''.join(parts)}</div>")
        page.append(f'<div class="grid">{"".join(columns)}</div>')
    return "".join(page) or "<p>None was written; see rollouts_every.</p>"


def lens_tables(runs: list[Report], count: int, tokens: int) -> str:
    page = []
    for run in runs:
        page.append(f"<h3>{run.name}</h3>")
        try:
            opened = lens.open_place(str(run.folder), [])
        except UserError as problem:  # no weights yet, or the model has gone: the rest of the page stands
            page.append(f"<p>{escape(problem)}</p>")
            continue
        layers = lens.shown_layers(len(opened.model.taps), opened.config.student_layer, 16)
        for problem, rollout in zip(opened.problems, opened.sample(count)):
            rollout.response_ids = rollout.response_ids[:tokens]
            cells = lens.lens_cells(opened, rollout)
            low, high = min(0, *(logit for row in cells for _, logit in row)), max(logit for _, logit in cells[-1])
            said = [opened.token(index) for index in rollout.response_ids]
            rows = [rows_of(["said", *map(escape, said)], True)]
            for layer in reversed(layers):
                marks = {opened.config.student_layer: "student", len(cells) - 1: "final"}
                row = f"<th>{layer} {marks.get(layer, '')}</th>"
                for place, (index, logit) in enumerate(cells[layer]):
                    same, word = ' class="same"' if index == cells[-1][place][0] else "", opened.token(index)
                    shade = f"rgba(31,111,180,{0.7 * min(1, (logit - low) / max(high - low, 1e-9)):.2f})"
                    row += f'<td{same} style="background:{shade}" title="{logit:.2f}">{escape(word)}</td>'
                rows.append(f"<tr>{row}</tr>")
            prompt = opened.tokenizer.decode(problem.prompt_ids, skip_special_tokens=True)
            page.append(f"<pre><b>{escape(prompt[-300:])}</b>   gold {escape(problem.answer)}</pre>")
            page.append(f'<div class="wide"><table class="lens">{"".join(rows)}</table></div>')
    note = "Each layer's first choice for the next token; darker: a higher logit. Framed: the last layer's choice too."
    return f'<p class="muted">{note}</p>' + "".join(page)


def build(folders: list[str], options) -> str:
    runs = [Report(Path(f), COLOURS[i % len(COLOURS)]) for i, f in enumerate(folders)]
    parts = {"Runs": summary(runs), "Settings" + (" that differ" if len(runs) > 1 else ""): settings(runs)}
    parts |= {"Curves": curves(runs), "Held-out scores": held_out(runs)}
    parts["Rollouts"] = rollouts(runs, options.problems, options.answers)
    if options.lens:
        parts["What each layer would have said"] = lens_tables(runs, options.lens, options.tokens)
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in parts.items())
    title = escape(" and ".join(folders))
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{body}</body></html>\n'


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--problems", type=int, default=2, help="whose rollouts are shown (default: 2)")
    parser.add_argument("--answers", type=int, default=4, help="rollouts of each (default: 4)")
    parser.add_argument("--lens", type=int, default=2, help="problems through the lens (default: 2)")
    parser.add_argument("--tokens", type=int, default=40, help="of a response through the lens (default: 40)")
    options = parser.parse_args(words)
    try:
        page = build(options.runs, options)
    except (UserError, FileNotFoundError) as problem:
        print(f"report: error: {problem}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    plumbing.write_atomically(options.output, page)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
