"""The plumbing of a run: processes, signals, its folder, checkpoints, whole weights, log and picture.

Nothing here knows the method. Every function takes the run of `oisd.py`, or a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded_state
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from settings import ROOT, UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from oisd import Config, Rollout, Run

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves and loads on its own


class TrainingError(Exception):
    """The run cannot go on: its numbers would be wrong from here. `main` prints it and exits with code 1.

    `weights_whole`: no update of the step has been made, so that a checkpoint may still be written.
    """

    def __init__(self, message: str, weights_whole: bool = False):
        super().__init__(message)
        self.weights_whole = weights_whole


# ----------------------------------------------------- Processes ------------------------------------------------------


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(mine: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if world() == 1:
        return mine
    parts: list[list] = [[]] * world()
    dist.all_gather_object(parts, mine)
    return [entry for part in parts for entry in part]


def split_evenly(count: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` nearly equal ranges of 0 to count - 1."""
    return range(count * index // parts, count * (index + 1) // parts)


def say(text: str) -> None:
    """To the terminal, once, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def check_engines(config: Config, processes: int) -> None:
    """Raises: UserError unless the processes make up whole vLLM engines."""
    if processes % config.tensor_parallel:
        raise UserError(f"tensor_parallel = {config.tensor_parallel} of {processes} processes; launch a multiple of it")


def make_accelerator(config: Config, folder: Path, hours: float) -> Accelerator:
    """The process group and this process's device; an Accelerate config with FSDP2 is respected. Raises: UserError.

    `hours`: that one rank waits for another; rollouts may take long.
    """
    processes, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    check_engines(config, processes)
    # gloo beside NCCL: for lists of rollouts, for checkpoints and for offloaded weights.
    backend, timeout = "cuda:nccl,cpu:gloo" if cuda else "gloo", datetime.timedelta(hours=hours)
    accelerator = Accelerator(
        cpu=not cuda,  # not on Apple's GPUs
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=folder,
        # also where a launcher starts a single process
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)] if "RANK" in os.environ else [],
    )
    kind, plugin = accelerator.distributed_type.value, getattr(accelerator.state, "fsdp_plugin", None)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP") or (plugin and plugin.fsdp_version != 2):
        raise UserError(f"Accelerate's config asks for {kind}; this program shards by FSDP2 only: set fsdp_version: 2")
    if cuda:
        if not dist.is_initialized():  # one GPU is a group of one: the same FSDP2, the same bfloat16
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        cards = gather([str(torch.cuda.get_device_properties(accelerator.device).uuid)])
        if len(set(cards)) < len(cards):
            raise UserError(f"several processes share one GPU: {', '.join(cards)}; launch one process per GPU")
        say(f"{world()} processes; this machine has {torch.cuda.device_count()} GPUs; by rank: {', '.join(cards)}")
    return accelerator


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Use all cores while the other ranks wait: launchers start each process with one thread."""
    before = torch.get_num_threads()
    if world() > 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


RESERVE = 1.5e9  # bytes of a GPU: CUDA context, NCCL, fragmentation


def resident_bytes(model: nn.Module) -> int:
    """What stays on the GPUs, all together, while vLLM works: weights, and two float32 moments of those trained."""
    return sum(p.numel() * (p.element_size() + 8 * p.requires_grad) for p in model.parameters())


def largest_share(free: float, total: float, resident: float) -> float:
    """Share of a GPU of `total` bytes, `free` of them, that vLLM can take beside `resident` bytes; 0 if none."""
    return max(0.0, min(0.9, math.floor(100 * (free - RESERVE - resident) / total) / 100))


def vllm_share(device: torch.device, model: nn.Module | None) -> float:
    """`vllm_memory = "auto"`: the largest share that fits on the GPU of every rank, beside its shard of the model.

    None: the model is kept in the host's memory. Raises: UserError if no share fits.
    """
    resident = resident_bytes(model) / world() if model else 0
    share = min(gather([largest_share(*torch.cuda.mem_get_info(device), resident)]))
    if not share:
        raise UserError(
            f"weights and optimizer take {resident / 1e9:.1f} GB of each GPU and leave vLLM nothing: "
            "use more GPUs, lora_rank or cpu_offload"
        )
    say(f"vllm_memory = {share}: the largest share beside {resident / 1e9:.1f} GB of weights and optimizer")
    return share


def program(main: Callable[[], int]) -> None:
    """`main` as a program. One of several ranks leaves without Python's own end.

    After an error that would wait for the others, and they for this one; so the launcher sees it gone and ends them.
    And on a loaded machine it can abort in gloo's threads, when all is saved already.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        status = main()
    except BaseException:
        if not several:
            raise
        traceback.print_exc()
        status = 1
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


# ----------------------------------------------------- Signals --------------------------------------------------------


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. A BaseException: no library's `except Exception` may swallow it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Ctrl-C and SIGTERM raise a flag; all ranks look at it together after the rollouts and after the step.

    In both places the weights are those of a whole step, so they can be saved. A second signal leaves at once, except
    within a second: a launcher hands Ctrl-C on to processes that have got it from the terminal already.
    """

    number, since = 0, 0.0

    def __enter__(self) -> Signals:
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.number:
            if time.monotonic() > self.since + 1:
                os._exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        os.write(2, f"\n{signal.Signals(number).name}: saving soon; once more to leave at once without\n".encode())

    def check(self) -> None:
        """Raises: Interrupted, on all ranks, if any of them has got a signal."""
        if number := max(gather([self.number])):  # never written back: a signal may come while ranks gather
            raise Interrupted(number)


# ----------------------------------------------------- The folder and its checkpoints ---------------------------------


def open_folder(name: str, config: Config) -> tuple[Path, IO]:
    """The run's folder, and the lock that is held on it until the process ends. Raises: UserError.

    Without an `output_dir` it is the first of runs/<name>, runs/<name>-2, ... that holds no run and is not locked.
    """
    numbered = (f"runs/{name}-{count}" if count > 1 else f"runs/{name}" for count in itertools.count(1))
    for folder in map(Path, [config.output_dir] if config.output_dir else numbered):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another process is training in {folder}; wait for it or name another output_dir"
        except OSError as error:
            raise UserError(f"output_dir = {config.output_dir!r}: {one_line(error)}") from None
        else:
            if config.resume or not (folder / "config.toml").exists():
                return folder, lock
            lock.close()
            problem = f"output_dir = {str(folder)!r} already holds a run; continue it by --resume {folder}"
        if config.output_dir:
            raise UserError(problem)
    raise AssertionError("numbers do not end")


def forget_folder(folder: Path) -> None:
    """Remove a run's folder in which no run has started."""
    if not (folder / "config.toml").exists():
        (folder / "lock").unlink()
        with contextlib.suppress(OSError):  # what else is in it is not ours
            folder.rmdir()


def write_atomically(path: Path, text: str) -> None:
    """All of a file or nothing, whenever the program dies."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def finish_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder appear under its name at once. Its bytes reach the disk first."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    remove_folder(final)
    temporary.rename(final)


def remove_folder(folder: Path) -> None:
    """Under another name from the start, so that no half of it is ever taken for the whole."""
    old = folder.with_name(f"{folder.name}.old.part")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        shutil.rmtree(folder.rename(old))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first: a folder gets its name only when all of it is written."""
    return sorted((folder / "checkpoints").glob("step_" + "[0-9]" * 6))


def check_disk(folder: Path, model: nn.Module, config: Config, export_dtype: torch.dtype) -> None:
    """Raises: UserError if the disk cannot hold the run's checkpoints and its export."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    written = math.ceil(config.num_steps / (config.checkpoint_every or config.num_steps or 1))  # one at the end
    count = min(config.checkpoints_kept + 1, written)  # the oldest goes when the newest is whole
    held = sum(path.stat().st_size for path in folder.glob("checkpoints/**/*") if path.is_file())
    exported = sum(p.numel() for p in model.parameters()) * export_dtype.itemsize
    needed = count * 3 * trained + exported - held  # weights and two moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, but {count} checkpoints of {3 * trained / 1e9:.1f} GB and final/ "
            f"need {needed / 1e9:.1f}: free some, name another output_dir, or lower checkpoints_kept"
        )


KEPT = sharded_state.StateDictOptions(ignore_frozen_params=True)  # under adapters: those alone


def tensors_of(run: Run) -> dict[str, Any]:
    """Weights and optimizer state; an optimizer that has not stepped yet gets its state, for the loader to fill."""
    model, optimizer = sharded_state.get_state_dict(run.model, run.optimizer, options=KEPT)
    return {"model": model, "optimizer": optimizer}


def save_checkpoint(run: Run) -> Path:
    """Weights, optimizer and the step, by all ranks; any number of ranks may load them.

    Data order and every random draw follow from seed and step: there is no other state. Raises: TrainingError if the
    disk is full, say; what had been written of it is then gone again, and older checkpoints are whole.
    """
    final = run.folder / "checkpoints" / f"step_{run.state['step']:06d}"
    temporary = final.with_name(final.name + ".part")
    if gather([final.exists()])[0]:  # as rank 0 sees it: another machine's view of the disk may be older
        return final
    if rank() == 0:
        for rest in final.parent.glob("*.part"):
            shutil.rmtree(rest)
    run.accelerator.wait_for_everyone()
    try:
        dcp.save(tensors_of(run), checkpoint_id=temporary, no_dist=world() == 1)
        if rank() == 0:
            (temporary / "state.json").write_text(json.dumps(run.state), encoding="utf-8")
            finish_folder(temporary, final)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as problem:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        failures = getattr(problem, "failures", {})  # by rank, with their tracebacks
        problem = next(iter(failures.values()))[0] if failures else problem
        step = run.state["step"]
        raise TrainingError(f"the checkpoint of step {step} was not written: {one_line(problem)}") from problem
    if rank() == 0:
        for old in checkpoints(run.folder)[: -run.config.checkpoints_kept]:
            remove_folder(old)
    run.accelerator.wait_for_everyone()
    return final


def load_checkpoint(run: Run) -> None:
    """Continue from the newest whole checkpoint. What later steps left goes to `abandoned/`: they come again.

    Raises: UserError if the data are no longer those that the run was started with.
    """
    found = gather(checkpoints(run.folder)[-1:] if rank() == 0 else [])  # as rank 0 sees the disk
    if found:
        state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        for name in ("train_data", "test_data"):
            if state[name] != run.state[name]:
                raise UserError(f"--resume: {name} is {run.state[name]}, but the run was started with {state[name]}")
        tensors = tensors_of(run)
        dcp.load(tensors, checkpoint_id=found[-1], no_dist=world() == 1)
        parts = {"model_state_dict": tensors["model"], "optim_state_dict": tensors["optimizer"]}
        options = dataclasses.replace(KEPT, strict=not run.config.lora_rank)  # adapters: most weights are not there
        sharded_state.set_state_dict(run.model, run.optimizer, **parts, options=options)
        run.state = state
    step = run.state["step"]
    say(f"continuing after step {step}" if found else f"{run.folder} has no checkpoint yet: starting with step 1")
    if rank() == 0:
        abandon(run.folder, step)


def abandon(folder: Path, step: int) -> None:
    """Move metrics and rollouts of steps after `step`, and lines cut off by a crash, to `abandoned/`."""
    metrics, attic = folder / "metrics.jsonl", folder / "abandoned"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if read_line(line).get("step", step + 1) <= step]
    rest = [line for line in lines if line not in kept]
    rollouts = [path for path in folder.glob("rollouts/step_*.jsonl") if int(path.stem[5:]) > step]
    if rest or rollouts:
        attic.mkdir(exist_ok=True)
        with (attic / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line if line.endswith("\n") else line + "\n" for line in rest)
        write_atomically(metrics, "".join(kept))
    for path in rollouts:
        path.replace(attic / path.name)


def commit() -> str:
    """The checkout's commit, with + where its programs or tables differ from it; `unknown` outside a checkout."""
    changes = ["status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.toml"]
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def stop(run: Run, reason: str, save: bool) -> bool:
    """An orderly stop before the end: write a checkpoint where that is of use, and say how to continue.

    -> False if it could not be written.
    """
    saved = True
    try:
        if save and run.state["step"] and run.config.resumable:
            save_checkpoint(run)
    except TrainingError as problem:
        reason, saved = f"{reason}; {problem}", False
    newest = checkpoints(run.folder)[-1:]
    kept = f"{newest[0].name} is whole" if newest else "no checkpoint yet"
    again = f"{'python' if world() == 1 else 'accelerate launch'} {run.config.program} --resume {run.folder}"
    again = f"continue by: {again}" if run.config.resumable else "it can only be started anew"
    if rank() == 0:
        print(f"\noisd: {reason}; {kept}; {again}", file=sys.stderr)
    return saved


# ----------------------------------------------------- Whole weights --------------------------------------------------


def load_shards(model: nn.Module, source: nn.Module | None, device: torch.device, offload: bool = False) -> None:
    """Give a sharded model without storage the weights that rank 0 has in `source`, tensor by tensor."""
    model.to_empty(device="cpu" if offload else device)
    weights = source.state_dict() if source is not None else {}
    settings = {"full_state_dict": True, "broadcast_from_rank0": True, "cpu_offload": offload or device.type == "cpu"}
    sharded_state.set_model_state_dict(model, weights, options=sharded_state.StateDictOptions(**settings))
    # Rotary frequencies are in no state dict, and may go by two names: Phi3's longrope keeps what it had at first.
    buffers = [dict(source.named_buffers(remove_duplicate=False)) if source is not None else {}]
    dist.broadcast_object_list(buffers)
    for name, buffer in buffers[0].items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    hold_to_source(model, source, device)


def hold_to_source(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Every parameter and buffer must be what rank 0 has in `source`. Raises: UserError that names the first other."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])

    loaded, differing = tensors(source) if source is not None else {}, []
    for name, tensor in tensors(model).items():
        mine = full_tensor(tensor, device)  # all ranks gather, rank 0 compares
        if source is not None and not (name in loaded and torch.equal(mine.cpu(), loaded[name].cpu())):
            differing.append(name)
    differing = gather(differing)
    if differing:
        raise UserError(f"{type(model).__name__}: {differing[0]} did not reach the sharded model as it was loaded")


def full_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A parameter as an ordinary tensor on the device. Of a sharded one, all ranks must ask in the same order."""
    tensor = tensor.detach().to(device)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight as the model's files have it, adapters merged, one whole tensor at a time.

    All ranks must iterate to the end. Tied weights come once, under the first of their names.
    """
    kept = model.state_dict().keys()  # its hooks also reshard what a forward pass without backward left whole
    tensors = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in kept)]
    for name, tensor in tensors:
        owner, adapted, last = name.rpartition(".base_layer.")
        if adapted and last == "weight":
            delta = full_tensor(model.get_submodule(owner).get_delta_weight("default"), device)
            yield f"{owner}.weight", (full_tensor(tensor, device) + delta).to(dtype)
        elif ".lora_" not in name:
            yield name.replace(".base_layer.", "."), full_tensor(tensor.detach().to(dtype), device)


