"""A small model that answers sums at random, and what runs of the program share."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as oisd.py sets it, but torch is loaded here first

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import laptop
import oisd
from test_oisd import SHAPE

ROOT = Path(__file__).resolve().parent.parent
PAPER_DATA = ROOT.parent / "shared" / "data"
needs_paper_data = pytest.mark.skipif(not PAPER_DATA.exists(), reason="the paper's data are not part of the repository")
needs_vectors = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="Inductor's code for a CPU needs vectors"
)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is installed on GPUs, or as its CPU build in .ci/run"
)

def make_toy(folder, tied):
    """A small Qwen3 that has learnt to answer any sum with \\boxed{1}, \\boxed{2} or \\boxed{3}, at random."""
    torch.manual_seed(0)
    tokenizer = laptop.make_tokenizer()
    shape = SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "head_dim": 32}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**shape, **ends, tie_word_embeddings=tied, max_position_embeddings=128, dtype="float32")
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        prompts = [f"<user>{a}+{b}<assistant>" for a, b in torch.randint(0, 10, (32, 2)).tolist()]
        texts = [f"{p}\\boxed{{{d}}}<eos>" for p, d in zip(prompts, torch.randint(1, 4, (32,)).tolist())]
        ids = tokenizer(texts, return_tensors="pt").input_ids
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = [(a, b) for a in range(3) for b in range(3) if 1 <= a + b <= 3]
    problems = [{"question": f"{a}+{b}", "answer": str(a + b), "solution": f"{a}+{b}={a + b}"} for a, b in pairs]
    (folder / "train.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder, tied=True)
    return folder


@pytest.fixture(scope="session")
def untied_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied_toy")
    make_toy(folder, tied=False)
    return folder


def toy_arguments(toy, output, **changes):
    fields = {
        "model": toy,
        "train_data": toy / "train.jsonl",
        "test_data": toy / "train.jsonl",
        "output_dir": output,
        "student_layer": 1,
        "prompts_per_step": 4,
        "mini_batch_prompts": 2,
        "max_response_tokens": 8,
        "learning_rate": 1e-3,
        "num_steps": 4,
        "checkpoint_every": 2,
        "rollouts_every": 2,
        "attention_weight": 1.0,
        "sampler": "hf",
    }
    words = ["--config", str(ROOT / "configs.toml:tiny")]
    return words + [f"--{name}={value}" for name, value in (fields | changes).items()]


def toy_sampler(toy):
    _, config = oisd.load_config(toy_arguments(toy, "unused"))
    tokenizer = oisd.load_tokenizer(config)
    model, _ = oisd.load_model(config)
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.train_data, tokenizer, config)
    sampler = laptop.HfSampler(model, end_ids, config, torch.device("cpu"))
    return config, sampler, end_ids, [problem.prompt_ids for problem in problems]


def in_order(samples, prompts):
    """What a sampler streams, as rollouts in the order of the prompts."""
    return [oisd.Rollout(prompts[sample[0]], *sample[1:]) for sample in sorted(samples)]


def assert_same_metrics(one, other):
    """Of two runs, but for sums that round otherwise: losses to single precision, a count of weights as a count."""
    assert len(one) == len(other)
    for a, b in zip(one, other):
        a, b = dict(a), dict(b)
        # Of the toy's 52,000 weights, some lie so near a border of their bfloat16 cell that a rounding moves them over.
        assert b.pop("moved_weights") == pytest.approx(a.pop("moved_weights"), abs=20 / 52_000)
        a.pop("sampler_logprob_gap"), b.pop("sampler_logprob_gap")  # itself a rounding
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


def read_metrics(folder):
    timings = ("seconds", "seconds_rollout", "tokens_per_second", "peak_memory_gib", "device_memory_gib")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timings} for row in rows]



def start_run(arguments):
    command = [sys.executable, str(ROOT / "oisd.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)



def wait_for(path, process):
    """Until the file exists; fails when the process has ended, with what it said."""
    deadline = time.monotonic() + 400
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def launch(program, *arguments):
    """Two processes by torchrun, as a Popen; `program` is a file or source text."""
    folder = Path(tempfile.mkdtemp())
    if isinstance(program, str):
        (folder / "program.py").write_text(program)
        program = folder / "program.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], **pipes, env=env, cwd=folder, start_new_session=True)

