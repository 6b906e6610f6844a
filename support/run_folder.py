"""The folder of a run: its lock, checkpoints, export, log and curves.

Files and folders that must be complete are written under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded_state
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from support.processes import TrainingError, from_rank_0, gather, rank, say, wait_for_all, world
from support.settings import ROOT, UserError, one_line, toml_table, type_and_message

# torch warns when a single process saves and loads without a process group
warnings.filterwarnings("ignore", "torch.distributed is disabled")


# ---- The folder --------------------------------------------------------------------------------


def open_folder(name: str, output_dir: str, resuming: bool) -> tuple[Path, IO]:
    """Create and lock the run's folder: -> folder, lock. The lock is held until the process ends.

    Without `output_dir`, take the first of runs/<name>, runs/<name>-2, ... that is neither locked
    nor used by another run. Raises: UserError.
    """
    numbered = (f"runs/{name}-{i}" if i > 1 else f"runs/{name}" for i in itertools.count(1))
    for folder in map(Path, [output_dir] if output_dir else numbered):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another process is working in {folder}; name another output_dir"
        except OSError as error:
            raise UserError(f"output_dir = {output_dir!r}: {one_line(error)}") from None
        else:
            if resuming or not (folder / "config.toml").exists():
                return folder, lock
            lock.close()
            problem = f"output_dir = {output_dir!r} holds a run; continue it by --resume {folder}"
        if output_dir:
            raise UserError(problem)
    raise AssertionError("numbers do not end")


def forget_folder(folder: Path) -> None:
    """Remove the folder of a run that never started."""
    if not (folder / "config.toml").exists():
        (folder / "lock").unlink()
        with contextlib.suppress(OSError):  # it holds files of somebody else
            folder.rmdir()


def write_atomically(path: Path, text: str) -> None:
    """Write all of a file or nothing, whenever the program dies."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def finish_folder(temporary: Path, final: Path) -> None:
    """Sync a finished folder to disk, then rename it to its final name."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    remove_folder(final)
    temporary.rename(final)


def remove_folder(folder: Path) -> None:
    """Rename, then delete, so that a half-deleted folder is never mistaken for a complete one."""
    old = folder.with_name(f"{folder.name}.old.part")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        shutil.rmtree(folder.rename(old))


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Hash the content of files: -> start of SHA-256, by name."""
    hashes = {}
    for path in paths:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return hashes


def commit() -> str:
    """Return the checkout's commit, with + if its code has local changes; `unknown` elsewhere."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.toml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def write_config(folder: Path, name: str, config: Any, version: str) -> None:
    """Write the resolved settings, from which the run can be resumed or repeated."""
    header = f"# version {version}, commit {commit()}\n"
    write_atomically(folder / "config.toml", header + toml_table(name, config))


# ---- Checkpoints -------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step_" + "[0-9]" * 6))


def resume_hint(folder: Path, program: str, resumable: bool) -> str:
    """Name the newest checkpoint and the command that continues the run."""
    newest = checkpoints(folder)[-1:]
    kept = f"{newest[0].name} is complete" if newest else "no checkpoint yet"
    if not resumable:
        return f"{kept}; it cannot be resumed"
    return f"{kept}; continue with: {resume_command(folder, program)}"


def resume_command(folder: Path, program: str) -> str:
    """Write the command that continues a run."""
    launcher = "python" if world() == 1 else "accelerate launch"
    return f"{launcher} {program} --resume {shlex.quote(str(folder))}"


def check_disk(
    folder: Path, model: nn.Module, export_dtype: torch.dtype, steps: int, every: int, kept: int
) -> None:
    """Check that the disk can hold the run's checkpoints and its export. Raises: UserError.

    `steps`: of the run; `every`: steps between checkpoints, 0 for one at the end; `kept`: how many.
    """
    trained = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    size = 3 * sum(trained)  # weights and two moments
    written = math.ceil(steps / (every or steps or 1))
    count = min(kept + 1, written)  # the oldest is deleted once the newest is complete
    held = sum(file.stat().st_size for file in folder.glob("checkpoints/**/*") if file.is_file())
    exported = sum(p.numel() for p in model.parameters()) * export_dtype.itemsize
    needed = count * size + exported - held
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, but {count} checkpoints and final/ need "
            f"{needed / 1e9:.1f}: name another output_dir, or lower checkpoints_kept"
        )


TRAINED = sharded_state.StateDictOptions(ignore_frozen_params=True)  # with adapters: those only


def trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return weights and optimizer state; a fresh optimizer gets a state for the loader to fill."""
    weights, moments = sharded_state.get_state_dict(model, optimizer, options=TRAINED)
    return {"model": weights, "optimizer": moments}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    kept: int,
) -> Path:
    """Write weights, optimizer and `state`, on all ranks; any number of ranks may load them.

    There is no other state: data order and random draws follow from the seed and `state["step"]`.
    If this step has a checkpoint, only its `state` is written again.
    Raises: TrainingError, for example if the disk is full. The half-written checkpoint is then
    removed; older ones are intact.
    """
    final = folder / "checkpoints" / f"step_{state['step']:06d}"
    temporary = final.with_name(final.name + ".part")
    if from_rank_0(final.exists):  # other machines may see an older state of the disk
        if rank() == 0:
            write_atomically(final / "state.json", json.dumps(state))
        return final
    if rank() == 0:
        for leftover in final.parent.glob("*.part"):
            shutil.rmtree(leftover)
    wait_for_all()
    try:
        tensors = trained_tensors(model, optimizer)
        dcp.save(tensors, checkpoint_id=temporary, no_dist=world() == 1)
        if rank() == 0:
            hashes = json.dumps(tensor_hashes(temporary))
            (temporary / "hashes.json").write_text(hashes, encoding="utf-8")
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            finish_folder(temporary, final)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as problem:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = checkpoint_failure(problem)
        text = f"the checkpoint of step {state['step']} was not written: {reason}"
        raise TrainingError(text) from problem
    if rank() == 0:
        for old in checkpoints(folder)[:-kept]:
            remove_folder(old)
    wait_for_all()
    return final


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """Hash the files of a checkpoint that hold tensors."""
    return hash_files([checkpoint / ".metadata", *sorted(checkpoint.glob("*.distcp"))])


