r"""The paper's pictures, of any run or checkpoint.

    python tools/lens.py table PLACE                what each layer would say next, word by word (Fig. 2)
    python tools/lens.py table PLACE PLACE          student and final layer alone, one model below the other (Fig. 7)
    python tools/lens.py attention PLACE            where student and final layer look, in prompt and response (Fig. 6a)
    python tools/lens.py layers PLACE [PLACE ...]   each layer: distance to the last, certainty, score if it answered
    python tools/lens.py agreement RUN [RUN ...]    agreement of the two in attention, by checkpoint and word (Fig. 6b)
    python tools/lens.py scores RUN [RUN ...]       held-out score by step (Fig. 8; set `eval_every`)
    python tools/lens.py norms RUN [RUN ...]        gradient norm of both losses (Fig. 9; set `gradient_norms_every`)
    python tools/lens.py responses RUN RUN          answers to the same problem side by side (Fig. 10)

Figure 5 is every run's curves.png. Axes, order of layers and outlines are the paper's.

A place is a run's folder (its `final/`, else its newest checkpoint), a checkpoint in it, or a model's name or folder;
PLACE=NAME names it in the picture, and `layers` averages places of one name, with a band of one standard deviation.
Problems and settings are the run's, of a model those of `--config FILE:TABLE`; any field of the config may follow.
Held-out problems are used where there are some. Computed in float32; rollouts are Transformers'.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import statistics
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded_state

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from sweep import t_interval

import laptop
import oisd
import plumbing
from grader import Grader
from settings import UserError, derive_seed

DPI = 110


# ----------------------------------------------------- Models and their rollouts -------------------------------------


@dataclass
class Opened:
    place: str
    name: str
    config: oisd.Config
    tokenizer: object
    model: oisd.TappedModel
    end_ids: list[int]
    problems: list

    def sample(self, count: int) -> list[oisd.Rollout]:
        """A response to each of the first `count` problems, in order; the same draws for every model of one seed."""
        prompts = [problem.prompt_ids for problem in self.problems[:count]]
        seeds = [derive_seed(self.config.seed, "lens", index) for index in range(len(prompts))]
        sampler = laptop.HfSampler(self.model.model, self.end_ids, self.config, self.model.head.device)
        return [oisd.Rollout(prompts[s[0]], *s[1:]) for s in sorted(sampler.stream(prompts, seeds))]

    def one(self, place: int, tokens: int) -> tuple[oisd.Problem, oisd.Rollout]:
        """A problem and the start of a response to it. Raises: UserError."""
        if place >= len(self.problems):
            raise UserError(f"--problem {place}: {self.name} has {len(self.problems)} problems, counted from 0")
        rollout = self.sample(place + 1)[place]
        return self.problems[place], dataclasses.replace(rollout, response_ids=rollout.response_ids[:tokens])

    def token(self, index: int) -> str:
        return self.tokenizer.decode([index]).replace("\n", "↵").replace(" ", "·") or "∅"


def run_of(place: Path) -> Path | None:
    return next((folder for folder in (place, *place.parents) if (folder / "config.toml").is_file()), None)


def written_settings(run: Path) -> dict:
    (values,) = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).values()
    return values


def settings_of(run: Path | None, place: str, words: list[str]) -> oisd.Config:
    """Of the table that `--config` names, else of the run; the words on top. Raises: UserError."""
    if run is None or "--config" in words:
        if run is None and "--config" not in words and place != "tiny_model":
            raise UserError(f"{place} is no run: name the table of its problems by --config FILE:TABLE")
        return oisd.load_config(words)[1]
    values = written_settings(run)
    known = {field.name for field in dataclasses.fields(oisd.Config)}
    values = {name: value for name, value in values.items() if name in known}  # a baseline has more
    given, _ = oisd.Parser(oisd.Config, "lens.py", "").given(words)
    return oisd.Config(**values | given | {"advantage": "grpo"})  # it plays no part here, and baselines have their own


def open_place(place: str, words: list[str]) -> Opened:
    """Load a model, its tokenizer and its problems. Raises: UserError."""
    name = place
    if "=" in place and not Path(place).exists():
        place, _, name = place.rpartition("=")
    path, checkpoint = Path(place), None
    run = run_of(path)
    config = settings_of(run, place, words)
    weights = path
    if run == path:
        found = plumbing.checkpoints(run)
        weights = run / "final" if (run / "final").exists() or not found else found[-1]
        if not weights.exists():
            raise UserError(f"{place} has neither final/ nor a checkpoint yet")
    if weights.name.startswith("step_"):
        checkpoint = weights
    else:
        config = dataclasses.replace(config, model=str(weights), lora_rank=0)
    config = dataclasses.replace(config, dtype="float32", attention="sdpa", spread_weights=False)
    if config.model == "tiny_model":
        laptop.make()
    tokenizer, (loaded, _) = oisd.load_tokenizer(config), oisd.load_model(config)
    end_ids = oisd.end_token_ids(loaded.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.test_data or config.train_data, tokenizer, config)
    model = oisd.TappedModel(loaded, config)
    if checkpoint:
        options = sharded_state.StateDictOptions(ignore_frozen_params=True)
        state = {"model": sharded_state.get_model_state_dict(model, options=options)}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)  # into the model's own tensors
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(place, name, config, tokenizer, model, end_ids, problems)


@torch.no_grad()
def look(opened: Opened, rollouts: list[oisd.Rollout]):
    """For each micro-batch, it and the hidden states (layers, N, D) of what predicts the responses; all taps filled."""
    model, config = opened.model, opened.config
    for part in oisd.micro_batches(rollouts, config.max_tokens_per_gpu):
        batch = oisd.pack([rollouts[i] for i in part], config, model.head.device)
        with model.recording(*model.taps, packed=True):
            model.decode(model.model.get_decoder(), batch)
        yield batch, torch.stack([tap.hidden[0, batch.predicted - 1] for tap in model.taps])
        model.clear_taps()


def layer_logits(model: oisd.TappedModel, hidden: Tensor, layer: int) -> Tensor:
    """Read a layer, counted from 1, by the lens of the config; the last one always through the final norm."""
    return model.lens(hidden, model.config.lens_norm or layer == len(model.taps))


@torch.no_grad()
def measure_layers(opened: Opened, rollouts: list[oisd.Rollout]) -> list[dict[str, float]]:
    """Of every layer, means over response tokens (attention: over sampled decoding steps), in nats.

    `think_js` and `attention_js` to the last layer, `entropy` of the lens, `agreement`: share of tokens that the lens
    ranks first where the last layer does too.
    """
    model, config = opened.model, opened.config
    layers = len(model.taps)
    totals, tokens, steps = torch.zeros(4, layers, dtype=torch.float64), 0, 0
    for batch, hidden in look(opened, rollouts):
        for rows in hidden.split(config.lens_chunk_tokens, dim=1):
            final = model.lens(rows[-1]) / config.distill_temperature
            for layer in range(layers):
                logits = layer_logits(model, rows[layer], layer + 1) / config.distill_temperature
                logprobs = logits.log_softmax(-1)
                totals[0, layer] += oisd.js_divergence(logits, final).double().sum().cpu()
                totals[1, layer] -= (logprobs.exp() * logprobs).double().sum().cpu()
                totals[2, layer] += (logits.argmax(-1) == final.argmax(-1)).sum().cpu()
        for layer, tap in enumerate(model.taps):
            totals[3, layer] += oisd.attention_js(tap, model.taps[-1], batch, config).double().sum().cpu()
        tokens, steps = tokens + len(batch.predicted), steps + len(batch.queries)
    means = totals / torch.tensor([[tokens], [tokens], [tokens], [steps]])
    names = ("think_js", "entropy", "agreement", "attention_js")
    return [{"layer": layer + 1, **dict(zip(names, means[:, layer].tolist()))} for layer in range(layers)]


@contextlib.contextmanager
def early_exit(model: oisd.TappedModel, layer: int):
    """Let the model end after this layer, so that its lens answers."""
    decoder = model.model.get_decoder()
    norm = getattr(decoder, model.norm_name)
    if not model.config.lens_norm and layer < len(model.taps):
        setattr(decoder, model.norm_name, nn.Identity())
    name = next(name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList))
    whole = getattr(decoder, name)
    setattr(decoder, name, whole[:layer])
    decoder.config.num_hidden_layers = layer
    try:
        yield
    finally:
        setattr(decoder, name, whole)
        setattr(decoder, model.norm_name, norm)
        decoder.config.num_hidden_layers = len(whole)


def exit_score(opened: Opened, grader: Grader, layer: int, count: int) -> tuple[float, float]:
    """Share of right answers if this layer's lens answered, and its standard error over problems."""
    with early_exit(opened.model, layer):
        rollouts = opened.sample(count)
    texts = [opened.tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    rewards = grader.grade(texts, [problem.answer for problem in opened.problems[:count]])
    error = statistics.stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else 0.0
    return statistics.fmean(rewards), error


# ----------------------------------------------------- Pictures -----------------------------------------------------


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    print(path)


@torch.no_grad()
def lens_cells(opened: Opened, rollout: oisd.Rollout) -> list[list[tuple[int, float]]]:
    """By layer, from 0, the embeddings: for each response token, the token that the lens ranks first and its logit."""
    model, first = opened.model, []
    hook = model.layers[0].register_forward_pre_hook(
        lambda _, taken, named: first.append(taken[0] if taken else named["hidden_states"]), with_kwargs=True
    )
    try:
        ((batch, hidden),) = look(opened, [rollout])
    finally:
        hook.remove()
    states, cells = [first[0][0, batch.predicted - 1], *hidden], []
    for layer, state in enumerate(states):
        best = layer_logits(model, state, layer).max(-1)
        cells.append(list(zip(best.indices.tolist(), best.values.tolist())))
    return cells


def table(places: Iterable[Opened], options) -> None:
    """Rows: layers, the last on top. Colour: the first token's logit. Outlined: what the last layer ranks first too.

    Of several places the student and the final layer alone, all over the tokens of the first one's response.
    """
    first, *_ = places = list(places)
    problem, rollout = first.one(options.problem, options.tokens)
    if len({(len(opened.tokenizer), len(opened.model.taps)) for opened in places}) > 1:
        raise UserError("the places differ in vocabulary or layers: draw a table of each")
    depth, said = len(first.model.taps), [first.token(index) for index in rollout.response_ids]
    rows, labels = [], []  # from the top: the cells of a layer and of its last one
    for opened in places:
        cells, student = lens_cells(opened, rollout), opened.config.student_layer
        shown = shown_layers(depth, student, options.layers) if len(places) == 1 or options.layers else [student, depth]
        for layer in reversed(shown):
            rows.append((cells[layer], cells[-1] if layer < depth else None))
            name = f"{opened.name}\n" if len(places) > 1 else ""
            labels.append(name + ("h_out" if layer == depth else f"h{layer}_out"))
    logits = [[logit for _, logit in row] for row, _ in rows]
    final = [max(row) for row, label in zip(logits, labels) if label.endswith("h_out")]
    least, most = min(0, math.floor(min(map(min, logits)))), math.ceil(max(final))  # tied embeddings may lie far above
    height = 0.3 * len(rows) * (1 + 0.4 * (len(places) > 1))
    figure, axis = plt.subplots(figsize=(max(5.0, 0.6 * len(said) + 1.2), height + 1.6), layout="constrained")
    image = axis.imshow(logits, cmap="Blues", vmin=least, vmax=most, aspect="auto")
    for y, (row, last) in enumerate(rows):
        for x, (index, logit) in enumerate(row):
            word = first.token(index)
            short = word if len(word) < 9 else word[:7] + "…"
            colour = "white" if logit - least > 0.6 * (most - least) else "black"
            axis.text(x, y, short, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
            agrees = last is not None and index == last[x][0]
            edge = {"linewidth": 1.8, "zorder": 3} if agrees else {"linewidth": 0.5}
            axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", **edge))
    axis.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    axis.set_xticks(range(len(said)), said, fontsize=8, rotation=40, ha="left", parse_math=False)
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    bar = figure.colorbar(image, location="top", shrink=0.6, aspect=40, ticks=[least, most])
    bar.outline.set_visible(False)
    figure.supxlabel(f"{question(first, problem)}   gold: {problem.answer}", fontsize=8, parse_math=False)
    save(figure, options.output)


def question(opened: Opened, problem) -> str:
    """The end of a prompt, in one line."""
    lines = opened.tokenizer.decode(problem.prompt_ids, skip_special_tokens=True).strip().splitlines()
    return "… " + " / ".join(line.strip() for line in lines if line.strip())[-60:]


def shown_layers(count: int, student: int, most: int) -> list[int]:
    """At most about `most` of the layers, evenly spaced from 0, the last and the student's among them."""
    return sorted({*range(0, count, -(-count // most)), student, count})


@torch.no_grad()
def attention(places: Iterable[Opened], options) -> None:
    """What the last quarter of a response looks at: words of prompt and response, mean over heads, student and final.

    Each layer's weights are by word, relative to its largest; the first word, which takes what looks at nothing, apart.
    """
    (opened,) = places
    model = opened.model
    _, rollout = opened.one(options.problem, options.tokens)
    words, owners = split_words([opened.token(index) for index in rollout.prompt_ids + rollout.response_ids])
    figure, axes = plt.subplots(2, figsize=(9, 1.0 + 0.6 * (len("".join(words)) // WIDTH + 1)), layout="constrained")
    for batch, _ in look(opened, [rollout]):
        queries = (batch.predicted - 1)[3 * len(batch.predicted) // 4 :]
        keys = torch.arange(batch.lengths[0], device=queries.device).expand(len(queries), -1)  # (n, T)
        for axis, layer in zip(axes, (opened.config.student_layer, len(model.taps))):
            scores = oisd.attention_scores(model.taps[layer - 1], queries, keys, keys <= queries[:, None])
            seen = scores.softmax(-1).mean((0, 1)).float().cpu()  # (T,)
            by_word = torch.zeros(len(words)).index_add_(0, torch.tensor(owners), seen)
            name = "final layer" if layer == len(model.taps) else f"layer {layer}"
            axis.set_title(f"{opened.name}, {name}; first word: {100 * by_word[0]:.0f} %", fontsize=9, loc="left")
            highlight(axis, words, [0.0, *(by_word[1:] / by_word[1:].max()).tolist()])
    save(figure, options.output)


WIDTH = 90  # characters of a line of highlighted text


def highlight(axis, words: list[str], weights: list[float]) -> None:
    """Words as running text, each on a ground that is the darker, the larger its weight, from 0 to 1."""
    row, column = 0, 0
    for word, weight in zip(words, weights):
        if column + len(word) > WIDTH:
            row, column = row + 1, 0
        ground = plt.get_cmap("Purples")(0.9 * weight)
        axis.add_patch(plt.Rectangle((column, row - 0.45), len(word), 0.9, facecolor=ground, linewidth=0))
        style = {"family": "monospace", "fontsize": 7.5, "color": "white" if weight > 0.6 else "black"}
        text = word.replace("·", " ")
        axis.text(column + len(word) / 2, row, text, ha="center", va="center", parse_math=False, **style)
        column += len(word)
    axis.set(xlim=(0, WIDTH), ylim=(row + 0.6, -0.6))
    axis.axis("off")


def split_words(tokens: list[str]) -> tuple[list[str], list[int]]:
    """Join tokens to words; any sign but letters and digits starts and ends one. -> words, the word of each token."""
    words, owners = [], []
    for token in tokens:
        if not words or not (token[0].isalnum() and words[-1][-1].isalnum()):
            words.append("")
        words[-1] += token
        owners.append(len(words) - 1)
    return words, owners


def layers(places: Iterable[Opened], options) -> None:
    """`measure_layers` of each place on rollouts of its own, and the score of an early exit: a CSV file, a picture.

    If the last two names have as many places each: also the last less the other, paired in order, with 95 % intervals.
    """
    rows = []
    with Grader(workers=2) as grader:
        for opened in places:
            found = measure_layers(opened, opened.sample(options.problems))
            for row in found:
                score, error = exit_score(opened, grader, row["layer"], options.problems)
                names = {"name": opened.name, "place": opened.place}
                rows.append({**names, **row, "exit_score": score, "exit_error": error})
            print(f"{opened.name}: {len(found)} layers", flush=True)
    path = options.output.with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    titles = {
        "think_js": "JS to the last layer (nats)",
        "attention_js": "attention JS to the last layer (nats)",
        "entropy": "entropy of the lens (nats)",
        "agreement": "share of tokens ranked first as by the last layer",
        "exit_score": "share right if the layer answered",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(3.6 * len(titles), 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items()):
        columns: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            columns.setdefault(row["name"], {}).setdefault(row["layer"], []).append(row[name])
        for label, by_layer in columns.items():
            means = [statistics.fmean(values) for values in by_layer.values()]
            bands = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_layer.values()]
            axis.plot(list(by_layer), means, marker=".", label=label)
            edges = [[mean + sign * band for mean, band in zip(means, bands)] for sign in (-1, 1)]
            axis.fill_between(list(by_layer), *edges, alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
        *_, (one, base), (two, other) = (("", {}), *columns.items())
        for layer in base.keys() & other.keys():
            gains = [mine - its for its, mine in zip(base[layer], other[layer])]
            if len(gains) > 1 and len(base[layer]) == len(other[layer]):
                gain = f"{statistics.fmean(gains):+.4f} ± {t_interval(gains):.4f}"
                print(f"{name}, layer {layer}: {two} less {one} {gain}")
    axes[0].legend(fontsize=7)
    save(figure, options.output)


def agreement(runs: list[str], options, words: list[str]) -> None:
    """1 - JS / log 2 of both layers' attention: by checkpoint, at each word of a response of the run's first one.

    Prints its mean over the sampled steps of `--problems` responses, likewise the same for all checkpoints of a run.
    """
    size = {"figsize": (9, 0.5 + 2.3 * len(runs)), "layout": "constrained"}
    figure, axes = plt.subplots(len(runs), squeeze=False, **size)
    images = []
    for run, axis in zip(runs, axes[:, 0]):
        stored = plumbing.checkpoints(Path(run))
        if not stored:
            raise UserError(f"{run} has no checkpoint; see checkpoint_every and checkpoints_kept")
        rollouts, cells = None, []
        for place in stored:
            opened = open_place(str(place), words)
            if not rollouts:
                rollouts, (_, shown) = opened.sample(options.problems), opened.one(options.problem, options.tokens)
                said, owners = split_words([opened.token(index) for index in shown.response_ids])
            student = measure_layers(opened, rollouts)[opened.config.student_layer - 1]
            print(f"{place}: {1 - student['attention_js'] / math.log(2):.4f}", flush=True)
            cells.append(agreement_by_word(opened, shown, torch.tensor(owners)))
        images.append(axis.imshow(cells, cmap="Purples", aspect="auto"))
        axis.set_yticks(range(len(stored)), [str(int(place.name[5:])) for place in stored])
        axis.set_xticks(range(len(said)), said, rotation=45, ha="right", fontsize=8, parse_math=False)
        axis.set_ylabel("Training step")
        axis.set_title(run, fontsize=9, loc="left")
    low, high = min(image.norm.vmin for image in images), max(image.norm.vmax for image in images)
    for image in images:
        image.set_clim(low, high)
    figure.colorbar(images[0], ax=axes[:, 0], label="Similarity")
    save(figure, options.output)


@torch.no_grad()
def agreement_by_word(opened: Opened, rollout: oisd.Rollout, owners: Tensor) -> list[float]:
    """1 - JS / log 2 of student's and final layer's attention where each word is predicted, mean over its tokens."""
    config, model = dataclasses.replace(opened.config, attention_steps=len(owners)), opened.model
    for batch, _ in look(dataclasses.replace(opened, config=config), [rollout]):
        js = oisd.attention_js(model.student_tap, model.taps[-1], batch, config).float().cpu()
    sums = torch.zeros(int(owners[-1]) + 1).index_add_(0, owners, 1 - js / math.log(2))
    return (sums / owners.bincount()).tolist()


def scores(runs: list[str], options) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for run in runs:
        found = json.loads((Path(run) / "held_out.json").read_text(encoding="utf-8"))
        values, errors = zip(*((100 * s["accuracy"], 100 * s["standard_error"]) for s in found.values()))
        axis.errorbar([int(step) for step in found], values, errors, marker="o", capsize=3, label=run)
    axis.set(title="held-out problems right, standard error over problems", xlabel="step", ylabel="%")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, options.output)


def norms(runs: list[str], options) -> None:
    """Of L_think and L_attn themselves: the logged norms are those of the weighted losses."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 3.6), layout="constrained", squeeze=False)
    for run, axis in zip(runs, axes[0]):
        if not (Path(run) / "config.toml").is_file():
            raise UserError(f"{run} is no run")
        settings = written_settings(Path(run))
        rows = plumbing.read_metrics(Path(run))
        for loss, label, colour in (("think", "think", "tab:blue"), ("attention", "attn", "tab:orange")):
            weight, name = settings[f"{loss}_weight"], f"grad_norm_{loss}"
            points = [(row["step"], row[name] / weight) for row in rows if name in row]
            axis.plot(*zip(*points), linewidth=2, label=label, color=colour) if points else None
        if not axis.lines:
            weights = ", ".join(f"{name} = {settings[name]}" for name in ("think_weight", "attention_weight"))
            raise UserError(f"{run}, {weights}, has no gradient norms of them: train with --gradient_norms_every 1")
        axis.set(xlabel="Training step", ylabel="Gradient Norm")
        axis.set_title(run, fontsize=9)
        axis.grid()
        axis.legend(loc="lower right")
    save(figure, options.output)


def responses(runs: list[str], options) -> None:
    """Of the newest step that all runs have written, the first `--answers` responses to one problem."""
    stored = [{path.name: path for path in Path(run).glob("rollouts/step_*.jsonl")} for run in runs]
    common = sorted(set.intersection(*(set(files) for files in stored)))
    if not common:
        raise UserError("the runs have no step in common whose rollouts were written; see rollouts_every")
    found = []
    for files in stored:
        lines = [json.loads(line) for line in files[common[-1]].read_text(encoding="utf-8").splitlines()]
        asked = sorted({line["row"] for line in lines})
        if options.problem >= len(asked):
            raise UserError(f"--problem {options.problem}: that step has {len(asked)} problems, counted from 0")
        found.append([line for line in lines if line["row"] == asked[options.problem]])
    if len({group[0]["prompt"] for group in found}) > 1:
        raise UserError("the runs were asked other problems at that step: their seeds or data differ")
    columns = []
    for run, group in zip(runs, found):
        parts = [f"{run}, step {int(common[-1][5:11])}: {sum(r['reward'] for r in group):.0f} of {len(group)} right"]
        for row in group[: options.answers]:
            parts += ["", f"[{row['reward']:.0f}]  {row['response']}"]
        columns.append([piece for part in parts for piece in textwrap.wrap(part, 70) or [""]])
    prompt = textwrap.wrap(found[0][0]["prompt"], 140)[-4:]
    height = 0.19 * (max(map(len, columns)) + len(prompt) + 3)
    figure = plt.figure(figsize=(6.3 * len(runs), height))
    figure.text(
        0.01, 0.98, "\n".join(prompt), va="top", fontsize=8, family="monospace", weight="bold", parse_math=False
    )
    for place, lines in enumerate(columns):
        position = 0.01 + place / len(runs), 0.98 - 0.19 * (len(prompt) + 1) / height
        figure.text(*position, "\n".join(lines), va="top", fontsize=8, family="monospace", parse_math=False)
    save(figure, options.output)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"table": table, "attention": attention, "layers": layers}  # of models
    logs = {"scores": scores, "norms": norms, "responses": responses}  # of what runs have written
    parser.add_argument("kind", choices=[*kinds, "agreement", *logs])
    parser.add_argument("places", nargs="+", metavar="PLACE")
    parser.add_argument("--output", type=Path, help="a .png file (default: lens-KIND.png)")
    parser.add_argument("--problem", type=int, default=0, help="which problem, from 0 (not for layers, scores, norms)")
    parser.add_argument("--problems", type=int, default=128, help="how many (layers, agreement; default: 128)")
    parser.add_argument("--tokens", type=int, default=0, help="of a response (13; agreement 40; attention 200)")
    parser.add_argument("--layers", type=int, default=0, help="rows, about (table; default: 18, of several places two)")
    parser.add_argument("--answers", type=int, default=3, help="of each run (responses; default: 3)")
    options, rest = parser.parse_known_args(words)
    if options.kind in logs and rest:
        parser.error(f"{options.kind} reads what the runs have written, and takes no {rest[0]}")
    if options.kind == "attention" and len(options.places) > 1:
        parser.error("attention draws one place at a time")
    options.output = options.output or Path(f"lens-{options.kind}.png")
    options.tokens = options.tokens or {"table": 13, "agreement": 40}.get(options.kind, 200)
    options.layers = options.layers or (18 if len(options.places) == 1 else 0)
    try:
        if options.kind in kinds:
            kinds[options.kind]((open_place(place, rest) for place in options.places), options)
        elif options.kind == "agreement":
            agreement(options.places, options, rest)
        else:
            logs[options.kind](options.places, options)
    except (UserError, FileNotFoundError) as problem:
        print(f"lens: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