def export(run: Run) -> Path:
    """`final/`: an ordinary Hugging Face folder, in the dtype of the model's own files.

    Weights are made whole one at a time; rank 0's host holds a copy in that dtype while it writes.
    """
    temporary, final, model = run.folder / "final.part", run.folder / "final", run.model.model
    state = {}
    for name, tensor in full_weights(model, run.export_dtype, run.accelerator.device):
        if rank() == 0:
            state[name] = tensor.to("cpu", copy=True).contiguous()
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state, max_shard_size="4GB")
        model_config = copy(model.config)
        model_config.dtype = run.export_dtype  # not the trainer's float32
        for part in (model_config, run.generation_config, run.tokenizer):
            part.save_pretrained(temporary)
        finish_folder(temporary, final)
    run.accelerator.wait_for_everyone()
    return final


def spread_weights(model: nn.Module, seed: int) -> None:
    """Give matrices anywhere within the cells of the bfloat16 grid in whose middle a published checkpoint has them.

    Rounded to bfloat16 nothing changes (a single process on a CPU alone reads the embedding in float32). But from the
    middle a weight has to move by half a cell before rounding shows it: 69 % of SmolLM2's need 244 updates of 1e-6 or
    more. Spread evenly, just so many cross a border at once that the mean of the rounded weights moves as that of the
    float32 ones. It is dithering, once instead of at every rounding (stochastic rounding, arXiv 2010.06192).
    """
    generator, spread, total = torch.Generator().manual_seed(seed), 0, 0
    for parameter in model.parameters():
        if parameter.ndim > 1:
            bits = parameter.data.view(torch.int32)  # in which neighbours in bfloat16 are 2^16 apart
            in_middle = (bits & 0xFFFF == 0) & (bits & 0x7FFFFFFF != 0)
            offset = torch.randint(1 - 2**15, 2**15, bits.shape, generator=generator, dtype=torch.int32)
            bits += offset.to(bits.device) * in_middle
            spread, total = spread + int(in_middle.sum()), total + in_middle.numel()
    say(f"spread_weights: {100 * spread / total:.0f} % of the matrices' weights were on the bfloat16 grid")


