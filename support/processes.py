"""Processes of a run: ranks, collectives, devices, signals and exit.

`torchrun` or `accelerate launch` starts one process per GPU. One process alone needs no launcher.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from support.settings import UserError


class TrainingError(Exception):
    """The run cannot continue: from here on its numbers would be wrong. Exit code 1.

    `weights_intact`: the step has not updated any weight yet, so a checkpoint may be written.
    """

    def __init__(self, message: str, weights_intact: bool = False):
        super().__init__(message)
        self.weights_intact = weights_intact


# ---- Ranks -------------------------------------------------------------------------------------


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(mine: list) -> list:
    """Concatenate the lists of all ranks, in rank order. Every rank gets the result."""
    if world() == 1:
        return mine
    parts: list[list] = [[]] * world()
    dist.all_gather_object(parts, mine)
    return [entry for part in parts for entry in part]


class CompactPickle:
    """Pickle lists of numbers as arrays of 4 bytes: other ranks get them in a tenth of the time.

    Floats must be float32 values.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        for name, value in state.items():
            if isinstance(value, list) and value and isinstance(value[0], int | float):
                state[name] = array("i" if isinstance(value[0], int) else "f", value)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, array) else value)


def from_rank_0(make: Callable):
    """Call `make` on rank 0 only. Every rank gets its result."""
    return gather([make()] if rank() == 0 else [])[0]


def wait_for_all() -> None:
    """Wait until every rank is here."""
    gather([])


def split_by_size(sizes: Sequence[int], limit: int, ranks: int = 1) -> list[list[int]]:
    """Distribute items over as few batches of at most `limit` as possible: -> their indices.

    The number of batches is a multiple of `ranks`; batch i belongs to rank i % ranks. Some may be
    empty: all ranks run the same number of batches, because each one is a collective operation and
    a rank with fewer batches would leave the others waiting.
    Greedy: the longest item goes into the emptiest batch. The fullest batches come first, so that
    batches that run at the same time have about the same size.
    """
    longest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    count = ranks * math.ceil(sum(sizes) / (limit * ranks))
    while True:
        batches = [(0, number, []) for number in range(count)]  # heap of (size, number, indices)
        for index in longest_first:
            size, number, indices = batches[0]
            indices.append(index)
            heapq.heapreplace(batches, (size + sizes[index], number, indices))
        fits = max(size for size, _, _ in batches) <= limit
        if fits or count >= len(sizes):
            batches.sort(key=lambda batch: (-batch[0], batch[1]))
            return [indices for _, _, indices in batches]
        count += ranks


# ---- What the user sees ------------------------------------------------------------------------
# Rank 0 prints lines. On a terminal, one more line below them says what is happening now and is
# overwritten; a file gets the lines only. There are no colors and no escape codes.


def terminal_width() -> int:
    """Return the columns that a passing line may fill; 0 where standard output is no terminal."""
    if rank() > 0 or not sys.stdout.isatty():
        return 0
    return shutil.get_terminal_size().columns - 1


def say(text: str) -> None:
    """Print a line that stays."""
    doing("")
    if rank() == 0:
        print(text, flush=True)


def doing(text: str) -> None:
    """Show on a terminal what takes a while, until the next call of this or `say`."""
    if width := terminal_width():
        print(f"\r{text[:width]:{width}}", end="\r", flush=True)


def counted(items: Iterable, total: int, text: str) -> Iterator:
    """Yield the items, and show how many of this rank's `total` have come."""
    if world() > 1:
        text = f"{text} on rank 0"
    doing(f"{text}: 0 of {total}")
    for done, item in enumerate(items, start=1):
        yield item
        doing(f"{text}: {done} of {total}")


# ---- Devices -----------------------------------------------------------------------------------


