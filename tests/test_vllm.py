"""A real vLLM engine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import oisd
import pytest
import torch

from conftest import ROOT, needs_vectors, needs_vllm, toy_sampler

pytestmark = [needs_vllm, needs_vectors]


@pytest.mark.parametrize("kind", ["toy", "untied_toy"])
def test_the_engine_follows_the_trainer(kind, request, tmp_path):
    """Compare log-probs before and after an update, which the engine follows only if it is synced."""
    found = run_probe(request.getfixturevalue(kind), tmp_path)
    assert max(found[when] for when in ("loaded", "synced", "updated")) < 1e-3 < 0.1 < found["unsynced"], found


def run_probe(folder, cwd):
    """Call `probe` in another process, because an engine cannot be ended cleanly in this one."""
    command = [sys.executable, __file__, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def probe(folder):
    """Sample with an engine at several points and print how far its log-probs are from the trainer's, as JSON."""
    config, _, end_ids, prompts = toy_sampler(Path(folder))
    config = dataclasses.replace(config, sampler="vllm")
    model, _ = oisd.load_model(config)
    tapped = oisd.TappedModel(model, config).eval()
    sampler = oisd.VllmSampler(config, end_ids, torch.device("cpu"))

    def sample():
        samples = sorted(sampler.stream(prompts * 8, list(range(len(prompts) * 8))))
        return [oisd.Rollout(prompts[index % len(prompts)], *rest) for index, *rest in samples]

    def gap(rollouts):
        with torch.no_grad():
            trainer = tapped(tapped.response_logprobs, oisd.pack(rollouts, config))
        engine = torch.tensor([value for rollout in rollouts for value in rollout.sampler_logprobs])
        return (trainer - engine).abs().max().item()

    found = {"loaded": gap(sample())}
    sampler.sync(model)
    found["synced"] = gap(sample())
    with torch.no_grad():  # update every weight, embeddings and norms among them
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    found["unsynced"] = gap(sample())
    sampler.sync(model)
    print(json.dumps(found | {"updated": gap(sample())}))


if __name__ == "__main__":
    probe(sys.argv[1])
