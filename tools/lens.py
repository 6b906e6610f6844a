"""What the layers of a model would say, as the paper's pictures, and which layer its rule takes as the student.

    python tools/lens.py table PLACE             each layer's first choice for the next token (Fig. 2)
    python tools/lens.py table PLACE PLACE       student and final layer only, one model below the other (Fig. 7)
    python tools/lens.py layers PLACE [PLACE ...]   every layer's distance to the last one, as CSV
    python tools/lens.py rule MODEL              the layer rule: the change of the lens entropy around every FFN

A place is the folder of a finished run, or a model's name or folder. PLACE=NAME names it. Problems and settings are the
run's; for a model, those of `--config FILE:TABLE`. Any field of the config may follow. Held-out problems are used where
there are some. Computed in float32; rollouts come from Transformers.

The rule (the paper, after BuPO). H is the entropy of the lens, averaged over response tokens of own rollouts:

    signal_l = H(after the FFN of layer l) - H(before it)                    student = max { l < L : signal_l > 0 }

The residual stream is the H of Eq. 2, read with the final norm, as in Eq. 5, and without it, as in BuPO's code.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import problems
from support.settings import Parser, UserError, derive_seed, run_settings


@dataclass
class Opened:
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
        sampler = oisd.hf_sampler(self.config, self.model.model, self.end_ids, self.model.head.device)
        return [oisd.Rollout(prompts[s[0]], *s[1:]) for s in sorted(sampler.stream(prompts, seeds))]

    def one(self, place: int, tokens: int) -> tuple[problems.Problem, oisd.Rollout]:
        """A problem and the start of a response to it. Raises: UserError."""
        if place >= len(self.problems):
            raise UserError(f"--problem {place}: {self.name} has {len(self.problems)} problems, counted from 0")
        rollout = self.sample(place + 1)[place]
        return self.problems[place], dataclasses.replace(rollout, response_ids=rollout.response_ids[:tokens])

    def token(self, index: int) -> str:
        return self.tokenizer.decode([index]).replace("\n", "↵").replace(" ", "·") or "∅"


def settings_of(place: Path, words: list[str]) -> oisd.Config:
    """Read the table that `--config` names, else a run's own; the words on top. Raises: UserError."""
    if "--config" in words:
        return oisd.load_config(words)[1]
    if not (place / "config.toml").exists():
        raise UserError(f"{place} is no run: name the table of its problems by --config FILE:TABLE")
    given, _ = Parser(oisd.Config, "lens.py", "").given(words)
    return run_settings(place, oisd.Config, given)


def open_place(place: str, words: list[str]) -> Opened:
    """Load a model, its tokenizer and its problems. Raises: UserError."""
    name = place
    if "=" in place and not Path(place).exists():
        place, _, name = place.rpartition("=")
    config = settings_of(Path(place), words)
    if (Path(place) / "config.toml").exists():
        place = f"{place}/final"
        if not Path(place).exists():
            raise UserError(f"{place} does not exist: the run is not finished")
    plain = {"lora_rank": 0, "spread_weights": False, "dtype": "float32", "attention": "sdpa"}
    config = dataclasses.replace(config, model=place, **plain)
    tokenizer, (loaded, _) = problems.load_tokenizer(config.model, config.chat_template), oisd.load_model(config)
    end_ids = problems.end_token_ids(loaded.generation_config, tokenizer, loaded.config.vocab_size)
    found, _ = oisd.load_problems(config.test_data or config.train_data, tokenizer, config)
    model = oisd.TappedModel(loaded, config)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(name, config, tokenizer, model, end_ids, found)


@torch.no_grad()
def look(opened: Opened, rollouts: list[oisd.Rollout]) -> Iterator[tuple[oisd.PackedBatch, list[Tensor]]]:
    """Yield micro-batches, each with the hidden states that predict its responses, (N, D) by layer; all taps filled.

    Layer 0 are the token embeddings.
    """
    model, config = opened.model, opened.config
    for part in oisd.my_micro_batches(rollouts, config.max_tokens_per_gpu):
        batch = oisd.pack([rollouts[i] for i in part], config, model.head.device)
        with model.recording(*model.taps, packed=True):
            model.decode(model.model.get_decoder(), batch)
        embeddings = model.model.get_input_embeddings()(batch.input_ids)
        states = [embeddings, *(tap.hidden for tap in model.taps)]
        yield batch, [state[0, batch.predicted - 1] for state in states]
        model.clear_taps()


def layer_logits(model: oisd.TappedModel, hidden: Tensor, layer: int) -> Tensor:
    """Read a layer, counted from 1, by the lens of the config; the last one always through the final norm."""
    return model.lens(hidden, model.config.lens_norm or layer == len(model.taps))


def lens_cells(opened: Opened, rollout: oisd.Rollout) -> list[list[tuple[int, float]]]:
    """By layer, from 0, the embeddings: for each response token, the token that the lens ranks first and its logit."""
    cells = []
    for _, states in look(opened, [rollout]):
        for layer, state in enumerate(states):
            best = layer_logits(opened.model, state, layer).max(-1)
            cells.append(list(zip(best.indices.tolist(), best.values.tolist())))
    return cells


