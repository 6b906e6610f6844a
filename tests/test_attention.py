"""PyTorch's FlashAttention with a stand-in for the kernel, and how micro-batches are filled."""

import itertools

import oisd
import pytest
import torch
import torch.nn.functional as F
from support import packed_attention, processes
from test_oisd import CONFIG, random_model, random_rollouts


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Stand in for PyTorch's kernel, which needs CUDA, as its documentation says."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    outputs = []
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        rows = (x[start:end].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        output = F.scaled_dot_product_attention(*rows, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("family,shape", [("qwen3", {}), ("mistral", {"sliding_window": 7})])
def test_varlen_gets_the_borders_heads_and_window(monkeypatch, family, shape):
    """Hidden states and gradients with the stand-in, against each rollout alone by sdpa."""
    monkeypatch.setattr(packed_attention.varlen, "varlen_attn", varlen_attn)
    rollouts = random_rollouts(5)
    packed, plain = (random_model(family, attention=name, **shape) for name in ("varlen", "sdpa"))
    rows = [torch.tensor([rollout.prompt_ids + rollout.response_ids]) for rollout in rollouts]
    expected = torch.cat([plain.get_decoder()(input_ids=row).last_hidden_state[0] for row in rows])
    tapped = oisd.TappedModel(packed, CONFIG)
    seen = tapped.hidden_states(oisd.pack(rollouts, CONFIG))
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(seen)
    theirs = torch.autograd.grad((expected * weight).sum(), [*plain.get_decoder().parameters()])
    ours = torch.autograd.grad((seen * weight).sum(), [*packed.get_decoder().parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if not shape:
        oisd.check(tapped)  # rows that are not packed, as in generation, take another path


def test_varlen_gets_one_dtype_and_only_what_it_knows(monkeypatch):
    """Outside FSDP a float32 norm leaves query and key float32; torch 2.11 has no `enable_gqa`."""

    def older(*rows_and_borders, scale, window_size):
        assert {rows.dtype for rows in rows_and_borders[:3]} == {torch.bfloat16}
        return rows_and_borders[2]

    monkeypatch.setattr(packed_attention.varlen, "varlen_attn", older)
    query, key, value = torch.randn(3, 1, 4, 9, 8)
    output = packed_attention.flash(query, key, value.bfloat16(), None, 9)
    assert torch.equal(output[0].transpose(0, 1), value[0].bfloat16())


def test_batches_are_few_full_and_equally_many_for_each_rank():
    for seed, limit, ranks in itertools.product(range(20), (38, 60, 200), (1, 2, 3, 8)):
        sizes = [rollout.length for rollout in random_rollouts(1 + seed, seed)]
        parts = processes.split_by_size(sizes, limit, ranks)
        assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
        assert len(parts) % ranks == 0 and max(sum(sizes[index] for index in part) for part in parts) <= limit
        assert len(parts) - ranks < 2 * sum(sizes) / limit + 1  # as few as half-full ones