def checkpoint_failure(problem: BaseException) -> str:
    """Describe an error of torch's checkpoints in one line."""
    failures = getattr(problem, "failures", {})  # by rank, with their tracebacks
    return type_and_message(next(iter(failures.values()))[0] if failures else problem)


def differences(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Describe the entries of two dicts that differ; "" if none do."""
    names = [name for name in here | there if here.get(name) != there.get(name)]
    values = [(name, here.get(name, "absent"), there.get(name, "absent")) for name in names]
    return "; ".join(f"{name} is {mine}, was {theirs}" for name, mine, theirs in values)


@contextlib.contextmanager
def reading(found: Sequence[Path], resume: str) -> Iterator[None]:
    """Turn an error into a UserError that says how to continue from the checkpoint before.

    `found`: all checkpoints, oldest first, of which the last is read. `resume`: see
    `resume_command`.
    """
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as problem:  # the latter is a BaseException
        newest = found[-1]
        text = f"{newest} cannot be read: {checkpoint_failure(problem)}; if it is damaged, "
        if len(found) == 1:
            raise UserError(f"{text}start a new run: there is no older one") from problem
        move = f"mv {shlex.quote(str(newest))} {shlex.quote(f'{newest}.damaged')}"
        text += f"continue from {found[-2].name} with: {move} && {resume}"
        raise UserError(text) from problem


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    adapters: bool,
    program: str,
) -> dict[str, Any]:
    """Load the newest complete checkpoint into model and optimizer: -> its state.

    `state`: of the run as it would start, returned if there is no checkpoint yet. Output of later
    steps moves to `abandoned/`, since those steps are rerun. `adapters`: most weights are frozen
    and not in the checkpoint. `program`: launches the run, for the error.
    Raises: UserError if what the run reads has changed since its start, or for a damaged file.
    """
    found = gather(checkpoints(folder) if rank() == 0 else [])
    if found:
        newest = found[-1]
        tensors = trained_tensors(model, optimizer)
        resume = resume_command(folder, program)
        with reading(found, resume):
            saved = json.loads((newest / "state.json").read_text(encoding="utf-8"))
            hashes = json.loads((newest / "hashes.json").read_text(encoding="utf-8"))
            if rank() == 0 and (changed := differences(tensor_hashes(newest), hashes)):
                raise ValueError(changed)
        if changed := differences(state["inputs"], saved["inputs"]):
            raise UserError(f"--resume: what {folder} started with has changed: {changed}")
        with reading(found, resume):
            dcp.load(tensors, checkpoint_id=newest, no_dist=world() == 1)
        parts = {"model_state_dict": tensors["model"], "optim_state_dict": tensors["optimizer"]}
        options = dataclasses.replace(TRAINED, strict=not adapters)
        sharded_state.set_state_dict(model, optimizer, **parts, options=options)
        state = saved
        say(f"continuing after step {state['step']}")
    else:
        say(f"{folder} has no checkpoint yet: starting with step 1")
    if rank() == 0:
        abandon(folder, state["step"])
    return state


def abandon(folder: Path, step: int) -> None:
    """Move output of steps after `step`, and lines cut short by a crash, to `abandoned/`."""
    metrics, attic = folder / "metrics.jsonl", folder / "abandoned"
    lines = metrics.read_text("utf-8").splitlines(keepends=True) if metrics.exists() else []
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


# ---- Weights -----------------------------------------------------------------------------------


def export(folder: Path, weights: Iterable[tuple[str, Tensor]], *parts: Any) -> Path:
    """Write `final/`, an ordinary Hugging Face folder: -> its path.

    `weights`: names and full tensors; all ranks iterate, rank 0 keeps a copy in host memory.
    `parts`: see `write_model`. Raises: TrainingError, for example if the disk is full.
    """
    temporary, final = folder / "final.part", folder / "final"
    state = {}
    for name, tensor in weights:
        if rank() == 0:
            state[name] = tensor.to("cpu", copy=True).contiguous()
    if rank() == 0:
        try:
            write_model(temporary, state, *parts)
            finish_folder(temporary, final)
        except Exception as problem:  # third-party code; the last checkpoint has everything
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"{final} was not written: {type_and_message(problem)}"
            ) from problem
    wait_for_all()
    return final


def rehearse_export(folder: Path, weights: Iterable[tuple[str, Tensor]], *parts: Any) -> None:
    """Write the untrained `final/` and delete it, so that it does not fail after the training.

    On rank 0. Raises: UserError.
    """
    temporary = folder / "final.part"
    try:
        state = {name: tensor.contiguous() for name, tensor in weights}
        write_model(temporary, state, *parts)
    except Exception as problem:  # third-party code
        reason = type_and_message(problem)
        raise UserError(f"final/ could not be written after the training: {reason}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(
    folder: Path,
    state: dict[str, Tensor],
    model: PreTrainedModel,
    dtype: torch.dtype,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the weights, `state`, with the configs and the tokenizer. `dtype`: of the weights."""
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = generation_config  # a sampler may have set another one
    model.save_pretrained(folder, state_dict=state, max_shard_size="4GB")
    model_config = copy(model.config)
    model_config.dtype = dtype  # the model's own says float32, which it was trained in
    model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Log and curves ----------------------------------------------------------------------------


def rollout_metrics(rollouts: Sequence[Any], group_size: int) -> dict[str, float]:
    """Average rewards and lengths; `zero_std_fraction`: groups whose rewards are all equal."""
    rewards = [rollout.reward for rollout in rollouts]
    groups = [rewards[start : start + group_size] for start in range(0, len(rewards), group_size)]
    mean = statistics.fmean
    return {
        "reward": mean(rewards),
        "response_length": mean(len(rollout.response_ids) for rollout in rollouts),
        "truncated_fraction": mean(rollout.finish_reason == "length" for rollout in rollouts),
        "zero_std_fraction": mean(len(set(group)) == 1 for group in groups),
    }


def accuracy(rewards: Sequence[float], copies: int) -> dict[str, float]:
    """Average rewards, `copies` per problem, with the standard error over problems."""
    shares = torch.tensor(rewards, dtype=torch.float64).view(-1, copies).mean(dim=1)
    # of a single problem it is unknown
    error = float(shares.std()) / math.sqrt(len(shares)) if len(shares) > 1 else None
    found = {"accuracy": float(shares.mean()), "standard_error": error}
    return found | {"problems": len(shares), "samples": copies}


def percent(score: dict[str, float]) -> str:
    """Write what `accuracy` returned: 88.1 ± 1.4 %, where ± is the standard error."""
    error = score["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * score['accuracy']:.1f}{spread} %"


def closing(folder: Path, held_out: dict[str, dict], config: Any) -> str:
    """Sum up a finished run: what it reached, where its files are and what to try next.

    `held_out`: what `accuracy` returned, by step. `config`: the run's settings.
    """
    steps = config.num_steps
    scores = [percent(score) for score in held_out.values()]
    lines = []
    if len(scores) > 1:
        lines.append(f"held-out accuracy: {scores[0]} before, {scores[-1]} after {steps} steps")
    if steps:
        lines.append(f"curves: {folder / 'curves.png'}")
    lines.append(f"trained model: {folder / 'final'}")
    lines.append("What to try next:")
    lines.append(f"  python evaluate.py --run {shlex.quote(str(folder))}  # Avg@K, Pass@K")
    lines.append(f"  python tools/lens.py table {shlex.quote(str(folder))}  # what each layer says")
    if config.resumable and steps:
        lines.append(f"  {resume_command(folder, config.program)} --num_steps {2 * steps}")
    return "\n".join(lines)


def every(n: int, step: int) -> bool:
    """Return whether something that happens every `n` steps happens at this one; 0 disables it."""
    return n > 0 and step % n == 0


def duration(seconds: float) -> str:
    """Write a duration in about two digits: 1.2 s, 43 s, 12 min, 5.2 h."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def step_line(metrics: dict[str, Any], total: int, left: float) -> str:
    """Summarize a step in a line of at most 80 columns. `left`: seconds until the last step."""
    step = f"step {metrics['step']:{len(str(total))}}/{total}"
    bar = "#" * round(10 * metrics["reward"])
    parts = [f"{step}  reward {metrics['reward']:.3f} |{bar:10}|"]
    if metrics.get("think_js") is not None:
        parts.append(f"think JS {metrics['think_js']:.3f}")
    parts.append(duration(metrics["seconds"]))
    if left:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


class Log:
    """The log of a run: metrics.jsonl, Accelerate's tracker, a line per step and curves."""

    def __init__(self, folder: Path, accelerator: Accelerator, step: int, settings: dict[str, Any]):
        accelerator.init_trackers(folder.resolve().parent.name, config=settings)
        self.folder = folder
        self.accelerator = accelerator
        self.first = step
        self.total = settings["num_steps"]
        self.seconds = 0.0  # of all steps since `first`
        self.drawn = time.monotonic()

    def write(self, metrics: dict[str, Any]) -> None:
        """Log a step."""
        if rank() == 0:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        numbers = {name: value for name, value in metrics.items() if value is not None}
        self.accelerator.log(numbers, step=metrics["step"])
        self.seconds += metrics["seconds"]
        per_step = self.seconds / (metrics["step"] - self.first)
        left = per_step * (self.total - metrics["step"])
        say(step_line(metrics, self.total, left))

    def draw(self, step: int, last: bool) -> None:
        """Draw the curves, at most every 30 s and after the last step. Failures are reported."""
        if rank() == 0 and step > 0 and (last or time.monotonic() - self.drawn > 30):
            self.drawn = time.monotonic()
            try:
                draw_curves(read_metrics(self.folder), self.folder / "curves.png")
            except Exception as problem:
                say(f"curves.png was not drawn: {type_and_message(problem)}")


def write_rollouts(folder: Path, step: int, rollouts: Sequence[Any], tokenizer: Any) -> None:
    """Write a step's rollouts, one JSON object per line, with special tokens shown."""
    lines = []
    for rollout in rollouts:
        entry = {
            "row": rollout.row,
            "prompt": tokenizer.decode(rollout.prompt_ids),
            "response": tokenizer.decode(rollout.response_ids),
            "reward": rollout.reward,
            "advantage": torch.as_tensor(rollout.advantage).tolist(),
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.response_ids),
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / "rollouts").mkdir(exist_ok=True)
    write_atomically(folder / "rollouts" / f"step_{step:06d}.jsonl", "".join(lines))


def read_line(line: str) -> dict:
    """Parse a line of metrics.jsonl; empty if a crash has cut it short."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def read_metrics(folder: Path) -> list[dict]:
    """Read the complete lines of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(read_line, lines) if row]


CURVES = {
    "reward": "reward",
    "student_entropy": "entropy of the student layer (nats)",
    "response_length": "response length (tokens)",
    "entropy": "entropy of the policy (nats)",
    "think_js": "think JS to the final layer (nats)",
    "attention_js": "attention JS to the final layer (nats)",
}


def draw_curves(rows: Sequence[dict], path: Path) -> None:
    """Draw every panel of CURVES over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (metric, title) in zip(axes.flat, CURVES.items()):
        for name in (metric, f"{metric}_positive", f"{metric}_negative"):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set(title=title, xlabel="training step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(linestyle="--", alpha=0.5)
        if len(axis.lines) > 1:
            axis.legend()
    axes[0, 0].set_ylim(0, 1.02)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(path)
