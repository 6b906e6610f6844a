"""The plan against arithmetic and a measured step, the benchmarks at small sizes, preflight with failing stages."""

import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys

import oisd
import pytest
from tools import plan, solutions
from transformers import Qwen3Config

from conftest import ROOT


@pytest.fixture(scope="session")
def words_of(tmp_path_factory):
    """Return a function from changed fields to a command line, for a model of 21 M parameters without weights."""
    folder = tmp_path_factory.mktemp("shape")
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "head_dim": 64}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}
    Qwen3Config(**sizes, max_position_embeddings=4096).save_pretrained(folder)
    known = {"config": "configs.toml:tiny", "model": folder, "max_response_tokens": 256, "max_tokens_per_gpu": 1024}
    return lambda **changes: [f"--{name}={value}" for name, value in (known | changes).items()]


@pytest.fixture(scope="session")
def planned(words_of):
    return functools.cache(lambda gpus=1, **changes: plan.plan(oisd.load_config(words_of(**changes))[1], gpus))


MEASURE = """
import sys, torch, torch.distributed as dist, oisd
from support.processes import peak_bytes
from torch.distributed.device_mesh import init_device_mesh
from tools import plan
config = oisd.load_config(sys.argv[1:])[1]
cpu = torch.device("cpu")
before = peak_bytes(cpu)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = oisd.TappedModel(oisd.load_model(config, empty_on="cpu")[0], config).train()
oisd.shard(model, init_device_mesh("cpu", (1,)), config)
optimizer = torch.optim.AdamW(model.parameter_groups())
batch = oisd.pack(plan.longest_batch(config), config)
for _ in range(2):
    plan.micro_batch(model, batch)
    optimizer.step()
print("measured", peak_bytes(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
@pytest.mark.parametrize("layers", ["0", "2"])
def test_planned_memory_is_what_a_step_takes(words_of, planned, layers):
    command = [sys.executable, "-c", MEASURE, *words_of(recompute_layers=layers)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    measured = int(shown.split("measured")[1])
    training = planned(recompute_layers=layers).training
    print(f"recompute_layers {layers}: planned {training / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert training == pytest.approx(measured, rel=0.15)


def test_planned_parts_are_arithmetic(planned):
    layer = 512 * (8 + 2 * 4 + 8) * 64 + 3 * 512 * 1536 + 2 * 512 + 2 * 64
    parameters = 4 * layer + 2 * 8000 * 512 + 512
    # A layer keeps its input, the outputs of norms and attention, query, key, value, and three of the MLP's width.
    layers = 4 * 1024 * (4 * (5 * 512 + 2 * 4 * 64 + 3 * 1536))
    for gpus in (1, 4):
        found = planned(gpus)
        assert found.parts["parameters"] == pytest.approx(4 * parameters / gpus, rel=0.01)
        assert found.parts["optimizer"] == pytest.approx(8 * parameters / gpus, rel=0.01)
        assert found.parts["gradients"] >= 4 * parameters / gpus * 0.7
        assert layers < found.parts["activations, rest"] < 2.5 * layers
        assert found.parts["logits chunk"] == 2 * 4 * 8000 * 1024
    assert planned(4, lora_rank=8).training < found.training - 0.9 * 12 / 4 * 20e6


def test_the_plan_says_what_to_change(words_of, planned, capsys, monkeypatch):
    words, found = words_of(sampler="vllm"), planned(4, sampler="vllm")
    monkeypatch.setattr(plan, "plan", lambda config, gpus: found if gpus == 4 else None)
    assert plan.main([*words, "--gpus", "4"]) == 0
    assert capsys.readouterr().out.count("card: yes; vLLM gets 0.90 of it and holds") == 4
    assert plan.largest_share(24e9, 24e9, 10e9) == 0.52  # (24 - 1.5 - 10) / 24
    assert plan.largest_share(12e9, 24e9, 4e9) == 0.27  # another process has half of the card
    config = oisd.load_config(words)[1]
    config = dataclasses.replace(config, recompute_layers="all")
    for changes, message in (
        ({"resident": 10e9}, "vLLM gets 0.52"),
        ({"training": 23e9}, "no, training takes 23.0 GB: more GPUs, lora_rank, or a smaller"),
        ({"training": 10e9, "kept_layer": 5e9}, "recompute_layers = 2 instead of 4 fits"),
        ({"resident": 15e9, "vllm_least": 8e9}, "vLLM needs 8.0 GB and gets 7.4: more GPUs"),
    ):
        assert message in plan.verdict(24, dataclasses.replace(found, **changes), config)
    config = dataclasses.replace(config, vllm_memory=0.6)
    assert "fits vllm_memory = 0.52 at most" in plan.verdict(24, dataclasses.replace(found, resident=10e9), config)


def bench_rows(path, *words):
    command = [sys.executable, "tools/bench.py", *words, "--repeats", "1", "--csv", str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return {row[0]: row[1:] for row in csv.reader(path.read_text().splitlines())}


def test_every_side_computes_the_same_loss(tmp_path):
    words = "lens --tokens 64 --hidden 32 --vocabulary 500 --only ours,dense".split()
    rows = bench_rows(tmp_path / "lens.csv", *words)
    ours, dense = ([float(number) for number in rows[side][-2:]] for side in ("ours", "dense"))
    assert rows["lens"][-2:] == ["loss", "gradient"] and ours == pytest.approx(dense, rel=1e-4)


def test_preflight_goes_on_after_a_stage_that_fails(tmp_path):
    """The run to be resumed fails: one FAIL with its message, one row left out, and the report has both."""
    words = f"tools/preflight.py --only resume --ranks 1 --report {tmp_path}/report.md --folder {tmp_path}/folder"
    command = [sys.executable, *words.split(), "--train_data", "nowhere.jsonl"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = (tmp_path / "report.md").read_text()
    assert process.returncode == 1 and report.count("FAIL") == 1, process.stdout + process.stderr
    assert "| resume | FAIL | ended with 2: oisd: error: dataset 'nowhere.jsonl'" in report
    assert "| resume again | left out |" in report and "1 failed: resume" in report
    assert process.stdout == report


def test_solutions_are_joined_by_question(tmp_path, capsys):
    """White space does not count, thoughts are left out, an incomplete solution is passed over."""

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def solved(question, *texts):
        return {"question": question} | {f"r1_solution_{i}": text for i, text in enumerate(texts, 1)}

    asked = [{"question": q, "prompt": [q], "reward_model": {"ground_truth": "3"}} for q in ("1+1", "1 +\n 2", "2+2")]
    given = [solved("1 + 2 ", "<think>endless", "<think>a</think>\n\n three ", ""), solved("1+1", "two", "", None)]
    given += [solved("9+9", "18", "", ""), solved("2+2", "<think>endless", "", None), solved("1+1", "zwei", "", "")]
    words = [f"{tmp_path}/joined.jsonl", "--problems", write("problems.jsonl", asked), "--solutions"]
    assert solutions.main([*words, write("solutions.jsonl", given)]) == 0
    for other in ([solved("7+7", "14")], [{"question": "1+1", "proof": "two"}]):  # the file stays as it is
        assert solutions.main([*words, write("other.jsonl", other)]) == 2
    shown = capsys.readouterr()
    assert "2 of 3 problems have a solution" in shown.out and shown.err.count("\n") == 2
    found = [json.loads(line) for line in (tmp_path / "joined.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["solution"]) for row in found] == [(["1+1"], "two"), (["1 +\n 2"], "three")]
    assert all(row["reward_model"]["ground_truth"] == "3" for row in found)
