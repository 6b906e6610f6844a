"""PyTorch's FlashAttention with a stand-in for the kernel, and how micro-batches are filled."""

import itertools

import oisd
import pytest
import torch
from support import packed_attention, processes
from test_oisd import CONFIG, random_model, random_rollouts, with_config


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **gqa):
    """Stand in for PyTorch's kernel, which needs CUDA, as its documentation says."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    assert gqa in ({}, {"enable_gqa": query.shape[1] != key.shape[1]})
    outputs = []
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        rows = (x[start:end] for x in (query, key, value))
        q, k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in rows)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        unseen = (distance < 0) | ((distance > window_size[0]) & (window_size[0] >= 0))
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(unseen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("family,window", [("qwen3", None), ("mistral", None), ("mistral", 7)])
def test_varlen_gets_the_borders_heads_and_window(monkeypatch, family, window):
    """Hidden states and gradients with the stand-in, against each rollout alone by sdpa."""
    monkeypatch.setattr(packed_attention.varlen, "varlen_attn", varlen_attn)
    rollouts = random_rollouts(5)
    shape = {"sliding_window": window} if family == "mistral" else {}
    packed, plain = (random_model(family, attention=name, **shape) for name in ("varlen", "sdpa"))
    alone = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        hidden = plain.get_decoder()(input_ids=ids).last_hidden_state[0]
        alone.append(hidden[len(rollout.prompt_ids) - 1 : -1])
    expected = torch.cat(alone)
    tapped = oisd.TappedModel(packed, CONFIG)
    batch = oisd.pack(rollouts, CONFIG)
    seen = tapped.hidden_states(batch)[batch.predicted - 1]
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(seen)
    theirs = torch.autograd.grad((expected * weight).sum(), [*plain.get_decoder().parameters()])
    ours = torch.autograd.grad((seen * weight).sum(), [*packed.get_decoder().parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if not window:
        oisd.check(tapped)  # rows that are not packed, as in generation, take another path


def test_varlen_gets_one_dtype_and_only_what_it_knows(monkeypatch):
    """Outside FSDP a float32 norm leaves query and key float32; torch 2.11 has no `enable_gqa`."""
    seen = []

    def older(*rows_and_borders, scale, window_size):
        seen.append({rows.dtype for rows in rows_and_borders[:3]})
        return varlen_attn(*rows_and_borders, scale=scale, window_size=window_size)

    monkeypatch.setattr(packed_attention.varlen, "varlen_attn", older)
    config, scores = with_config(dtype="bfloat16"), []
    for kernel in ("varlen", "sdpa"):
        tapped = oisd.TappedModel(random_model(attention=kernel, dtype=torch.float32), config)
        scores.append(tapped(tapped.response_logprobs, oisd.pack(random_rollouts(3), config)))
    assert seen == [{torch.bfloat16}] * 4
    assert (scores[0] - scores[1]).abs().mean() < 0.1  # the error of bfloat16 itself


def test_batches_are_few_full_and_equally_many_for_each_rank():
    for seed, limit, ranks in itertools.product(range(20), (38, 60, 200), (1, 2, 3, 8)):
        sizes = [rollout.length for rollout in random_rollouts(1 + seed, seed)]
        parts = processes.split_by_size(sizes, limit, ranks)
        assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
        assert len(parts) % ranks == 0 and max(sum(sizes[index] for index in part) for part in parts) <= limit
        assert len(parts) - ranks < 2 * sum(sizes) / limit + 1  # as few as half-full ones
