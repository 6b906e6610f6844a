"""Check a model against what the lens, the taps and packed rows assume.

Modeling code is free to scale its logits, to ignore arguments it does not know, or to carry a state
from one packed sequence to the next. None of this raises, and all of it gives wrong numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.settings import UserError, type_and_message


@torch.no_grad()
def check_model(
    tapped: Any,
    name: str,
    student_layer: int,
    longest_row: int,
    prompt_limit: str,
    windowed_kernel: bool,
) -> None:
    """Run two short rows of random tokens alone and packed. The model is left in evaluation mode.

    `tapped`: has model, head, a tap per layer, recording, clear_taps, lens and packed_logits.
    `longest_row`: tokens of the longest row of the run, `prompt_limit` + max_response_tokens.
    `windowed_kernel`: the attention kernel honors sliding windows in packed rows.
    Raises: UserError, one line that says what the model lacks.
    """
    model = tapped.model
    kind = type(model).__name__
    V = min(len(tapped.head), len(model.get_input_embeddings().weight))
    length = min(48, longest_row)
    ids = torch.randint(V, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    last = max(2, length // 3) - 1  # of the first row; up to here the second row is the same
    rows = [ids[: last + 1], [*ids[:last], (ids[last] + 1) % V, *ids[last + 1 :]]]
    attention = model.config._attn_implementation
    model.eval()
    try:
        model.set_attn_implementation("eager")  # the only kernel that returns its weights
        logits = check_alone(tapped, rows, student_layer)
        check_window(tapped, longest_row, prompt_limit, windowed_kernel)
        check_attention(tapped, rows[1], student_layer)
        model.set_attn_implementation(attention)
        check_packed(tapped, rows, logits, longest_row)
    except UserError as problem:
        raise UserError(f"model = {name!r} ({kind}) {problem}") from None
    except Exception as problem:  # third-party code, used in a way its authors may not expect
        reason = f"cannot be run packed and tapped: {type_and_message(problem)}"
        raise UserError(f"model = {name!r} ({kind}) {reason}") from problem
    finally:
        model.eval()
        tapped.clear_taps()


def deviation(mine: Tensor, theirs: Tensor) -> float:
    """Return the relative size of the difference, so that one tolerance fits logits of any scale.

    A norm, not a maximum: rounding that routes a token to another expert changes little, while a
    leak changes complete rollouts.
    """
    return ((mine - theirs).norm() / theirs.norm()).item()


def tolerance(tapped: Any) -> float:
    """Return how far two routes through one model may differ; with adapters it may be bfloat16.

    In float32, 36 random layers leave 2e-6; a state carried over a border gave 2e-4.
    """
    return 0.05 if tapped.head.dtype == torch.bfloat16 else 3e-5


def plain_logits(tapped: Any, row: list[int]) -> Tensor:
    """Run the model's own forward pass with all taps recording: -> (T, V)."""
    ids = torch.tensor([row], device=tapped.head.device)
    with tapped.recording(*tapped.taps, packed=False):
        return tapped.model(input_ids=ids, use_cache=False).logits[0]


def check_alone(tapped: Any, rows: list[list[int]], student_layer: int) -> list[Tensor]:
    """Check lens, causality and taps: -> the model's logits of each row, (T, V)."""
    logits = [plain_logits(tapped, row) for row in rows]
    gap = deviation(tapped.lens(tapped.taps[-1].hidden[0]), logits[1])
    if tapped.model.get_output_embeddings().bias is not None or not gap <= 1e-5:
        raise UserError(
            f"has a head that does more than unembed: its logits are off by {gap:.2g}, "
            "or it adds a bias"
        )
    common = len(rows[0]) - 1
    if not deviation(logits[0][:common], logits[1][:common]) <= tolerance(tapped):
        raise UserError("is not causal: a token changes the predictions before it")
    for layer in (student_layer, len(tapped.taps)):
        if tapped.taps[layer - 1].query is None:
            raise UserError(f"has no attention in layer {layer} that a tap sees")
    return logits


def smallest_window(tapped: Any) -> int | None:
    """Return the smallest sliding window that the taps have seen."""
    return min((tap.window for tap in tapped.taps if tap.window is not None), default=None)


def check_window(tapped: Any, longest_row: int, prompt_limit: str, windowed_kernel: bool) -> None:
    """Check that no row exceeds a sliding window that the kernel would ignore."""
    window = smallest_window(tapped)
    if window and longest_row > window and not windowed_kernel:
        raise UserError(
            f"has a sliding window of {window} tokens, but {prompt_limit} + max_response_tokens = "
            f"{longest_row}; set attention = 'varlen' (needs CUDA), or keep it within {window}"
        )


def attention_seen(tap: Any) -> Tensor:
    """Compute attention from what a tap has recorded of one sequence: -> (T, H, T)."""
    query, key = tap.query[0], tap.key[0]  # (H, T, d), (Q, T, d)
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    scores = query @ key.mT * tap.scaling  # (H, T, T)
    positions = torch.arange(query.shape[1], device=query.device)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (tap.window or len(positions)))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).transpose(0, 1)


def check_attention(tapped: Any, row: list[int], student_layer: int) -> None:
    """Check that the taps' queries and keys give the attention weights of eager attention."""
    window = smallest_window(tapped)
    if window and window <= 128:  # a row that reaches beyond it is affordable
        plain_logits(tapped, (row * window)[: window + 2])
    for layer in (student_layer, len(tapped.taps)):
        tap = tapped.taps[layer - 1]
        weights = tap.weights[0].transpose(0, 1)  # (T, H, T)
        weights = weights / weights.sum(-1, keepdim=True)
        gap = (attention_seen(tap) - weights).abs().max().item()
        if not gap <= max(tolerance(tapped), 1e-4):
            raise UserError(
                f"has more than a softmax of queries and keys in layer {layer} (off by {gap:.2g})"
            )


def check_packed(
    tapped: Any, rows: list[list[int]], logits: list[Tensor], longest_row: int
) -> None:
    """Check that packed rows give the logits that each row has alone."""
    window = smallest_window(tapped)
    rows = [row[:window] for row in rows]
    alone = torch.cat([one[:window] for one in logits])
    first, both = len(rows[0]), len(alone)
    shift = longest_row - len(rows[1])  # moves the second row to the end of the longest one
    for training, moved, count, lack in (
        (False, 0, both, "a rollout alone has other log-probs"),
        (True, 0, both, "training computes something else than evaluation"),
        (True, shift, first, f"positions up to {longest_row - 1} change short rollouts"),
    ):
        tapped.model.train(training)
        packed = tapped.packed_logits(rows, moved)
        gap = deviation(packed[:count], alone[:count])
        if not gap <= tolerance(tapped):
            raise UserError(f"mixes up packed rows: {lack} (logits are off by {gap:.2g})")
    for kind in getattr(tapped.model.config, "layer_types", None) or []:
        if kind not in ("full_attention", "sliding_attention"):  # short rows would not show it
            raise UserError(
                f"has layers of the kind {kind!r}; packed rows support full and sliding attention"
            )
