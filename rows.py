"""Softmax and Jensen-Shannon divergence of rows of logits, one kernel per function on a GPU.

Logits are read as bits, z / (T log 2): processors are quicker at 2^x than at e^x. `scale` is 1 / (T log 2), a tensor
because torch.compile would compile again for every number. The compiled kernels are loops over a row that keep nothing
of size (n, V) but what they write in place of the logits. A value that both a sum and a write need would have to go
through memory, so it is computed twice instead. `tests/test_compiled.py` reads the generated code to make sure. A CPU,
with a few rows in its cache, keeps such values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LN2 = math.log(2)
Stats = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]


def on_gpu(logits: Tensor) -> bool:
    return logits.is_cuda and len(logits) > 1  # a size of 1 would be compiled separately


def kernel(function: Callable, logits: Tensor, *rest: Any) -> Any:
    """Call a function of rows, on a GPU compiled: once, for any number of rows of this vocabulary."""
    if not on_gpu(logits):
        return function(logits, *rest)
    for tensor in tree_leaves((logits, rest)):
        if tensor.ndim:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(function)(logits, *rest)


compiled = functools.cache(functools.partial(torch.compile, fullgraph=True))


def row_stats(logits: Tensor, scale: Tensor) -> Stats:
    """Largest of a row's bits, log2 of the sum of 2^(bits - largest), and entropy in nats. (n, V) -> (n, 1) each.

    Uncompiled, what `softmax_rows` would compute again is kept with them.
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
    """p and log2 p, (n, V) each. To be read only."""
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
    student: Tensor, teacher: Tensor, student_stats: Stats, teacher_stats: Stats, scale: Tensor, learns: bool
) -> Tensor:
    """JS of Eq. 7 from two layers' logits, (n, V) each -> (n, 1). If the student learns, its derivative is written."""
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
    """p, log(p/m), q, log(q/m), (n, V) each."""
    p, student_bits = softmax_rows(student, student_stats, scale)
    q, teacher_bits = softmax_rows(teacher, teacher_stats, scale)
    ratio, teacher_ratio = log_ratios(student_bits, teacher_bits, LN2)
    return p, ratio, q, teacher_ratio


def js_sums(*pair: Any) -> tuple[Tensor, Tensor]:
    """KL(p||m) and JS, (n, 1) each."""
    p, ratio, q, teacher_ratio = js_parts(*pair)
    kl = (p * ratio).sum(-1, keepdim=True)
    return kl, (kl + (q * teacher_ratio).sum(-1, keepdim=True)) / 2


def write_js_derivative(student: Tensor, *rest: Any) -> None:
    *pair, kl = rest
    p, ratio, _, _ = js_parts(student, *pair)
    student.copy_(p * (ratio - kl))


def log_ratios(student_logprobs: Tensor, teacher_logprobs: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m) for m = (p + q)/2, in nats, from log p and log q in any unit.

    log(p/m) = log 2 - log(1 + q/p): exactly 0 where p = q, and never above log 2.
    """
    difference = teacher_logprobs - student_logprobs
    common = LN2 - torch.log1p(torch.exp2(difference.abs() * (-unit / LN2)))
    return common.sub(difference.clamp(min=0), alpha=unit), common.add(difference.clamp(max=0), alpha=unit)