def make_accelerator(folder: Path, hours: float, tracker: str = "none") -> Accelerator:
    """Join the process group and pick this process's device; an Accelerate config is respected.

    `hours`: timeout of collectives; sampling rollouts may take long.
    Raises: UserError if Accelerate is configured for anything but FSDP2 without offloading.
    """
    cuda = torch.cuda.is_available()
    # gloo beside NCCL: for lists of rollouts and for checkpoints.
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    group = InitProcessGroupKwargs(backend=backend, timeout=datetime.timedelta(hours=hours))
    accelerator = Accelerator(
        cpu=not cuda,  # never Apple's GPUs
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
        kwargs_handlers=[group] if "RANK" in os.environ else [],
    )
    kind = accelerator.distributed_type.value
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    wrong_version = plugin is not None and plugin.fsdp_version != 2
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP") or wrong_version:
        raise UserError(f"Accelerate's config asks for {kind}: this program needs FSDP2")
    if isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy):
        raise UserError("Accelerate's config offloads weights: set fsdp_offload_params: false")
    if cuda:
        if not dist.is_initialized():  # one GPU is a group of one: the same FSDP2 as on many
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        cards = gather([str(torch.cuda.get_device_properties(accelerator.device).uuid)])
        shown = ", ".join(cards)
        if len(set(cards)) < len(cards):
            raise UserError(f"several processes share a GPU: {shown}; launch one process per GPU")
        say(f"{world()} processes; {torch.cuda.device_count()} GPUs here; by rank: {shown}")
    return accelerator


def to_device(tensors: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
    """Copy tensors; to a GPU from pinned memory, so that the copy does not wait for its work."""
    if torch.device(device).type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Use all cores while the other ranks wait: launchers start each process with one thread."""
    before = torch.get_num_threads()
    if world() > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before
        torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


RESERVE = 1.5e9  # bytes of a GPU: CUDA context, NCCL, fragmentation


def largest_share(free: float, total: float, resident: float) -> float:
    """Return the largest share of a GPU that vLLM can take beside `resident` bytes; 0 if none.

    `free` and `total`: bytes of the GPU.
    """
    share = math.floor(100 * (free - RESERVE - resident) / total) / 100
    return max(0.0, min(0.9, share))


def vllm_share(device: torch.device, model: nn.Module) -> float:
    """Compute `vllm_memory = "auto"`: the largest share that fits on every rank's GPU.

    Beside vLLM stay this rank's shard of the weights and two float32 moments of those trained.
    Raises: UserError if no share fits.
    """
    sizes = [p.numel() * (p.element_size() + 8 * p.requires_grad) for p in model.parameters()]
    resident = sum(sizes) / world()
    share = min(gather([largest_share(*torch.cuda.mem_get_info(device), resident)]))
    if not share:
        raise UserError("weights and optimizer leave vLLM nothing: use more GPUs or lora_rank")
    say(f"vllm_memory = {share}: the largest share beside {resident / 1e9:.1f} GB of weights")
    return share


def peak_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on its GPU since `reset_peak`, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would start at the size of the parent process
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def reset_peak(device: torch.device) -> None:
    """Start `peak_bytes` of a GPU again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_bytes(device: torch.device) -> int:
    """Return the memory in use on the GPU, by every process and library; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def memory_metrics(device: torch.device, ghost_bytes: int) -> dict[str, float]:
    """Measure the peak of any rank, without the sampler's `ghost_bytes`, and the fullest GPU."""
    peak = peak_bytes(device) - ghost_bytes
    return {
        "peak_memory_gib": max(gather([peak])) / 2**30,
        "device_memory_gib": max(gather([device_bytes(device)])) / 2**30,
    }


# ---- Signals and exit --------------------------------------------------------------------------


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. A BaseException, so that no library's `except Exception` swallows it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Handle Ctrl-C and SIGTERM: the handler sets a flag, and all ranks look at it together.

    `check` is called after the rollouts and after each step, where the weights are those of a
    complete step and can be saved. A second signal quits at once, except within the first second:
    a launcher forwards Ctrl-C to processes that already got it from the terminal.
    """

    number = 0
    since = 0.0

    def __enter__(self) -> Signals:
        handled = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.number:
            if time.monotonic() > self.since + 1:
                os._exit(128 + number)
            return
        self.number = number
        self.since = time.monotonic()
        text = f"\n{signal.Signals(number).name}: will save and stop; again: quit without saving\n"
        os.write(2, text.encode())

    def check(self) -> None:
        """Raise Interrupted on all ranks if any of them has received a signal."""
        number = max(gather([self.number]))  # not stored: a signal may arrive while ranks gather
        if number:
            raise Interrupted(number)


def program(main: Callable[[], int]) -> None:
    """Run `main` and exit with its status. One of several ranks skips interpreter shutdown.

    After an error, shutdown would wait for the other ranks, and they for this one. Exiting at once
    lets the launcher end them. Also, gloo's threads can abort during shutdown on a loaded machine.
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