def table(places: Iterable[Opened], options) -> None:
    """Rows: layers, the last on top. Color: the first token's logit. Outlined: what the last layer ranks first too.

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
        shown = {student, depth}
        if options.layers:  # about that many, evenly spaced
            shown |= {*range(0, depth, -(-depth // options.layers))}
        for layer in sorted(shown, reverse=True):
            rows.append((cells[layer], cells[-1] if layer < depth else None))
            name = f"{opened.name}\n" if len(places) > 1 else ""
            labels.append(name + ("h_out" if layer == depth else f"h{layer}_out"))
    logits = [[logit for _, logit in row] for row, _ in rows]
    final = [max(row) for row, label in zip(logits, labels) if label.endswith("h_out")]
    least, most = min(0, math.floor(min(map(min, logits)))), math.ceil(max(final))  # tied embeddings may lie far above
    height = 0.3 * len(rows) * (1 + 0.4 * (len(places) > 1))
    figure = Figure(figsize=(max(5.0, 0.6 * len(said) + 1.2), height + 1.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(logits, cmap="Blues", vmin=least, vmax=most, aspect="auto")
    for y, (row, last) in enumerate(rows):
        for x, (index, logit) in enumerate(row):
            word = first.token(index)
            short = word if len(word) < 9 else word[:7] + "…"
            color = "white" if logit - least > 0.6 * (most - least) else "black"
            axis.text(x, y, short, ha="center", va="center", fontsize=7, color=color, parse_math=False)
            agrees = last is not None and index == last[x][0]
            edge = {"linewidth": 1.8, "zorder": 3} if agrees else {"linewidth": 0.5}
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", **edge))
    axis.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    axis.set_xticks(range(len(said)), said, fontsize=8, rotation=40, ha="left", parse_math=False)
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    bar = figure.colorbar(image, location="top", shrink=0.6, aspect=40, ticks=[least, most])
    bar.outline.set_visible(False)
    question = " ".join(first.tokenizer.decode(problem.prompt_ids, skip_special_tokens=True).split())
    figure.supxlabel(f"… {question[-60:]}   gold: {problem.answer}", fontsize=8, parse_math=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)
    print(options.output)


def layers(places: Iterable[Opened], options) -> None:
    """Print all layers of each place, measured on its own rollouts, as CSV."""
    print("name,layer,think_js,entropy,agreement,attention_js")
    for opened in places:
        for layer, means in enumerate(measure_layers(opened, opened.sample(options.problems)), start=1):
            print(opened.name, layer, *(f"{mean:.5g}" for mean in means), sep=",", flush=True)


@torch.no_grad()
def measure_layers(opened: Opened, rollouts: list[oisd.Rollout]) -> list[list[float]]:
    """Average over response tokens (attention JS: over sampled decoding steps), in nats: -> four means by layer.

    JS to the last layer, entropy of the lens, share of tokens that the lens ranks first where the last layer does too,
    attention JS to the last layer.
    """
    model, config = opened.model, opened.config
    count = len(model.taps)
    totals, tokens, steps = torch.zeros(4, count, dtype=torch.float64), 0, 0
    for batch, states in look(opened, rollouts):
        for rows in zip(*(state.split(config.lens_chunk_tokens) for state in states[1:])):
            final = model.lens(rows[-1]) / config.distill_temperature
            for layer, hidden in enumerate(rows):
                logits = layer_logits(model, hidden, layer + 1) / config.distill_temperature
                logprobs = logits.log_softmax(-1)
                totals[0, layer] += oisd.js_divergence(logits, final).double().sum().cpu()
                totals[1, layer] -= (logprobs.exp() * logprobs).double().sum().cpu()
                totals[2, layer] += (logits.argmax(-1) == final.argmax(-1)).sum().cpu()
        for layer, tap in enumerate(model.taps):
            totals[3, layer] += oisd.attention_js(tap, model.taps[-1], batch, config).double().sum().cpu()
        tokens += len(batch.predicted)
        steps += len(batch.queries)
    return (totals / torch.tensor([[tokens], [tokens], [tokens], [steps]])).T.tolist()


FFN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")  # what decoder layers call it


@torch.no_grad()
def ffn_entropies(model: oisd.TappedModel, batch: oisd.PackedBatch) -> Tensor:
    """Lens entropies of the response tokens: with norm and without, before and after the FFN, by layer: (2, 2, L, N).

    At the policy's temperature. Read while the layer runs, chunk by chunk: neither hidden states of all layers nor
    logits of all tokens are kept.
    Raises: UserError for a layer without an FFN between two points of its residual stream.
    """
    entropies: list[list[Tensor]] = [[], []]

    def see(place: int, stream: Tensor) -> None:
        hidden = stream[0, batch.predicted - 1]
        streams = [model.lens_hidden(hidden, norm) for norm in (True, False)]
        read = [oisd.read_tokens(x, model.head, batch.target_ids, model.config)[1] for x in streams]
        entropies[place].append(torch.stack(read))

    handles = [handle for layer in model.layers for handle in watch(layer, see)]
    try:
        model.hidden_states(batch)
    finally:
        model.clear_taps()
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack(place, dim=1) for place in entropies], dim=1)


def watch(layer: nn.Module, see: Callable[[int, Tensor], None]) -> list:
    """Show `see` the residual stream of a decoder layer before its FFN (0) and after it (1): -> handles of the hooks.

    The stream before the FFN is what went into the norm whose output the FFN takes, or what the FFN takes itself.
    """
    ffn = next((child for name, child in layer.named_children() if name in FFN), None)
    name = type(layer).__name__
    if ffn is None:
        raise UserError(f"{name} has no child called one of {', '.join(FFN)}")
    start: list[Tensor] = []
    normed: list[tuple[Tensor, Tensor]] = []

    def first_of(arguments, named):
        return arguments[0] if arguments else named["hidden_states"]

    def at_start(_, arguments, named):
        start[:] = [first_of(arguments, named)]
        normed.clear()

    def after_norm(_, arguments, named, output):
        normed.append((first_of(arguments, named), output))

    def at_ffn(_, arguments, named):
        taken = first_of(arguments, named)
        stream = next((before for before, after in normed if after is taken), taken)
        if stream is start[0]:
            raise UserError(f"{name} runs attention and FFN side by side, so the layer rule does not apply")
        see(0, stream)

    def at_end(_, arguments, output):
        see(1, output if isinstance(output, Tensor) else output[0])

    norms = [child for child in layer.children() if "norm" in type(child).__name__.lower()]
    return [
        layer.register_forward_pre_hook(at_start, with_kwargs=True),
        *(norm.register_forward_hook(after_norm, with_kwargs=True) for norm in norms),
        ffn.register_forward_pre_hook(at_ffn, with_kwargs=True),
        layer.register_forward_hook(at_end),
    ]


def report(means: Tensor) -> list[int]:
    """Print the entropies and apply the rule: -> the student layer with the final norm and without it; 0: none.

    `means`: (2, 2, L), as `ffn_entropies` orders them.
    """
    print("lens entropy around the FFN, nats      with the final norm                without it")
    print("layer" + 2 * "   H before    H after     signal")
    signals = means[:, 1] - means[:, 0]  # (2, L)
    for layer in range(means.shape[2]):
        values = torch.cat([means[:, :, layer], signals[:, None, layer]], dim=1)
        print(f"{layer + 1:5}" + "".join("{:11.4f}{:11.4f}{:+11.4f}".format(*reading) for reading in values.tolist()))
    chosen = []
    for reading, signal in zip(("with", "without"), signals.tolist()):
        positive = [layer for layer, value in enumerate(signal[:-1], 1) if value > 0]
        chosen.append(max(positive, default=0))
        if positive:
            print(f"{reading} the norm: student layer {chosen[-1]}, the last below the teacher whose FFN explores")
        else:
            print(f"{reading} the norm: no FFN below layer {means.shape[2]} raises the lens entropy")
    return chosen


def rule(places: Iterable[Opened], options) -> None:
    """Apply the layer rule to one model, on rollouts of `--problems` problems."""
    (opened,) = places
    rollouts = opened.sample(options.problems)
    model = opened.model
    oisd.check(model)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    print(f"{opened.name}: {len(rollouts)} rollouts, {tokens} response tokens, ln V {math.log(len(model.head)):.3f}")
    total = torch.zeros(2, 2, len(model.layers), dtype=torch.float64)
    for part in oisd.my_micro_batches(rollouts, opened.config.max_tokens_per_gpu):
        batch = oisd.pack([rollouts[index] for index in part], opened.config, model.head.device)
        total += model(ffn_entropies, model, batch).double().sum(-1).cpu()
    report(total / tokens)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"table": table, "layers": layers, "rule": rule}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("places", nargs="+", metavar="PLACE")
    parser.add_argument("--output", type=Path, default=Path("lens.png"), help="table: default: %(default)s")
    parser.add_argument("--problem", type=int, default=0, help="table: which problem, from 0")
    parser.add_argument("--problems", type=int, default=128, help="layers, rule: how many (default: 128)")
    parser.add_argument("--tokens", type=int, default=13, help="table: of the response (default: 13)")
    parser.add_argument("--layers", type=int, default=0, help="table: rows, about (default: 18; of several places two)")
    options, rest = parser.parse_known_args(words)
    options.layers = options.layers or (18 if len(options.places) == 1 else 0)
    if options.kind == "rule" and len(options.places) > 1:
        parser.error("rule takes one model")
    try:
        kinds[options.kind]((open_place(place, rest) for place in options.places), options)
    except (UserError, FileNotFoundError) as problem:
        print(f"lens: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
