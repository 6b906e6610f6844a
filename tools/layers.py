"""The layer rule, which chooses the student: the exploration signal of every layer's FFN (the paper, after BuPO).

    python tools/layers.py                                        the laptop's start model (no layer)
    python tools/layers.py --config configs.toml:qwen3_4b --prompts_per_step 8 --mini_batch_prompts 8 \
        --max_response_tokens 1024 --sampler_batch 16 --output_dir layers

H is the entropy of the lens, averaged over response tokens of the model's own rollouts. An FFN explores if the residual
stream after it, read by the lens, is less certain of the next token than before it. The student is the last layer below
the teacher whose FFN does:

    signal_l = H(after the FFN of layer l) - H(before it)                    student = max { l < L : signal_l > 0 }

The residual stream is the paper's H of Eq. 2. BuPO's plotting code compares the FFN module's own input and output.
Everything is measured twice: through the final norm, as in the paper's Eq. 5, and without it, as in BuPO's code. The
second command can tell which of the two Figure 5 shows: its layer 6 starts at 11.647 nats, where ln V is 11.931.

Any field of the config may follow. layers.csv and layers.png go to `output_dir`, or here. Rollouts are Transformers'.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inputs
import laptop
import oisd
from oisd import PackedBatch, TappedModel
from settings import UserError

FFN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")  # what decoder layers call it


@torch.no_grad()
def ffn_entropies(model: TappedModel, batch: PackedBatch) -> Tensor:
    """Lens entropies of the response tokens: with norm and without, before and after the FFN, by layer: (2, 2, L, N).

    At the policy's temperature. Read while the layer runs, chunk by chunk: neither hidden states of all layers nor
    logits of all tokens are kept.
    Raises: UserError for a layer without an FFN between two points of its residual stream.
    """
    entropies: list[list[Tensor]] = [[], []]

    def see(place: int, stream: Tensor) -> None:
        hidden = stream[0, batch.predicted - 1]
        both = [model.read(model.lens_hidden(hidden, norm), batch)[1] for norm in (True, False)]
        entropies[place].append(torch.stack(both))

    handles = [handle for layer in model.layers for handle in watch(layer, see)]
    try:
        model.hidden_states(batch)
    finally:
        model.clear_taps()
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack(place, dim=1) for place in entropies], dim=1)


def mean_entropies(model: TappedModel, batches: Iterable[PackedBatch]) -> Tensor:
    """Means of `ffn_entropies` over the response tokens of all batches: -> (2, 2, L)."""
    total, tokens = torch.zeros(2, 2, len(model.layers), dtype=torch.float64), 0
    for batch in batches:
        total += model(ffn_entropies, model, batch).double().sum(-1).cpu()
        tokens += len(batch.predicted)
    return total / tokens


def watch(layer: nn.Module, see: Callable[[int, Tensor], None]) -> list:
    """Show `see` the residual stream of a decoder layer before its FFN (0) and behind it (1). -> handles of the hooks.

    The stream before the FFN is what went into the norm whose output the FFN takes, or what the FFN takes itself.
    """
    ffn = next((child for name, child in layer.named_children() if name in FFN), None)
    name = type(layer).__name__
    if ffn is None:
        raise UserError(f"{name} has no child called one of {', '.join(FFN)}")
    start: list[Tensor] = []
    normed: list[tuple[Tensor, Tensor]] = []

    def first(arguments: tuple, named: dict) -> Tensor:
        return arguments[0] if arguments else named["hidden_states"]

    def at_start(_, arguments, named):
        start[:], normed[:] = [first(arguments, named)], []

    def behind_norm(_, arguments, named, output):
        normed.append((first(arguments, named), output))

    def at_ffn(_, arguments, named):
        taken = first(arguments, named)
        stream = next((before for before, after in normed if after is taken), taken)
        if stream is start[0]:
            raise UserError(
                f"{name} runs attention and FFN side by side, so the layer rule does not apply"
            )
        see(0, stream)

    def at_end(_, arguments, output):
        see(1, output if isinstance(output, Tensor) else output[0])

    norms = [child for child in layer.children() if "norm" in type(child).__name__.lower()]
    return [
        layer.register_forward_pre_hook(at_start, with_kwargs=True),
        *(norm.register_forward_hook(behind_norm, with_kwargs=True) for norm in norms),
        ffn.register_forward_pre_hook(at_ffn, with_kwargs=True),
        layer.register_forward_hook(at_end),
    ]


def report(means: Tensor, folder: Path) -> list[int]:
    """Print, save (layers.csv, layers.png) and apply the rule: -> the student layer with and without the norm.

    `means`: (2, 2, L), as `ffn_entropies` orders them. 0 stands for no layer.
    """
    signals = means[:, 1] - means[:, 0]  # (2, L)
    columns = torch.cat([means, signals[:, None]], dim=1).flatten(0, 1)  # (6, L): before, after, signal, twice
    rows = [(layer, *values) for layer, values in enumerate(columns.T.tolist(), 1)]
    names = "entropy_before entropy_after signal".split()
    with (folder / "layers.csv").open("w", newline="", encoding="utf-8") as file:
        header = ["layer", *names, *(f"{name}_without_norm" for name in names)]
        csv.writer(file).writerows([header, *rows])
    draw(means.tolist(), signals.tolist(), folder / "layers.png")
    print("lens entropy around the FFN, nats      with the final norm                without it")
    print("layer" + 2 * "   H before    H after     signal")
    for layer, *values in rows:
        print(f"{layer:5}" + "".join("{:11.4f}{:11.4f}{:+11.4f}".format(*values[i : i + 3]) for i in (0, 3)))
    chosen = []
    for reading, signal in zip(("with", "without"), signals.tolist()):
        positive = [layer for layer, value in enumerate(signal[:-1], 1) if value > 0]
        chosen.append(positive[-1] if positive else 0)
        if positive:
            print(f"{reading} the norm: student layer {positive[-1]}, the last below the teacher whose FFN explores")
        else:
            print(f"{reading} the norm: no FFN below layer {len(rows)} raises the lens entropy")
    print(folder / "layers.csv")
    return chosen


def draw(means: list, signals: list, path: Path) -> None:
    """The layer rule's picture: lens entropy around every FFN, and its change. A failure is said, never raised."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for reading, (before, after), signal in zip(("with norm", "without"), means, signals):
            layers = range(1, len(signal) + 1)
            left.plot(layers, before, linestyle="--", label=f"before the FFN, {reading}")
            left.plot(layers, after, label=f"after the FFN, {reading}")
            right.plot(layers, signal, marker=".", label=reading)
        right.axhline(0, color="gray", linewidth=0.8)
        left.set(title="entropy of the lens (nats)", xlabel="layer")
        right.set(title="exploration signal of the FFN (nats)", xlabel="layer")
        left.legend()
        right.legend()
        figure.savefig(path, dpi=100)
    except Exception as problem:  # a picture never ends a run
        print(f"{path.name} was not drawn: {type(problem).__name__}: {problem}")


