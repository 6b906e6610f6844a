"""One group of rollouts as the losses see it: reward, advantage and both divergences of each.

    python tools/group.py                                           of the laptop's start model
    python tools/group.py --model runs/tiny/final --seed 3          of another, of other draws; any field may follow
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import laptop
import oisd
from grader import Grader


def main(words: list[str]) -> None:
    _, config = oisd.load_config(words)
    laptop.make()
    tokenizer, (model, _) = oisd.load_tokenizer(config), oisd.load_model(config)
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    sampler = laptop.HfSampler(model, end_ids, config, model.device)
    problem = oisd.step_problems(oisd.load_problems(config.train_data, tokenizer, config)[0], 0, config)[0]
    samples = sorted(sampler.stream([problem.prompt_ids] * config.group_size, list(range(config.group_size))))
    responses = [tokenizer.decode(sample[1], skip_special_tokens=True) for sample in samples]
    with Grader(workers=1) as grader:
        rewards = grader.grade(responses, [problem.answer] * len(samples))
    advantages = oisd.group_advantages(torch.tensor(rewards), config.group_size).tolist()
    tapped = oisd.TappedModel(model, config).eval()
    print(f"{tokenizer.decode(problem.prompt_ids)}   gold {problem.answer}   student layer {config.student_layer}\n")
    print(f"{'response':42} reward  advantage  think JS  attention JS")
    for response, sample, reward, advantage in zip(responses, samples, rewards, advantages):
        rollout = oisd.Rollout(problem.prompt_ids, *sample[1:], advantage=advantage)
        with torch.no_grad():
            sums = tapped(tapped.losses, oisd.pack([rollout], config))
        N, S = oisd.counts([rollout], config)
        think, attention = sums["think_js"] / N, sums["attention_js"] / S
        print(f"{response:42} {reward:6.0f} {advantage:+10.3f} {think:9.3f} {attention:13.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
