"""Statistics, Jensen-Shannon divergence and derivatives of rows of logits: the lens pass's kernels.

On a GPU every function is one compiled kernel, a loop over a row that keeps nothing of size (n, V)
except what it writes in place of the logits. A value that both a sum and a write need would have to
go through memory, so it is computed twice instead; `tests/test_compiled.py` checks this in the
generated code. A CPU works on a few rows at a time and keeps such values in its cache.

Inside, logits are in bits, z / (T log 2), because 2^x is faster than e^x. `scale` is 1 / (T log 2),
a tensor, because torch.compile would compile again for every Python number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LN2 = math.log(2)
CACHED_NUMBERS = 2**19  # of a tensor that a CPU's cache can hold together with a few others
Stats = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]


def lens_rows(
    logits: Tensor, targets: Tensor, temperature: float, tau: float, learning: int = 0
) -> Tensor:
    """Read what the losses need from logits (1 or 2, n, V): the final layer's, then the student's.

    `targets` (n,) -> (2, n) log-probs and entropy at `temperature`; with a student (4, n), also JS
    and the student's entropy at `tau`. All in nats.

    `learning` 1 overwrites the final layer's logits with -T d logprob / dz; 2 also overwrites the
    student's with 2 tau d JS / dz. JS leaves nothing in the final layer's: that is the
    stop-gradient of Eq. 7.
    """
    n, V = logits.shape[1:]
    size = n if on_gpu(logits[0]) else CACHED_NUMBERS // (2 * V)  # the same with or without student
    blocks = zip(logits.split(max(size, 1), dim=1), targets.split(max(size, 1)))
    return torch.cat([block_rows(*block, temperature, tau, learning) for block in blocks], dim=1)


def block_rows(
    logits: Tensor, targets: Tensor, temperature: float, tau: float, learning: int
) -> Tensor:
    """Do the work of `lens_rows` for rows that fit into the cache."""
    final = logits[0]
    exact = torch.promote_types(logits.dtype, torch.float32)
    scale = logits.new_full((), 1 / (LN2 * temperature), dtype=exact)
    final_stats = kernel(row_stats, final, scale)
    top, log_total, entropy, _ = final_stats
    target_bits = final.gather(1, targets[:, None]).to(exact) * scale
    logprobs = (target_bits - top - log_total) * LN2
    columns = [logprobs, entropy]  # (n, 1) each
    if len(logits) == 2:
        student = logits[1]
        lens_scale = logits.new_full((), 1 / (LN2 * tau), dtype=exact)
        teacher_stats = final_stats
        if tau != temperature:
            teacher_stats = kernel(row_stats, final, lens_scale)
        student_stats = kernel(row_stats, student, lens_scale)
        js = js_rows(student, final, student_stats, teacher_stats, lens_scale, learning == 2)
        columns += [js, student_stats[2]]
    if learning:
        kernel(write_softmax, final, final_stats, scale)
        # p - 1 at the target, without cancellation
        final.scatter_(1, targets[:, None], torch.expm1(logprobs).to(final.dtype))
    return torch.cat(columns, dim=1).T


def on_gpu(logits: Tensor) -> bool:
    return logits.is_cuda and len(logits) > 1  # torch.compile specializes on size 1


def kernel(function: Callable, logits: Tensor, *rest: Any) -> Any:
    """Call a function of rows; on a GPU compiled, once for any number of rows."""
    if not on_gpu(logits):
        return function(logits, *rest)
    for tensor in tree_leaves((logits, rest)):
        if tensor.ndim:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(function)(logits, *rest)


compiled = functools.cache(functools.partial(torch.compile, fullgraph=True))


def row_stats(logits: Tensor, scale: Tensor) -> Stats:
    """Compute a row's largest bits, log2 of the sum of 2^(bits - largest), and entropy in nats.

    (n, V) -> (n, 1) each. Uncompiled, it also returns what `softmax_rows` would compute again.
    """
    bits = logits.to(scale.dtype) * scale
    top = bits.amax(-1, keepdim=True)
    bits -= top
    powers = bits.exp2()
    total = powers.sum(-1, keepdim=True)
    log_total = total.log2()
    entropy = LN2 * (log_total - (powers * bits).sum(-1, keepdim=True) / total)
    kept = () if torch.compiler.is_compiling() else (powers.div_(total), bits.sub_(log_total))
    return top, log_total, entropy, kept


def softmax_rows(logits: Tensor, stats: Stats, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and log2 p, (n, V) each. Read-only: they may be shared."""
    top, log_total, _, kept = stats
    if kept:
        return kept
    bits = logits.to(scale.dtype) * scale
    bits -= top
    bits -= log_total
    return bits.exp2(), bits


