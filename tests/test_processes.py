"""Two processes: FSDP2 over gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import oisd
import pytest

from conftest import ROOT, assert_same_run, launch, needs_vectors, needs_vllm, read_metrics, toy_arguments
from test_vllm import run_probe

TWO_RANKS = """
import importlib, json, sys
from accelerate import Accelerator
import oisd
from support import processes
Accelerator.end_training = lambda self: None  # the group serves all runs
for module, words in json.loads(sys.argv[1]):
    method = getattr(importlib.import_module(module), "METHOD", oisd.Method())
    assert oisd.main(words, method) == 0, words
processes.program(lambda: 0)
"""
# 3 prompts for two ranks, 3 rollouts per update in 4 micro-batches, 7 held-out problems in batches of 2
UNEQUAL = {"prompts_per_step": 3, "mini_batch_prompts": 1, "group_size": 3, "sampler_batch": 2}
UNEQUAL |= {"max_prompt_tokens": 5, "max_tokens_per_gpu": 13}
RUNS = {  # name: toy, settings
    "tied": ("toy", {}),
    "untied": ("untied_toy", {"internal_mean": "token", "recompute_layers": "all"}),
    "unequal": ("toy", UNEQUAL),
    "adapters": ("toy", {"lora_rank": 4, "learning_rate": 1e-2}),
}


def output_of(process):
    """Wait for a process that must succeed."""
    shown = process.communicate(timeout=900)[0]
    assert process.returncode == 0, shown
    return shown


def run_by_two_ranks(runs):
    """Run command lines of `oisd` or of a module with a METHOD, one after the other: [(module, words), ...]."""
    output_of(launch(TWO_RANKS, json.dumps(runs)))


def without_last_checkpoint(source, target):
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step_000004")
    return target


@pytest.fixture(scope="session")
def one_and_two(request, tmp_path_factory):
    """Make each of RUNS with one process and with two: -> a folder with `1 NAME` and `2 NAME` for each."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = []
    for name, (toy, changes) in RUNS.items():
        toy = request.getfixturevalue(toy)
        runs.append(("oisd", toy_arguments(toy, folder / f"2 {name}", **changes)))
        assert oisd.main(toy_arguments(toy, folder / f"1 {name}", **changes)) == 0
    parted = without_last_checkpoint(folder / "1 tied", folder / "2 after 1")
    run_by_two_ranks([*runs, ("oisd", ["--resume", str(parted)])])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(one_and_two, name):
    """Compare rollouts, every metric and the weights after four steps of two updates each."""
    assert_same_run(one_and_two / f"1 {name}", one_and_two / f"2 {name}")


def test_saved_by_two_resumed_by_one_and_the_reverse(one_and_two, tmp_path):
    assert_same_run(one_and_two / "1 tied", one_and_two / "2 after 1")
    parted = without_last_checkpoint(one_and_two / "2 tied", tmp_path / "1 after 2")
    assert oisd.main(["--resume", str(parted)]) == 0
    assert_same_run(one_and_two / "2 tied", parted)


GROUP_OF_ONE = """
import sys, torch, oisd
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
sys.exit(oisd.main(sys.argv[1:]))
"""


def test_one_sharded_process_is_a_plain_one(toy, one_and_two, tmp_path):
    """A single GPU runs this way."""
    command = [sys.executable, "-c", GROUP_OF_ONE, *toy_arguments(toy, tmp_path / "run")]
    output_of(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
    assert_same_run(one_and_two / "1 tied", tmp_path / "run")


SHARDED = """
import sys, torch, oisd
from support import processes
from torch.distributed.tensor import DTensor
run = oisd.prepare(*oisd.load_config(sys.argv[1:]))
parameters = list(run.model.parameters())
assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)
assert sum(p.to_local().numel() for p in parameters) < 0.51 * sum(p.numel() for p in parameters)
rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 0)
oisd.set_old_logprobs(run, rollouts)
for index, rollout in enumerate(rollouts):
    rollout.advantage = (-1) ** index * (1 + 2**-12)  # bfloat16 cannot represent it
seen = {"ratio": 0}
policy_loss_sum = oisd.policy_loss_sum
def look(logprobs, old, advantages, *rest):
    seen["ratio"] = max(seen["ratio"], (logprobs - old).abs().max().item())
    seen["advantage"] = advantages.abs().max().item()
    return policy_loss_sum(logprobs, old, advantages, *rest)
oisd.policy_loss_sum = look
run.model.train()
run.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.update(dtype=output.dtype))
oisd.accumulate_gradients(run, rollouts, run.config.max_tokens_per_gpu)
assert seen == {"ratio": 0, "advantage": 1 + 2**-12, "dtype": torch.bfloat16}, seen
run.grader.close()
processes.program(lambda: 0)
"""


def test_ranks_hold_half_each_and_bfloat16_ratios_are_exactly_1(toy, tmp_path):
    """Old log-probs and advantages reach the losses in float32, while layers run in bfloat16."""
    output_of(launch(SHARDED, *toy_arguments(toy, tmp_path / "run", dtype="bfloat16")))


DYING = """
import oisd
from support import processes, run_folder
def fail(self, metrics):
    if processes.rank() == 1:
        raise MemoryError("no room left on this rank")
run_folder.Log.write = fail
processes.program(oisd.main)
"""


def test_a_rank_that_dies_ends_the_run(toy, tmp_path):
    """Its error is shown, and the output ends because no process is left."""
    process = launch(DYING, *toy_arguments(toy, tmp_path / "run", test_data=""))
    assert "MemoryError: no room left on this rank" in process.communicate(timeout=240)[0]
    assert process.returncode != 0


def test_ctrl_c_ends_in_a_checkpoint_by_both_ranks(toy, tmp_path):
    run = tmp_path / "run"
    process = launch(ROOT / "oisd.py", *toy_arguments(toy, run, num_steps=1000, checkpoint_every=0, test_data=""))
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to all processes, and the launcher forwards it
    shown = process.communicate(timeout=240)[0]
    assert "continue with: accelerate launch oisd.py --resume" in shown, shown[-3000:]
    state = json.loads(next(run.glob("checkpoints/step_*/state.json")).read_text())
    assert state["step"] == len(read_metrics(run))


@needs_vllm
@needs_vectors
def test_two_ranks_with_an_engine_each(toy, tmp_path):
    """Log-probs agree after every update, and vLLM loads the export."""
    run = tmp_path / "run"
    changes = {"sampler": "vllm", "num_steps": 3, "learning_rate": 1e-2, "test_data": ""}
    shown = output_of(launch(ROOT / "oisd.py", *toy_arguments(toy, run, **changes)))
    assert "Failed to load weights" not in shown  # of the tied head, which has none of its own
    assert all(row["sampler_logprob_gap"] < 1e-3 for row in read_metrics(run))
    shutil.copy(toy / "train.jsonl", run / "final")
    assert run_probe(run / "final", tmp_path)["loaded"] < 1e-3
