"""Two processes: real FSDP2 over gloo."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_metrics, launch, needs_vectors, needs_vllm, read_metrics, toy_arguments
from safetensors.torch import load_file
from test_vllm import run_probe

import oisd
from tools import grids

TWO_RANKS = """
import json, sys, oisd
from accelerate import Accelerator
Accelerator.end_training = lambda self: None  # the group serves all runs
for words in json.loads(sys.argv[1]):
    assert oisd.main(words) == 0, words
oisd.plumbing.program(lambda: 0)
"""
RUNS = {  # name: toy, settings
    "tied": ("toy", {}),
    "untied": ("untied_toy", {"internal_mean": "token"}),
    "tied, checkpointed": ("toy", {"recompute_layers": "all"}),
    "untied, checkpointed": ("untied_toy", {"recompute_layers": "all"}),
    # 3 prompts for two ranks, and an odd number of micro-batches; held out, 7 problems in batches of 2
    "unequal": ("toy", {"prompts_per_step": 3, "mini_batch_prompts": 1, "max_tokens_per_gpu": 40, "sampler_batch": 2}),
    "adapters": ("toy", {"lora_rank": 4, "learning_rate": 1e-2}),
}




def without_last_checkpoint(source, target):
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step_000004")
    return target


@pytest.fixture(scope="session")
def one_and_two(request, tmp_path_factory):
    """Every one of RUNS by one process and by two: -> folder with a `1 name` and a `2 name` for each."""
    folder, words = tmp_path_factory.mktemp("ranks"), {}
    for name, (toy, changes) in RUNS.items():
        toy = request.getfixturevalue(toy)
        words[name] = toy_arguments(toy, folder / f"2 {name}", **changes)
        assert oisd.main(toy_arguments(toy, folder / f"1 {name}", **changes)) == 0
    parted = without_last_checkpoint(folder / "1 tied", folder / "2 after 1")
    runs = [*words.values(), ["--resume", str(parted)]]
    process = launch(TWO_RANKS, json.dumps(runs))
    shown = process.communicate(timeout=900)[0]
    assert process.returncode == 0, shown
    return folder


def assert_same_run(one, other):
    """Metrics and exported weights, to single precision: a sum over two ranks rounds otherwise than one over all."""
    assert_same_metrics(read_metrics(one), read_metrics(other))
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (one, other)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)
    differences = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]]
    print(f"{one.name} against {other.name}: weights differ by at most {max(differences):.2g}")


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(one_and_two, name):
    """Rollouts, every loss, the gradient norm and the weights after four steps of two updates each."""
    assert_same_run(one_and_two / f"1 {name}", one_and_two / f"2 {name}")


def test_a_grid_holds_the_shards_too(toy, tmp_path):
    """tools/grids.py by two ranks: all weights on the grid, and but for sums that round otherwise those of one."""
    words = {name: toy_arguments(toy, tmp_path / name, num_steps=2) for name in ("one", "two")}
    process = launch(ROOT / "tools" / "grids.py", *words["two"])
    assert oisd.main(words["one"], grids.GRID) == 0
    shown = process.communicate(timeout=400)[0]
    assert process.returncode == 0, shown
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in words)
    for name, weights in two.items():
        assert torch.equal(weights, weights.bfloat16().float()), name
        assert (weights == one[name]).float().mean() > 0.99, name


GROUP_OF_ONE = """
import sys, torch.distributed as dist, oisd
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sys.exit(oisd.main(sys.argv[1:]))
"""


def test_one_sharded_process_is_a_plain_one(toy, one_and_two, tmp_path):
    """What runs on a single GPU."""
    command = [sys.executable, "-c", GROUP_OF_ONE, *toy_arguments(toy, tmp_path / "run")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr
    assert_same_run(one_and_two / "1 tied", tmp_path / "run")


BFLOAT16 = """
import sys, torch, torch.distributed as dist, oisd
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
run = oisd.prepare(*oisd.load_config(sys.argv[1:]))
assert all(p.dtype == torch.float32 for p in run.model.parameters())
rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 0)
oisd.set_old_logprobs(run, rollouts)
for index, rollout in enumerate(rollouts):
    rollout.advantage = (-1) ** index * (1 + 2**-12)  # not a number of bfloat16
seen = {}
policy_loss_sum = oisd.policy_loss_sum
def look(logprobs, old, advantages, *rest):
    seen["ratio"] = max(seen.get("ratio", 0), (logprobs - old).abs().max().item())
    seen["advantage"] = advantages.abs().max().item()
    return policy_loss_sum(logprobs, old, advantages, *rest)
