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
from baselines import bupo, estimators, opsd, ppo

from conftest import ROOT, assert_same_run, launch, needs_vectors, needs_vllm, output_of, read_metrics, toy_arguments
from test_vllm import run_probe

TWO_RANKS = """
import importlib, json, sys
import oisd, torch
from accelerate import Accelerator
from support import processes
Accelerator.end_training = lambda self: None  # the group serves all runs
train = oisd.train
def watched(run):
    parameters = list(run.model.parameters())
    assert all(p.dtype == torch.float32 for p in parameters if p.requires_grad)
    assert sum(p.to_local().numel() for p in parameters) < 0.51 * sum(p.numel() for p in parameters)
    def look(layer, inputs, output):
        assert output.dtype == getattr(torch, run.config.dtype), output.dtype
    run.model.layers[0].register_forward_hook(look)
    train(run)
oisd.train = watched
for module, words in json.loads(sys.argv[1]):
    method = getattr(importlib.import_module(module), "METHOD", oisd.Method())
    assert oisd.main(words, method) == 0, words
processes.program(lambda: 0)
"""
# 3 prompts for two ranks, 3 rollouts per update in 4 micro-batches, 7 held-out problems in batches of 2
UNEQUAL = {"prompts_per_step": 3, "mini_batch_prompts": 1, "group_size": 3, "sampler_batch": 2}
UNEQUAL |= {"max_prompt_tokens": 5, "max_tokens_per_gpu": 13}
BFLOAT16 = {"dtype": "bfloat16", "clip_low": 0, "clip_high": 0, "mini_batch_prompts": 4}
BASELINE = {"think_weight": 0, "attention_weight": 0, "max_tokens_per_gpu": 128}
BUPO = {"config": "configs.toml:tiny_bupo", "policy_layer_steps": 2}  # then it is GRPO
OPSD = {"config": "configs.toml:tiny_opsd", "think_weight": 1}
RUNS = {  # name: program, toy, settings
    "tied": (oisd, "toy", {}),
    "untied": (oisd, "untied_toy", {"internal_mean": "token", "recompute_layers": "all"}),
    "unequal": (oisd, "toy", UNEQUAL),
    "adapters": (oisd, "toy", {"lora_rank": 4, "learning_rate": 1e-2}),
    "rloo": (estimators, "toy", BASELINE | {"config": "configs.toml:tiny_rloo"}),
    "ppo": (ppo, "toy", BASELINE | {"config": "configs.toml:tiny_ppo"}),
    "bupo": (bupo, "toy", BASELINE | BUPO),
    "opsd": (opsd, "toy", BASELINE | OPSD),
}


def method_of(program):
    return getattr(program, "METHOD", oisd.Method())


def without_last_checkpoint(source, target):
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step_000004")
    return target


@pytest.fixture(scope="session")
def one_and_two(request, tmp_path_factory):
    """Make each of RUNS with one process and with two: -> a folder with `1 NAME` and `2 NAME` for each."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = []
    for name, (program, toy, changes) in RUNS.items():
        toy = request.getfixturevalue(toy)
        runs.append((program.__name__, toy_arguments(toy, folder / f"2 {name}", **changes)))
        assert oisd.main(toy_arguments(toy, folder / f"1 {name}", **changes), method_of(program)) == 0
    parted = without_last_checkpoint(folder / "1 tied", folder / "2 after 1")
    runs.append(("oisd", ["--resume", str(parted)]))
    runs.append(("oisd", toy_arguments(request.getfixturevalue("toy"), folder / "bfloat16", **BFLOAT16)))
    output_of(launch(TWO_RANKS, json.dumps(runs)))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(one_and_two, name, tmp_path):
    """Compare metrics and weights of four steps by one process, by two, and by one that continues what two began."""
    one, two = one_and_two / f"1 {name}", one_and_two / f"2 {name}"
    assert_same_run(one, two)
    parted = without_last_checkpoint(two, tmp_path / "parted")
    assert oisd.main(["--resume", str(parted)], method_of(RUNS[name][0])) == 0
    assert_same_run(two, parted)
    # BuPO reads no lens in its first phase
    assert ["think_js" in row for row in read_metrics(one)] == [name != "bupo"] * 2 + [True] * 2


def test_saved_by_one_resumed_by_two(one_and_two):
    assert_same_run(one_and_two / "1 tied", one_and_two / "2 after 1")


def test_bfloat16_ratios_are_exactly_1(one_and_two):
    """A clip of width 0 would count any other. Old log-probs stay float32, while layers run in bfloat16."""
    rows = read_metrics(one_and_two / "bfloat16")
    assert all(row["zero_std_fraction"] < 1 for row in rows)
    assert not any(row["clip_fraction"] for row in rows)


GROUP_OF_ONE = """
import sys, torch, oisd
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
sys.exit(oisd.main(sys.argv[1:]))
"""


def test_one_sharded_process_is_a_plain_one(toy, one_and_two, tmp_path):
    """A single GPU runs this way."""
    command = [sys.executable, "-c", GROUP_OF_ONE, *toy_arguments(toy, tmp_path / "run")]
    subprocess.run(command, check=True, cwd=ROOT)
    assert_same_run(one_and_two / "1 tied", tmp_path / "run")


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
    assert run_probe(run / "final", tmp_path)["loaded"] < 1e-3
