"""The layer rule alone: which layer's FFN makes the lens less certain, on the model's own rollouts.

    python tools/layers.py                                        the laptop's start model (no layer)
    python tools/layers.py --config configs.toml:qwen3_4b --prompts_per_step 8 --mini_batch_prompts 8 \
        --max_response_tokens 1024 --sampler_batch 16 --output_dir layers

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
    """Sample `prompts_per_step` x `group_size` rollouts, measure, report. -> the layer, or 0. Raises: UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model == "tiny_model":
        laptop.make()
    tokenizer, (model, _) = oisd.load_tokenizer(config), oisd.load_model(config)
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.train_data, tokenizer, config)
    tapped = oisd.TappedModel(model.to(device), config).eval()
    inputs.check_model(tapped)
    sampler = laptop.HfSampler(model, end_ids, config, device)
    prompts = [p.prompt_ids for p in oisd.step_problems(problems, 0, config) for _ in range(config.group_size)]
    samples = sampler.stream(prompts, list(range(len(prompts))))
    rollouts = [oisd.Rollout(prompts[sample[0]], *sample[1:]) for sample in samples]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    print(f"{config.model}: {len(rollouts)} rollouts, {tokens} response tokens")
    batches = oisd.micro_batches(rollouts, config.max_tokens_per_gpu)
    packed = (oisd.pack([rollouts[index] for index in part], config, device) for part in batches)
    return exploration.report(exploration.mean_entropies(tapped, packed), folder)


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