oisd.policy_loss_sum = look
run.model.train()
oisd.accumulate_gradients(run, rollouts, 1000)
layer = run.model.layers[0]
layer.register_forward_hook(lambda module, inputs, output: seen.update(dtype=output.dtype))
oisd.set_old_logprobs(run, rollouts)
assert seen == {"ratio": 0.0, "advantage": 1 + 2**-12, "dtype": torch.bfloat16}, seen
run.grader.close()
"""


def test_bfloat16_ratios_are_exactly_1_before_an_update(toy, tmp_path):
    """Sharded, as on every GPU: old log-probs and advantages reach the losses in float32, layers run in bfloat16."""
    words = toy_arguments(toy, tmp_path / "run", dtype="bfloat16", max_tokens_per_gpu=1000)
    command = [sys.executable, "-c", BFLOAT16, *words]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr


def test_saved_by_two_resumed_by_one_and_the_reverse(toy, one_and_two, tmp_path):
    assert_same_run(one_and_two / "1 tied", one_and_two / "2 after 1")
    parted = without_last_checkpoint(one_and_two / "2 tied", tmp_path / "1 after 2")
    assert oisd.main(["--resume", str(parted)]) == 0
    assert_same_run(one_and_two / "2 tied", parted)


SHARDED = """
import os, oisd, torch, sys
from torch.distributed.tensor import DTensor
name, config = oisd.load_config(sys.argv[1:])
run = oisd.prepare(name, config)
parameters = list(run.model.parameters())
assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)
local, whole = (sum(p.numel() for p in ps) for ps in ([p.to_local() for p in parameters], parameters))
assert abs(local / whole - 0.5) < 0.01, (local, whole)
rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 0)
oisd.set_old_logprobs(run, rollouts)
for rollout in rollouts:
    rollout.advantage = 1.0
alone = oisd.accumulate_gradients(run, rollouts[:1], 1000)  # one rollout: the other rank's micro-batch is empty
assert alone["policy_loss"] != 0 and all(p.grad is not None for p in parameters)
norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9).full_tensor().item()
mine = [rollout.response_ids for rollout in rollouts]
assert oisd.gather([mine])[0] == mine  # all know all
grade = oisd.Grader.grade
def failing(self, *work):
    self.timeouts += oisd.rank()
    return grade(self, *work)
oisd.Grader.grade = failing
assert oisd.train_step(run)["grader_failures"] == 1  # those of all ranks
oisd.say(f"norm {norm!r}")
run.grader.close()
run.accelerator.end_training()
oisd.plumbing.program(lambda: 0)
"""


def test_ranks_hold_half_each_and_may_have_nothing_to_do(toy, tmp_path):
    process = launch(SHARDED, *toy_arguments(toy, tmp_path / "run"))
    shown = process.communicate(timeout=900)[0]
    assert process.returncode == 0, shown
    _, config = oisd.load_config(toy_arguments(toy, tmp_path / "alone"))
    run = oisd.prepare("alone", config)
    rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 0)
    oisd.set_old_logprobs(run, rollouts)
    rollouts[0].advantage = 1.0
    oisd.accumulate_gradients(run, rollouts[:1], 1000)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e9).item()
    run.grader.close()
    assert float(re.search(r"norm (\S+)", shown)[1]) == pytest.approx(norm, rel=1e-5)


DYING = """
import sys, oisd, plumbing
log_metrics = plumbing.log_metrics
def fail(run, metrics):
    log_metrics(run, metrics)
    if oisd.rank() == 1 and run.state["step"] == 2:
        raise MemoryError("no room left on this rank")
plumbing.log_metrics = fail if sys.argv.pop(1) == "error" else log_metrics
oisd.plumbing.program(oisd.main)
"""


@pytest.mark.parametrize("cause", ["error", "kill", "terminate", "Ctrl-C"])
def test_a_rank_that_dies_takes_the_run_down(toy, tmp_path, cause):
    """Within a minute, with its own error shown; a SIGTERM to the launcher ends in a checkpoint by both."""
    folder = tmp_path / "run"
    words = toy_arguments(toy, folder, num_steps=1000, checkpoint_every=0, test_data="")
    process = launch(DYING, cause, *words)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 400
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    start = time.monotonic()
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    if cause == "kill":
        os.kill(children[-1], signal.SIGKILL)
    elif cause == "terminate":
        process.terminate()
    elif cause == "Ctrl-C":  # the terminal sends it to all, and the launcher hands it on
        os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=240)[0]
    print(f"{cause}: over after {time.monotonic() - start:.1f} s")
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in children)
    if cause == "error":
        assert "MemoryError: no room left on this rank" in shown
    if cause in ("terminate", "Ctrl-C"):
        assert "continue by: accelerate launch oisd.py --resume" in shown, shown[-3000:]
        state = json.loads(next(folder.glob("checkpoints/step_*/state.json")).read_text())
        assert state["step"] == len(read_metrics(folder))


@needs_vllm
@needs_vectors
def test_two_ranks_with_an_engine_each(toy, tmp_path):
    """Different rollouts by rank, log-probs that agree after every update, an export that vLLM loads."""
    folder = tmp_path / "run"
    changes = {"sampler": "vllm", "num_steps": 3, "learning_rate": 1e-2, "rollouts_every": 1, "test_data": ""}
    process = launch(ROOT / "oisd.py", *toy_arguments(toy, folder, **changes))
    shown = process.communicate(timeout=600)[0]
    assert process.returncode == 0, shown[-3000:]
    assert all(row["sampler_logprob_gap"] < 1e-3 for row in read_metrics(folder))
    rollouts = [json.loads(line) for line in (folder / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    ranks = [[rollout["response"] for rollout in half] for half in (rollouts[:16], rollouts[16:])]
    assert len(rollouts) == 32 and ranks[0] != ranks[1] and len({tuple(part) for part in ranks}) == 2
    shutil.copy(toy / "train.jsonl", folder / "final")
    assert run_probe(folder / "final", tmp_path)["loaded"] < 1e-3

