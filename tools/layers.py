"""The layer rule alone: which layer's FFN makes the lens less certain, on the model's own rollouts.

    python tools/layers.py                                                        the laptop's start model
    python tools/layers.py --config configs.toml:qwen3_4b --output_dir layers     another table's

Any field of the config may follow; layers.csv and layers.png go to `output_dir`, or here. Rollouts are Transformers'.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import exploration
import inputs
import laptop
import oisd
from settings import UserError


def measure(config: oisd.Config, folder: Path) -> int:
    """Sample `prompts_per_step` x `group_size` rollouts, measure, report. -> the layer. Raises: UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model == "tiny_model":
        laptop.make()
    tokenizer, (model, _) = oisd.load_tokenizer(config), oisd.load_model(config)
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.train_data, tokenizer, config)
    tapped = oisd.TappedModel(model.to(device), config).eval()
    inputs.check_model(tapped)
    sampler = oisd.make_hf_sampler(model, end_ids, config, device)
    prompts = [p.prompt_ids for p in oisd.step_problems(problems, 0, config) for _ in range(config.group_size)]
    samples = sampler.stream(prompts, list(range(len(prompts))))
    rollouts = [oisd.Rollout(prompts[sample[0]], *sample[1:]) for sample in samples]
    sums, tokens = 0.0, 0
    for indices in oisd.micro_batches(rollouts, config.max_tokens_per_gpu):
        batch = oisd.pack([rollouts[index] for index in indices], config, device)
        with torch.no_grad():
            sums = sums + torch.stack(tapped(exploration.ffn_entropies, tapped, batch)).double().sum(1).cpu()
        tokens += len(batch.predicted)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{config.model}: {len(rollouts)} rollouts, {tokens} response tokens")
    return exploration.report(sums / tokens, folder)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    try:
        _, config = oisd.load_config([*words, "--student_layer", "auto"])
        measure(config, Path(config.output_dir or "."))
    except UserError as problem:
        print(f"layers: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