def local(parameter: Tensor) -> Tensor:
    """This rank's shard of it, all of it where nothing is sharded; without gradient, in the same memory."""
    return parameter.data.to_local() if isinstance(parameter, DTensor) else parameter.data


def bfloat16_images(model: nn.Module, most: int = 2**22) -> Tensor:
    """Some of the trained weights of this rank's shards, evenly spaced, as bfloat16 sees them; always the same ones."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stride = -(-sum(parameter.numel() for parameter in trained) // most)
    return torch.cat([local(parameter).flatten()[::stride].bfloat16() for parameter in trained])


def moved_weights(run: Run) -> float:
    """Share of the trained weights whose bfloat16 image is not what it was before the first step."""
    moved = bfloat16_images(run.model) != run.images
    counts = gather([(int(moved.sum()), len(moved))])
    return sum(count for count, _ in counts) / sum(size for _, size in counts)


# ----------------------------------------------------- Log ------------------------------------------------------------


def rollout_metrics(rollouts: Sequence[Rollout], group_size: int) -> dict[str, float]:
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    return {
        "reward": statistics.fmean(rollout.reward for rollout in rollouts),
        "response_length": statistics.fmean(len(rollout.response_ids) for rollout in rollouts),
        "truncated_fraction": statistics.fmean(rollout.finish_reason == "length" for rollout in rollouts),
        "zero_std_fraction": statistics.fmean(len({rollout.reward for rollout in group}) == 1 for group in groups),
    }


def log_metrics(run: Run, metrics: dict[str, Any]) -> None:
    if rank() == 0:
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
    numbers = {name: value for name, value in metrics.items() if value is not None}
    run.accelerator.log(numbers, step=metrics["step"])


def write_rollouts(run: Run, step: int, rollouts: Sequence[Rollout]) -> None:
    """Every rollout of a step, one JSON object per line, special tokens shown."""
    entries = (
        {
            "row": rollout.row,
            "prompt": run.tokenizer.decode(rollout.prompt_ids),
            "response": run.tokenizer.decode(rollout.response_ids),
            "reward": rollout.reward,
            "advantage": torch.as_tensor(rollout.advantage).tolist(),
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.response_ids),
        }
        for rollout in rollouts
    )
    (run.folder / "rollouts").mkdir(exist_ok=True)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_atomically(run.folder / "rollouts" / f"step_{step:06d}.jsonl", lines)


def peak_bytes(device: torch.device, sampler: Any = None) -> int:
    """Most memory that this process has held: of its GPU since `reset_peak`, without vLLM's, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - getattr(sampler, "ghost_bytes", 0)
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would start at the size of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_bytes(device: torch.device) -> int:
    """What the GPU itself says is taken, by every process and library; 0 on a CPU."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return total - free


def read_line(line: str) -> dict:
    """A line of metrics.jsonl; empty if a crash has cut it off."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def read_metrics(folder: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(read_line, lines) if row]


CURVES = {  # the upper three panels are those of Figure 5
    "reward": ("reward",),
    "entropy of the student layer (nats)": ("student_entropy",),
    "response length (tokens)": ("response_length",),
    "entropy of the policy (nats)": ("entropy",),
    "JS to the final layer: what to think": ("think_js", "think_js_positive", "think_js_negative"),
    "JS to the final layer: where to look": ("attention_js", "attention_js_positive", "attention_js_negative"),
}


def draw_curves(folder: Path) -> None:
    """`curves.png` from `metrics.jsonl`: the paper's Figure 5, and the divergences. A failure is said, never raised."""
    try:
        draw(read_metrics(folder), folder / "curves.png")
    except Exception as problem:  # a picture never ends a run
        say(f"curves.png was not drawn: {type(problem).__name__}: {problem}")


def draw(rows: Sequence[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, CURVES.items()):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            colour = "tab:orange" if name == "student_entropy" else None
            axis.plot(*zip(*points), label=name, color=colour) if points else None
        axis.set(title=title, xlabel="Training Step")
        axis.grid(linestyle="--", alpha=0.5)
        if len(names) > 1 and axis.lines:
            axis.legend()
    axes[0, 0].set_ylim(0, 1.02)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)
