"""A small model that answers sums at random, and helpers that several test files share."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `support` sets it, before torch loads

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
PAPER_DATA = ROOT.parent / "shared" / "data"
needs_paper_data = pytest.mark.skipif(not PAPER_DATA.exists(), reason="the paper's data is not in the repository")
needs_vectors = pytest.mark.skipif(os.getenv("ATEN_CPU_CAPABILITY") == "default", reason="needs vector instructions")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 128}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def make_toy(folder, tied):
    """Build a Qwen3 that answers any sum with \\boxed{1}, \\boxed{2} or \\boxed{3}, at random."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "middle")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**SHAPE, **ends, vocab_size=len(tokenizer), tie_word_embeddings=tied, dtype="float32")
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        prompts = [f"<user>{a}+{b}<assistant>" for a, b in torch.randint(0, 10, (32, 2)).tolist()]
        answers = torch.randint(1, 4, (32,)).tolist()
        texts = [f"{prompt}\\boxed{{{answer}}}<eos>" for prompt, answer in zip(prompts, answers)]
        ids = tokenizer(texts, return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = [(a, b) for a in range(3) for b in range(3) if 1 <= a + b <= 3]
    rows = [{"question": f"{a}+{b}", "answer": str(a + b), "solution": f"{a}+{b}={a + b}"} for a, b in pairs]
    write_lines(folder / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), tied=True)


@pytest.fixture(scope="session")
def untied_toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("untied_toy"), tied=False)


def toy_arguments(toy, output, **changes):
    """Write the command line of a run of four small steps on the toy."""
    files = {"model": toy, "train_data": toy / "train.jsonl", "test_data": toy / "train.jsonl", "output_dir": output}
    sizes = {"prompts_per_step": 4, "mini_batch_prompts": 2, "max_response_tokens": 8, "num_steps": 4}
    intervals = {"checkpoint_every": 2, "rollouts_every": 2}
    others = {"student_layer": 1, "learning_rate": 1e-3, "attention_weight": 1.0, "sampler": "hf"}
    fields = files | sizes | intervals | others | changes
    return ["--config", str(ROOT / "configs.toml:tiny"), *(f"--{name}={value}" for name, value in fields.items())]


def evaluation_arguments(toy, output, **changes):
    """Write the command line of an evaluation of the toy on its sums."""
    fields = {"model": toy, "benchmarks": f"sums={toy / 'train.jsonl'}", "output_dir": output, "samples": 5}
    fields |= {"sampler": "hf", "dtype": "float32", "max_response_tokens": 8, "sampler_batch": 10}
    fields |= {"question_field": "question", "answer_field": "answer"} | changes
    return [f"--{name}={value}" for name, value in fields.items()]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_metrics(folder):
    """Read a run's metrics without those that measure time or memory."""
    measured = ("seconds", "seconds_rollout", "tokens_per_second", "peak_memory_gib", "device_memory_gib")
    rows = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def assert_same_run(one, other):
    """Compare metrics and exported weights of two runs whose sums were rounded differently."""
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        # A few of the toy's 52,000 weights are so close to the border of a bfloat16 cell that rounding moves them over.
        assert b.pop("moved_weights") == pytest.approx(a.pop("moved_weights"), abs=20 / 52_000)
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (one, other)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


def launch(program, *arguments):
    """Start two processes with torchrun. `program`: a file, or source text."""
    folder = Path(tempfile.mkdtemp())
    if isinstance(program, str):
        (folder / "program.py").write_text(program)
        program = folder / "program.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], **pipes, env=env, cwd=folder, start_new_session=True)


def output_of(process):
    """Wait for a process that must succeed."""
    shown = process.communicate(timeout=900)[0]
    assert process.returncode == 0, shown
    return shown