def measure(config: oisd.Config, folder: Path) -> list[int]:
    """Sample `prompts_per_step` x `group_size` rollouts, measure, report. -> as `report`. Raises: UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model == "tiny_model":
        laptop.make()
    inputs.read_model_config(config)
    tokenizer, (model, _) = oisd.load_tokenizer(config), oisd.load_model(dataclasses.replace(config, attention="sdpa"))
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.train_data, tokenizer, config)
    tapped = TappedModel(model, config).eval()
    inputs.check_model(tapped)  # on the CPU in float32, as a run does; then as the config says
    model.to(device).set_attn_implementation(config.kernel if device.type == "cuda" else "sdpa")
    sampler = laptop.HfSampler(model, end_ids, config, device)
    prompts = [p.prompt_ids for p in oisd.step_problems(problems, 0, config) for _ in range(config.group_size)]
    samples = sampler.stream(prompts, list(range(len(prompts))))
    rollouts = [oisd.Rollout(prompts[sample[0]], *sample[1:]) for sample in samples]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    print(f"{config.model}: {len(rollouts)} rollouts, {tokens} response tokens, ln V {math.log(len(tapped.head)):.3f}")
    batches = oisd.micro_batches(rollouts, config.max_tokens_per_gpu)
    packed = (oisd.pack([rollouts[index] for index in part], config, device) for part in batches)
    return report(mean_entropies(tapped, packed), folder)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    try:
        _, config = oisd.load_config([*words, "--student_layer", "1"])  # any: all are measured
        measure(config, Path(config.output_dir or "."))
    except UserError as problem:
        print(f"layers: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
