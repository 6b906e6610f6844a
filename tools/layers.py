"""The layer rule, which chooses the student: the exploration signal of every layer's FFN (the paper, after BuPO).

    python tools/layers.py                                        the laptop's start model (no layer)
    python tools/layers.py --config configs.toml:qwen3_4b --prompts_per_step 8 --mini_batch_prompts 8 \
        --max_response_tokens 1024 --sampler_batch 16 --output_dir layers

H is the entropy of the lens, averaged over response tokens of the model's own rollouts. An FFN explores if the residual
stream after it, read by the lens, is less certain of the next token than before it. The student is the last layer below
the teacher whose FFN does:

    signal_l = H(after the FFN of layer l) - H(before it)                    student = max { l < L : signal_l > 0 }

Any field of the config may follow. layers.csv and layers.png go to `output_dir`, or here. Rollouts are Transformers'.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inputs
import laptop
import oisd
import plumbing
from oisd import PackedBatch, TappedModel
from settings import UserError

FFN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")  # what decoder layers call it


@torch.no_grad()
def ffn_entropies(model: TappedModel, batch: PackedBatch) -> list[Tensor]:
    """Lens entropies of the response tokens, each (N,): before the FFN of every layer, then after that of every layer.

    At the policy's temperature. Read while the layer runs, chunk by chunk: neither hidden states of all layers nor
    logits of all tokens are kept.
    Raises: UserError for a layer without an FFN between two points of its residual stream.
    """
    entropies: list[list[Tensor]] = [[], []]

    def see(place: int, stream: Tensor) -> None:
        entropies[place].append(model.read(model.lens_hidden(stream[0, batch.predicted - 1]), batch)[1])

    handles = [handle for layer in model.layers for handle in watch(layer, see)]
    try:
        model.hidden_states(batch)
    finally:
        model.clear_taps()
        for handle in handles:
            handle.remove()
    return entropies[0] + entropies[1]


def mean_entropies(model: TappedModel, batches: Iterable[PackedBatch]) -> Tensor:
    """Means of `ffn_entropies` over the response tokens of all ranks' batches, as many on each: -> (2 layers,)."""
    total = torch.zeros(2 * len(model.layers) + 1, dtype=torch.float64)
    for batch in batches:
        entropies = torch.stack(model(ffn_entropies, model, batch))
        total += torch.cat([entropies.double().sum(1).cpu(), torch.tensor([entropies.shape[1]])])
    *sums, tokens = torch.stack(plumbing.gather([total])).sum(0)
    return torch.stack(sums) / tokens


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


def report(means: Tensor, folder: Path) -> int:
    """Say, save (layers.csv, layers.png) and apply the rule: -> the student layer, 0 if no signal is positive.

    `means`: (2 layers,), as `ffn_entropies` orders them.
    """
    before, after = means.view(2, -1).tolist()
    signals = [b - a for a, b in zip(before, after)]
    positive = [layer for layer, signal in enumerate(signals[:-1], 1) if signal > 0]
    rows = [(layer, *values) for layer, values in enumerate(zip(before, after, signals), 1)]
    if plumbing.rank() == 0:
        with (folder / "layers.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("layer", "entropy_before", "entropy_after", "signal"), *rows])
        draw(before, after, signals, folder / "layers.png")
    lines = [f"{layer:5} {a:11.4f} {b:10.4f} {signal:+11.4f}" for layer, a, b, signal in rows]
    plumbing.say("\n".join(["layer  H before    H after      signal   (lens entropy around the FFN, nats)", *lines]))
    if not positive:
        plumbing.say(f"no FFN below layer {len(rows)} raises the lens entropy: the rule names no layer; see {folder}")
        return 0
    plumbing.say(f"student layer {positive[-1]}: the last with a positive signal, below the teacher; see {folder}")
    return positive[-1]


def draw(before: list[float], after: list[float], signals: list[float], path: Path) -> None:
    """The layer rule's picture: lens entropy around every FFN, and its change. A failure is said, never raised."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        layers = range(1, len(signals) + 1)
        left.plot(layers, before, label="before the FFN")
        left.plot(layers, after, label="after the FFN")
        left.legend()
        left.set(title="entropy of the lens (nats)", xlabel="layer")
        right.bar(layers, signals)
        right.set(title="exploration signal of the FFN (nats)", xlabel="layer")
        figure.savefig(path, dpi=100)
    except Exception as problem:  # a picture never ends a run
        plumbing.say(f"{path.name} was not drawn: {type(problem).__name__}: {problem}")


def measure(config: oisd.Config, folder: Path) -> int:
    """Sample `prompts_per_step` x `group_size` rollouts, measure, report. -> the layer, or 0. Raises: UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model == "tiny_model":
        laptop.make()
    inputs.read_model_config(config)
    tokenizer, (model, _) = oisd.load_tokenizer(config), oisd.load_model(dataclasses.replace(config, attention="sdpa"))
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.train_data, tokenizer, config)
    tapped = TappedModel(model, config).eval()
    inputs.check_model(tapped)  # on the CPU in float32, as a run does; then as the config says
    model.to(device).set_attn_implementation(config.kernel)
    sampler = laptop.HfSampler(model, end_ids, config, device)
    prompts = [p.prompt_ids for p in oisd.step_problems(problems, 0, config) for _ in range(config.group_size)]
    samples = sampler.stream(prompts, list(range(len(prompts))))
    rollouts = [oisd.Rollout(prompts[sample[0]], *sample[1:]) for sample in samples]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    print(f"{config.model}: {len(rollouts)} rollouts, {tokens} response tokens")
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