def write_softmax(logits: Tensor, stats: Stats, scale: Tensor) -> None:
    logits.copy_(softmax_rows(logits, stats, scale)[0])


def js_rows(
    student: Tensor,
    teacher: Tensor,
    student_stats: Stats,
    teacher_stats: Stats,
    scale: Tensor,
    learns: bool,
) -> Tensor:
    """Compute JS of Eq. 7 from logits (n, V): -> (n, 1).

    With `learns`, the student's logits are overwritten by p (log(p/m) - KL(p||m)), Appendix A.3.1.
    """
    pair = student, teacher, student_stats, teacher_stats, scale
    if on_gpu(student):
        kl, js = kernel(js_sums, *pair)
        if learns:
            kernel(write_js_derivative, *pair, kl)
        return js
    p, ratio, q, teacher_ratio = js_parts(*pair)
    kl = (p * ratio).sum(-1, keepdim=True)
    if learns:
        student.copy_(ratio.sub_(kl).mul_(p))
    return (kl + teacher_ratio.mul_(q).sum(-1, keepdim=True)) / 2


def js_parts(
    student: Tensor, teacher: Tensor, student_stats: Stats, teacher_stats: Stats, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute p, log(p/m), q and log(q/m), (n, V) each."""
    p, student_bits = softmax_rows(student, student_stats, scale)
    q, teacher_bits = softmax_rows(teacher, teacher_stats, scale)
    ratio, teacher_ratio = log_ratios(student_bits, teacher_bits, LN2)
    return p, ratio, q, teacher_ratio


def js_sums(*pair: Any) -> tuple[Tensor, Tensor]:
    """Compute KL(p||m) and JS, (n, 1) each."""
    p, ratio, q, teacher_ratio = js_parts(*pair)
    kl = (p * ratio).sum(-1, keepdim=True)
    return kl, (kl + (q * teacher_ratio).sum(-1, keepdim=True)) / 2


def write_js_derivative(student: Tensor, *rest: Any) -> None:
    *pair, kl = rest
    p, ratio, _, _ = js_parts(student, *pair)
    student.copy_(p * (ratio - kl))


def log_ratios(student: Tensor, teacher: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute log(p/m) and log(q/m), m = (p + q)/2, in nats from log p and log q in any `unit`.

    log(p/m) = log 2 - log(1 + q/p): exactly 0 where p = q, and never above log 2.
    """
    difference = teacher - student
    common = LN2 - torch.log1p(torch.exp2(difference.abs() * (-unit / LN2)))
    student_ratio = common.sub(difference.clamp(min=0), alpha=unit)
    teacher_ratio = common.add(difference.clamp(max=0), alpha=unit)
    return student_ratio, teacher_ratio


# ---- Products with the head ----------------------------------------------------------------------


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply these hidden states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def chunked_logits(hidden: Tensor, W: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of `size` tokens at a time, all in one buffer.

    (layers, N, D), (V, D) -> rows, (layers, n, V). Without tokens there is one empty chunk, so that
    a rank that has none takes the same steps.
    """
    layers, N, _ = hidden.shape
    V = len(W)
    buffer = hidden.new_empty(layers * min(size, N) * V)
    for start in range(0, max(N, 1), size):
        rows = slice(start, min(start + size, N))
        n = rows.stop - start
        logits = buffer[: layers * n * V].view(layers, n, V)  # contiguous in the last chunk, too
        for source, out in zip(hidden[:, rows], logits):  # one layer at a time, as in scoring
            torch.mm(source, W.T, out=out)
        yield rows, logits


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` in float32: (n, V), (n, D) -> (V, D)."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    elif total.is_cuda:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        for part, columns in zip(total.split(8192), left.split(8192, dim=1)):  # cache-sized
            part += columns.T @ right
