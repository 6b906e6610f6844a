"""A real vLLM engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import oisd
import pytest
import torch

from conftest import ROOT, needs_vectors, needs_vllm, toy_arguments

pytestmark = [needs_vllm, needs_vectors]


@pytest.mark.parametrize("kind", ["toy", "untied_toy"])
def test_the_engine_follows_the_trainer(kind, request, tmp_path):
    """Compare log-probs before and after an update, which the engine follows only if it is synced."""
    found = run_probe(request.getfixturevalue(kind), tmp_path)
    assert max(found["loaded"], found["updated"]) < 1e-3 < 0.1 < found["unsynced"], found


def run_probe(folder, cwd):
    """Call `probe` in another process, because an engine cannot be ended cleanly in this one."""
    command = [sys.executable, __file__, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=cwd, timeout=600, env=env)
    return json.loads(done.stdout.strip().splitlines()[-1])


def probe(folder):
    """Sample with an engine at several points and print how far its log-probs are from the trainer's, as JSON."""
    _, config = oisd.load_config(toy_arguments(Path(folder), "unused"))
    model, _ = oisd.load_model(config)
    tapped = oisd.TappedModel(model, config).eval()
    sampler = oisd.VllmSampler(config, [model.config.eos_token_id], torch.device("cpu"))
    prompts = [[2 + i % 7] * (3 + i % 4) for i in range(56)]

    def gap():
        samples = sampler.stream(prompts, list(range(len(prompts))))
        batch = oisd.pack([oisd.Rollout(prompts[index], *rest) for index, *rest in samples], config)
        trainer = tapped(tapped.response_logprobs, batch)
        return (trainer - batch.sampler_logprobs).abs().max().item()

    found = {"loaded": gap()}
    with torch.no_grad():  # update every weight, embeddings and norms among them
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    found["unsynced"] = gap()
    sampler.sync(model)
    print(json.dumps(found | {"updated": gap()}))


if __name__ == "__main__":
    probe(sys.argv[1])
