"""Attention over a packed row: several sequences end to end, none of which sees another."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen


def sequence_by_sequence(
    kernel: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    **settings,
) -> Tensor:
    """Attend with a kernel that is not told the borders: (1, heads, T, d) each -> (1, T, H, d).

    Neighbors of equal length form one call. Batches are sorted by length, so short sequences need
    few calls. The cost follows the real tokens.
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del settings[name]
    outputs = []
    start = 0
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        rows = slice(start, start + count * length)
        start = rows.stop
        parts = [
            x[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)
        ]
        output = kernel(module, *parts, None, **settings)[0]  # causal: (count, length, H, d)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None]


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_,
) -> Tensor:
    """Attend in one call of PyTorch's own FlashAttention: (1, heads, T, d) each -> (1, T, H, d)."""
    # Outside FSDP the float32 weight of a norm leaves query and key in float32 under autocast.
    rows = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    keys_before = -1 if sliding_window is None else sliding_window - 1
    settings = {"scale": scaling, "window_size": (keys_before, 0)}
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:  # not in torch 2.11
        settings["enable_gqa"] = query.shape[1] != key.shape[1]
    borders = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    return varlen.varlen_attn(*rows, *borders, **settings)[None]
