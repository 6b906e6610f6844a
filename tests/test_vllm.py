"""A real vLLM engine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, in_order, needs_vectors, needs_vllm, read_metrics, start_run, toy_arguments, toy_sampler

import oisd
from test_oisd import run_of

pytestmark = [needs_vllm, needs_vectors]


@pytest.mark.parametrize("kind", ["toy", "untied_toy"])
def test_vllm_engine_follows_the_trainer(kind, request, tmp_path):
    """A real engine: the trainer's log-probs before and after an update; without the sync the gap is caught."""
    gaps = run_probe(request.getfixturevalue(kind), tmp_path)
    print(kind, gaps)
    assert max(gaps[when] for when in ("loaded", "before", "after")) < 1e-3 and "did not arrive" in gaps["unsynced"]
    assert gaps["distinct"] > 2 and gaps["repeated"]


def test_the_program_with_vllm(toy, tmp_path):
    """Three steps at a learning rate that changes everything: each is sampled from the weights of the one before."""
    run = tmp_path / "run"
    process = start_run(toy_arguments(toy, run, sampler="vllm", num_steps=3, learning_rate=1e-2))
    shown = process.communicate(timeout=600)[0]
    assert process.returncode == 0, shown[-3000:]
    assert "Failed to load weights" not in shown  # of the tied head, which has none of its own
    assert all(row["sampler_logprob_gap"] < 1e-3 for row in read_metrics(run))



def run_probe(folder, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    probe = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600, env=env)
    assert probe.returncode == 0, probe.stdout[-3000:] + probe.stderr[-3000:]
    return json.loads(probe.stdout.strip().splitlines()[-1])


def probe_vllm(folder):
    """Run in a process of its own, as engines do not leave one cleanly; prints the gaps as JSON."""
    config, _, end_ids, prompts = toy_sampler(Path(folder))
    config = dataclasses.replace(config, sampler="vllm")
    model, _ = oisd.load_model(config)
    tapped = oisd.TappedModel(model, config).eval()
    sampler = oisd.VllmSampler(config, end_ids, torch.device("cpu"))

    def gap():
        rollouts = in_order(sampler.stream(prompts * 8, list(range(len(prompts) * 8))), prompts * 8)
        with torch.no_grad():
            trainer = tapped(tapped.response_logprobs, oisd.pack(rollouts, config))[0]
        differences = trainer - torch.tensor([value for r in rollouts for value in r.sampler_logprobs])
        return differences.abs().max().item(), [r.response_ids for r in rollouts]

    loaded, _ = gap()
    sampler.sync(model)
    long = [(prompts[0] * 5)[:32]] * 300  # more tokens than the engine takes at once, each request with a seed
    assert len(list(sampler.stream(long, list(range(300))))) == 300
    before, responses = gap()
    repeated = gap()[1] == responses
    with torch.no_grad():  # an update of every weight, embeddings and norms among them
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    run = run_of(model, config)
    try:
        samples = sampler.stream(prompts * 8, list(range(len(prompts) * 8)))
        unsynced = oisd.set_old_logprobs(run, in_order(samples, prompts * 8))
    except oisd.TrainingError as problem:
        unsynced = str(problem)
    sampler.sync(model)
    after, _ = gap()
    numbers = {"loaded": loaded, "before": before, "unsynced": unsynced, "after": after}
    print(json.dumps(numbers | {"distinct": len(set(map(tuple, responses))), "repeated": repeated}))


if __name__ == "__main__":
    probe_vllm(sys.argv[1])
