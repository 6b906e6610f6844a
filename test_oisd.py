"""`pytest test_oisd.py`: on a CPU, in a few minutes, why the losses can be believed.

In order: closed-form gradients in float64; exact identities; invariances; contracts; the whole program. Models are tiny
and random, except `toy`, which has learnt to answer with a random digit so that rewards differ.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import oisd
import tiny
from tools import grader as grading
from tools import plan

ROOT = Path(__file__).resolve().parent
PAPER_DATA = ROOT.parent / "shared" / "data"
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "head_dim": 8,
}
FAMILIES = {"qwen3": Qwen3Config, "llama": LlamaConfig, "qwen2": Qwen2Config}  # q/k-norm, none, biases
CONFIG = dataclasses.replace(
    oisd.Config(),
    student_layer=2,
    attention_steps=5,
    attention_window=4,
    attention_strided=3,
    lens_chunk_tokens=7,
    max_prompt_tokens=16,
    max_response_tokens=48,
    max_tokens_per_gpu=64,
    dtype="float32",
)


def with_config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def random_model(family="qwen3", tied=False, attention="sdpa", dtype=torch.float64, **shape):
    torch.manual_seed(0)
    config = FAMILIES[family](**SHAPE | shape, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for parameter in model.parameters():  # the usual initialisation is so small that all distributions are uniform
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.add_(0.1)
    return model


def random_rollouts(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    rollouts = []
    for _ in range(count):
        prompt, response = [[draw(0, 61) for _ in range(draw(low, high))] for low, high in ((2, 9), (1, 30))]
        advantage = float(torch.randn((), generator=generator, dtype=torch.float64)) * 1.5
        old = -4 + 0.3 * torch.randn(len(response), generator=generator, dtype=torch.float64)
        rollouts.append(oisd.Rollout(prompt, response, old.tolist(), "stop", advantage=advantage, old_logprobs=old))
    return rollouts


def run_of(model, config, **parts):
    """As much of a run as `backward`, `update` and `score` look at."""
    tapped = oisd.TappedModel(model, config).train()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(config=config, model=tapped, accelerator=accelerator, state={"step": 0}, **parts)


def gradients(model, config, rollouts, max_tokens=10**6):
    """One update's gradients by the program's own `backward`: -> (sums, gradient by parameter)."""
    model.zero_grad()
    sums = oisd.backward(run_of(model, config), rollouts, max_tokens)
    return sums, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Transformers computes norms, rotary angles and eager softmax in float32 whatever the model's dtype: two routes through
# a model agree to single precision, one route repeated to double.
SINGLE = {"rtol": 1e-4, "atol": 1e-6}
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


def assert_same_gradients(one, other, **tolerance):
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, **tolerance)  # names the first parameter that differs


# ---------------------------------------------------------------------------------------------------------------------
# Closed-form gradients, float64
# ---------------------------------------------------------------------------------------------------------------------


def js_by_hand(p, q):
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("advantage", [0.6, -0.6, 3.0, -3.0])
def test_think_gradient_is_the_closed_form(advantage, temperature):
    """Appendix A.3.1: dL/dz = clip(A) / (2 tau N) p (log(p/m) - KL(p||m)); |A| = 3 is clipped to 1."""
    torch.manual_seed(1)
    student = torch.randn(6, 17, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 17, dtype=torch.float64)
    js = oisd.js_divergence(student, teacher, temperature)
    (oisd.think_loss_sum(js, torch.full((6,), advantage, dtype=torch.float64), 1.0) / 6).backward()
    p, q = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    m = (p + q) / 2
    kl = (p * (p / m).log()).sum(-1, keepdim=True)
    expected = max(-1, min(1, advantage)) / (2 * temperature * 6) * p * ((p / m).log() - kl)
    torch.testing.assert_close(js.detach(), js_by_hand(p, q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("advantage", [0.6, -0.6, 3.0, -3.0])
def test_attention_gradient_is_the_closed_form(advantage):
    """Appendix A.3.2: d/d score = clip(A) / (2 H S) a (log(a/m) - KL(a||m)); dq and dk follow through q k / sqrt(d)."""
    torch.manual_seed(2)
    H, Q, T, d, S = 4, 2, 9, 8, 3

    def tap(requires_grad):
        result = oisd.Tap()
        result.query = torch.randn(1, H, T, d, dtype=torch.float64, requires_grad=requires_grad)
        result.key = torch.randn(1, Q, T, d, dtype=torch.float64, requires_grad=requires_grad)
        result.scaling = d**-0.5
        return result

    student, teacher = tap(True), tap(False)
    queries = torch.tensor([2, 5, 8])
    keys, valid = oisd.sample_attention_keys_batched(queries, window=3, strided=2)
    js = oisd.attention_js(student, teacher, queries, keys, valid, chunk=2)
    advantages = torch.full((S,), advantage, dtype=torch.float64)
    (oisd.attention_loss_sum(js, advantages, 1.0) / S).backward()
    query_grad, key_grad = torch.zeros(H, T, d, dtype=torch.float64), torch.zeros(Q, T, d, dtype=torch.float64)
    for step, t in enumerate(queries.tolist()):
        K = oisd.sample_attention_keys(t, 3, 2)
        by_hand = 0.0
        for h in range(H):
            g = h // (H // Q)  # the key head of this query head
            scores = [layer.query[0, h, t] @ layer.key[0, g, K].T * d**-0.5 for layer in (student, teacher)]
            a, b = (score.detach().softmax(-1) for score in scores)
            m = (a + b) / 2
            kl = (a * (a / m).log()).sum()
            by_score = max(-1, min(1, advantage)) / (2 * H * S) * a * ((a / m).log() - kl)
            query_grad[h, t] += by_score @ student.key[0, g, K].detach() * d**-0.5
            key_grad[g, K] += by_score[:, None] * student.query[0, h, t].detach() * d**-0.5
            by_hand += js_by_hand(a, b) / H
        torch.testing.assert_close(js[step].detach(), by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.query.grad[0], query_grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(student.key.grad[0], key_grad, rtol=1e-10, atol=1e-14)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    oisd.js_divergence(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    # In the model: with zero advantages for the policy but not for JS, layers behind the student get no gradient.
    config = with_config(think_weight=1.0, attention_weight=1.0, lens_grad="hidden")
    model = random_model()
    rollouts = random_rollouts()
    tapped = oisd.TappedModel(model, config)
    for weights, layer_grads in ((config, True), (with_config(think_weight=0.0, attention_weight=0.0), False)):
        tapped.config = dataclasses.replace(weights, clip_low=0.0, clip_high=0.0)
        batch = oisd.pack(rollouts, config)
        batch.old_logprobs = torch.where(batch.advantages > 0, -1e3, 1e3).to(torch.float64)  # every ratio is clipped
        model.zero_grad()
        sums = tapped(batch)
        (sums["token_loss_sum"] + sums["step_loss_sum"]).backward()
        norms = {name: float(p.grad.norm()) if p.grad is not None else 0.0 for name, p in model.named_parameters()}
        assert all(norms[name] == 0 for name in norms if "layers.2" in name or "layers.3" in name or "lm_head" in name)
        assert norms["model.norm.weight"] == 0
        assert (norms["model.layers.1.mlp.up_proj.weight"] > 0) == layer_grads


# ---------------------------------------------------------------------------------------------------------------------
# Exact identities
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lens_at_the_last_layer_is_the_models_logits(family, tied):
    model = random_model(family, tied, dtype=torch.float32)
    tapped = oisd.TappedModel(model, CONFIG)
    tap, ids = tapped.teacher_tap, torch.arange(40)[None]
    tap.recording = True
    logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(tapped.lens(tap.hidden), logits)  # bit for bit
    oisd.verify_lens(tapped)


def test_a_head_that_does_more_than_unembed_is_refused():
    model = random_model()
    tapped = oisd.TappedModel(model, CONFIG)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: torch.tanh(logits / 5) * 5)  # soft-capping
    with pytest.raises(oisd.UserError, match="more than unembed"):
        oisd.verify_lens(tapped)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_attention_is_the_renormalised_eager_attention(family, attention):
    rollout = random_rollouts(count=3)
    config = with_config(attention_steps=100)
    reference = random_model(family, attention="eager")
    tapped = oisd.TappedModel(random_model(family, attention=attention), config)
    batch = oisd.pack(rollout, config)
    tapped._run(batch)
    for tap, layer in ((tapped.student_tap, 1), (tapped.teacher_tap, 3)):
        scores = oisd.attention_scores(tap, batch.queries, batch.keys, batch.key_valid)
        sampled = scores.softmax(-1)  # (S, H, K)
        row = 0
        for one, start in zip(rollout, batch.borders.tolist()):
            ids = torch.tensor([one.prompt_ids + one.response_ids])
            full = reference(input_ids=ids, output_attentions=True, use_cache=False).attentions[layer][0]  # (H, T, T)
            for step in range(len(one.response_ids)):
                query = len(one.prompt_ids) - 1 + step
                keys = oisd.sample_attention_keys(query, config.attention_window, config.attention_strided)
                expected = full[:, query, keys] / full[:, query, keys].sum(-1, keepdim=True)
                torch.testing.assert_close(sampled[row][:, batch.key_valid[row]], expected, **SINGLE)
                assert int(batch.queries[row]) == start + query
                row += 1
        assert row == len(sampled)


def dense_gradients(final, student, head, targets, advantages, old, config):
    inputs = [x.clone().requires_grad_() for x in (final, student, head)]
    student_head = inputs[2] if config.lens_grad == "all" else head
    logprobs, *_ = oisd.dense_token_stats(inputs[0], inputs[1], inputs[2], targets, config)
    student_logits, final_logits = F.linear(inputs[1], student_head), F.linear(inputs[0], inputs[2])
    js = oisd.js_divergence(student_logits, final_logits, config.distill_temperature)
    loss = oisd.policy_loss_sum(logprobs, old, advantages, config)
    loss = loss + config.think_weight * oisd.think_loss_sum(js, advantages, config.advantage_clip)
    return loss.detach(), torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.6}, {"distill_temperature": 2.0, "think_weight": 0.5}, {"lens_grad": "hidden"}],
)
def test_chunked_lens_pass_is_the_dense_one(chunk, changes):
    config = with_config(lens_chunk_tokens=chunk, **changes)
    torch.manual_seed(3)
    N, D, V = 16, 12, 31
    final, student, head = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D)))
    targets, advantages = torch.randint(V, (N,)), 2 * torch.randn(N, dtype=torch.float64)
    old = torch.randn(N, dtype=torch.float64) - 4
    expected, expected_gradients = dense_gradients(final, student, head, targets, advantages, old, config)

    def token_loss(rows, logprobs, js):
        policy = oisd.policy_loss_sum(logprobs, old[rows], advantages[rows], config)
        return policy + config.think_weight * oisd.think_loss_sum(js, advantages[rows], config.advantage_clip)

    inputs = [x.clone().requires_grad_() for x in (final, student, head)]
    loss, *stats = oisd.LensPass.apply(*inputs, targets, token_loss, config)
    (3 * loss).backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    for tensor, gradient in zip(inputs, expected_gradients):
        torch.testing.assert_close(tensor.grad, 3 * gradient, rtol=1e-9, atol=1e-11)
    for mine, dense in zip(stats, oisd.dense_token_stats(final, student, head, targets, config)):
        torch.testing.assert_close(mine, dense, rtol=1e-11, atol=1e-12)


def test_bfloat16_is_no_further_from_the_truth_than_plain_autograd():
    """Under autocast, against float64: the errors of gradients and log-probs, next to those of the dense version."""
    torch.manual_seed(5)
    N, D, V, config = 64, 32, 101, with_config(temperature=0.7, dtype="bfloat16")
    truth = [torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D))]
    targets, advantages = torch.randint(V, (N,)), torch.randn(N, dtype=torch.float64)
    old = oisd.dense_token_stats(*truth, targets, config)[0]
    _, expected = dense_gradients(*truth, targets, advantages, old, config)

    def token_loss(rows, logprobs, js):
        policy = oisd.policy_loss_sum(logprobs, old[rows].float(), advantages[rows].float(), config)
        return policy + config.think_weight * oisd.think_loss_sum(js, advantages[rows].float(), 1.0)

    inputs = [x.float().requires_grad_() for x in truth]
    with torch.autocast("cpu", torch.bfloat16):
        assert oisd._head_dtype(inputs[0]) == torch.bfloat16
        loss, *stats = oisd.LensPass.apply(*inputs, targets, token_loss, config)
        logprobs, js, *_ = oisd.dense_token_stats(*inputs, targets, config)
    dense = torch.autograd.grad(token_loss(slice(None), logprobs, js), inputs)
    loss.backward()
    for mine, plain, true in zip([x.grad for x in inputs], dense, expected):
        assert (mine - true).norm() <= 1.1 * (plain - true).norm() < 0.1 * true.norm()
    assert (stats[0] - old).abs().max() <= 1.1 * (logprobs - old).abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_the_objective_is_that_of_dense_autograd(tied):
    """All of Eq. 11 with unequal weights, in two micro-batches, against hidden states, logits and eager attention."""
    config, rollouts = with_config(think_weight=0.7, attention_weight=0.4), random_rollouts()
    model = random_model(tied=tied)
    _, mine = gradients(model, config, rollouts, max_tokens=100)
    model = random_model(tied=tied, attention="eager")
    token_sum, step_sum, tokens, steps = 0.0, 0.0, 0, 0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
        predicting = slice(len(rollout.prompt_ids) - 1, -1)
        student = model.lm_head(model.model.norm(output.hidden_states[2]))[0, predicting]  # after the second layer
        final, targets = output.logits[0, predicting], torch.tensor(rollout.response_ids)
        logprobs = final.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        advantages = torch.full_like(logprobs, rollout.advantage)
        token_sum = token_sum + oisd.policy_loss_sum(logprobs, rollout.old_logprobs, advantages, config)
        js = js_by_hand(student.softmax(-1), final.detach().softmax(-1))
        token_sum = token_sum + 0.7 * (advantages.clamp(-1, 1) * js).sum()
        tokens += len(targets)
        for step in oisd.sample_attention_steps(len(targets), 5).tolist():
            query = len(rollout.prompt_ids) - 1 + step
            keys = oisd.sample_attention_keys(query, 4, 3)
            a, b = (output.attentions[layer][0, :, query, keys].double() for layer in (1, 3))
            js = js_by_hand(a / a.sum(-1, keepdim=True), (b / b.sum(-1, keepdim=True)).detach())
            step_sum = step_sum + max(-1, min(1, rollout.advantage)) * js.mean()
            steps += 1
    (token_sum / tokens + 0.4 * step_sum / steps).backward()
    assert_same_gradients(mine, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_is_not_checkpointed(family):
    config, rollouts = with_config(attention_weight=1.0), random_rollouts()
    plain_sums, plain = gradients(random_model(family), config, rollouts)
    model = random_model(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sums, checkpointed = gradients(model, config, rollouts)
    assert sums == plain_sums
    assert_same_gradients(checkpointed, plain, rtol=0, atol=0)


def test_taps_hold_nothing_after_a_step():
    model = random_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = run_of(model, CONFIG)
    oisd.backward(run, random_rollouts(), 10**6)
    for tap in (run.model.student_tap, run.model.teacher_tap):
        assert tap.hidden is None and tap.query is None and tap.key is None


def test_updates_are_clipped_steps_on_mini_batches():
    """4 prompts x 2 rollouts in mini-batches of 2 prompts: two steps of SGD, on gradients of norm 0.05 at most."""
    config = with_config(group_size=2, mini_batch_prompts=2, max_grad_norm=0.05, max_tokens_per_gpu=100)
    rollouts, model, other = random_rollouts(8), random_model(), random_model()
    run = run_of(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    metrics = oisd.update(run, rollouts)
    norms = []
    for half in (rollouts[:4], rollouts[4:]):
        _, found = gradients(other, config, half)
        norms.append(torch.stack([gradient.norm() for gradient in found.values()]).norm())
        assert norms[-1] > 0.05
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter -= found[name] * 0.05 / norms[-1]
    torch.testing.assert_close(metrics["grad_norm"], float(sum(norms) / 2), rtol=1e-4, atol=0)
    for mine, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_scores_are_taken_at_the_sampling_temperature():
    config = with_config(temperature=0.6)
    model, rollouts = random_model(), random_rollouts(3)
    batch = oisd.pack(rollouts, config)
    scores = oisd.TappedModel(model, config)(batch, score_only=True)["logprobs"]
    ids = [torch.tensor([r.prompt_ids + r.response_ids]) for r in rollouts]
    logits = [model(input_ids=i).logits[0, len(r.prompt_ids) - 1 : -1] for i, r in zip(ids, rollouts)]
    expected = (torch.cat(logits) / 0.6).log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    torch.testing.assert_close(scores, expected, **SINGLE)


def test_sliding_windows_are_refused_where_they_would_be_ignored():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=20), attn_implementation="sdpa")
    short, long = (oisd.Rollout([1] * 5, [2] * n, [-1.0] * n, "stop") for n in (15, 16))
    tapped = oisd.TappedModel(model, CONFIG)
    tapped(oisd.pack([short], CONFIG))
    with pytest.raises(oisd.UserError, match="sliding window of 20"):
        tapped(oisd.pack([short, long], CONFIG))


def test_weights_of_zero_are_grpo():
    """Against GRPO written here on its own: per sequence, padded, through the model's own logits."""
    rollouts = random_rollouts()
    model = random_model()
    _, mine = gradients(model, with_config(think_weight=0.0, attention_weight=0.0), rollouts)
    model.zero_grad()
    width = max(rollout.length for rollout in rollouts)
    ids = torch.tensor([[*r.prompt_ids, *r.response_ids] + [0] * (width - r.length) for r in rollouts])
    mask = torch.tensor([[1] * r.length + [0] * (width - r.length) for r in rollouts])
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    losses = []
    for r, row in zip(rollouts, logprobs):
        for old, new in zip(r.old_logprobs, row[len(r.prompt_ids) - 1 :]):
            ratio = (new - old).exp()
            surrogate = torch.minimum(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage)
            bounded = torch.maximum(surrogate, torch.tensor(10.0 * r.advantage))
            losses.append(-bounded if r.advantage < 0 else -surrogate)
    torch.stack(losses).mean().backward()
    assert_same_gradients(mine, {name: p.grad for name, p in model.named_parameters()}, **SINGLE)


def test_policy_loss_by_hand():
    """ratio, A -> loss: inside the clip; clipped where that is the pessimistic side; bounded by the dual clip."""
    ratio = torch.tensor([1.0, 1.5, 0.5, 0.5, 1.5, 20.0], dtype=torch.float64)
    advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    expected = -2.0 + -2.4 + -1.0 + 0.8 + 1.5 + 10.0
    logprobs = ratio.log().requires_grad_()
    loss = oisd.policy_loss_sum(logprobs, torch.zeros(6), advantages, CONFIG)
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)
    loss.backward()
    higher = oisd.policy_loss_sum(logprobs.detach(), torch.zeros(6), advantages, with_config(clip_high=0.4))
    assert math.isclose(higher.item(), expected - 2 * 0.2, rel_tol=1e-12)  # the second token's ratio is cut at 1.4
    by_hand = torch.tensor([-2.0, 0.0, -1.0, 0.0, 1.5, 0.0], dtype=torch.float64)  # -ratio A where nothing clips
    torch.testing.assert_close(logprobs.grad, by_hand, rtol=1e-12, atol=1e-12)


def test_importance_weights_are_truncated_ratios():
    trainer, sampler = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5])
    weights = oisd.importance_weights(trainer, sampler, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-0.5)]))
    assert torch.equal(oisd.importance_weights(trainer, sampler, 0.0), torch.ones(3))
    losses = [oisd.policy_loss_sum(trainer, trainer, torch.ones(3), CONFIG, w) for w in (1.0, weights)]
    assert losses[0].item() == -3 and math.isclose(losses[1].item(), -weights.sum().item(), rel_tol=1e-6)


def test_importance_weights_reach_the_loss():
    config = with_config(think_weight=0.0, attention_weight=0.0, importance_cap=2.0)
    rollouts = random_rollouts()
    for rollout in rollouts:
        steps = torch.linspace(-1, 1.5, len(rollout.response_ids))
        rollout.sampler_logprobs = (rollout.old_logprobs - steps).tolist()
    batch, tapped = oisd.pack(rollouts, config), oisd.TappedModel(random_model(), config)
    logprobs = tapped(batch, score_only=True)["logprobs"]
    weights = (batch.old_logprobs - batch.sampler_logprobs).exp().clamp(max=2)
    expected = oisd.policy_loss_sum(logprobs, batch.old_logprobs, batch.advantages, config, weights)
    torch.testing.assert_close(tapped(batch)["token_loss_sum"].detach(), expected, **SINGLE)


def test_js_is_bounded_symmetric_and_zero_for_equals():
    torch.manual_seed(4)
    one, other = 5 * torch.randn(2, 50, 20)
    js = oisd.js_divergence(one, other)
    assert (js > 0).all() and (js <= oisd.LN2).all()
    torch.testing.assert_close(js, oisd.js_divergence(other, one))
    assert oisd.js_divergence(one, one + 3).abs().max() < 1e-6  # a shift of logits changes nothing
    assert torch.equal(oisd.js_divergence(one, one), torch.zeros(50))
    with pytest.raises(ValueError, match="differ"):
        oisd.js_divergence(one, other[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_js_is_safe_for_extreme_logits(dtype):
    far, low = 3e4, -float("inf")
    student = torch.tensor([[far, 0.0, -far], [low, 1.0, low], [0.0, low, low]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-far, 0.0, far], [low, low, 1.0], [0.0, low, low]], dtype=dtype)
    js = oisd.js_divergence(student, teacher)
    js.sum().backward()
    torch.testing.assert_close(js.detach(), torch.tensor([oisd.LN2, oisd.LN2, 0.0], dtype=js.dtype))
    assert student.grad.isfinite().all()


def test_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    advantages = oisd.group_advantages(rewards, 4)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # sample standard deviation
    torch.testing.assert_close(advantages[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]).double() / (std + 1e-6))
    assert torch.equal(advantages[4:], torch.zeros(8).double())  # exactly
    assert torch.equal(oisd.group_advantages(torch.full((8,), 0.1), 8), torch.zeros(8))  # whose float std is not 0
    for bad in (torch.ones(7), torch.ones(2, 4), torch.tensor([1.0, math.nan, 0, 0])):
        with pytest.raises(ValueError):
            oisd.group_advantages(bad, 4)


@pytest.mark.parametrize("window,strided", [(1, 0), (4, 0), (4, 3), (3, 1), (64, 64), (2, 7)])
def test_attention_keys(window, strided):
    positions = torch.arange(200)
    keys, valid = oisd.sample_attention_keys_batched(positions, window, strided)
    for position in positions.tolist():
        chosen = oisd.sample_attention_keys(position, window, strided).tolist()
        assert chosen == sorted(set(chosen)) == keys[position][valid[position]].tolist()
        first_local = max(0, position + 1 - window)
        assert [key for key in chosen if key >= first_local] == list(range(first_local, position + 1))
        far = [key for key in chosen if key < first_local]
        assert len(far) <= strided and len({b - a for a, b in itertools.pairwise(far)}) <= 1
        assert not far or (far[0] == 0 and first_local - far[-1] <= max(1, math.ceil(first_local / strided)))
        assert bool(far) == (first_local > 0 and strided > 0)
    for bad in ((-1, 4, 4), (3, 0, 4), (3, 4, -1)):
        with pytest.raises(ValueError):
            oisd.sample_attention_keys(*bad)


# ---------------------------------------------------------------------------------------------------------------------
# Invariances
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_any_split_into_micro_batches_gives_one_gradient(tied):
    config = with_config(attention_weight=1.0)
    rollouts = [r for r in random_rollouts(40) if 10 <= r.length <= 16][:8]
    assert len(rollouts) == 8
    model = random_model(tied=tied)
    parts = {tokens: [len(p) for p in oisd.micro_batches(rollouts, tokens)] for tokens in (128, 64, 16)}
    assert parts[128] == [8] and len(parts[64]) == 2 and parts[16] == [1] * 8, parts
    (whole_sums, whole), *others = [gradients(model, config, rollouts, tokens) for tokens in (128, 64, 16)]
    for sums, gradient in others:
        assert sums == pytest.approx(whole_sums, rel=1e-10)
        assert_same_gradients(gradient, whole, **DOUBLE)


def test_an_empty_micro_batch_adds_exactly_nothing():
    """A rank that has no rollout left computes one token without a response, and its gradients are zeros, not None."""
    model = random_model()
    tapped = oisd.TappedModel(model, with_config(attention_weight=1.0))
    sums = tapped(oisd.pack([], CONFIG))
    assert all(value == 0 for value in sums.values())
    (sums["token_loss_sum"] + sums["step_loss_sum"]).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert tapped(oisd.pack([], CONFIG), score_only=True)["logprobs"].shape == (0,)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_micro_batches_are_few_full_and_as_many_for_each_rank(ranks):
    for seed in range(20):
        rollouts = random_rollouts(1 + seed, seed)
        lengths = [rollout.length for rollout in rollouts]
        for limit in (38, 60, 200):
            parts = oisd.micro_batches(rollouts, limit, ranks)
            sizes = [sum(lengths[index] for index in part) for part in parts]
            assert sorted(index for part in parts for index in part) == list(range(len(rollouts)))
            assert len(parts) % ranks == 0 and max(sizes) <= limit and sizes == sorted(sizes, reverse=True)
            assert len(parts) - ranks < 2 * sum(lengths) / limit + 1  # no more rounds than half-full bins would take
            if all(sizes):  # within a round of ranks no one waits for more than one rollout's tokens
                rounds = [sizes[start : start + ranks] for start in range(0, len(sizes), ranks)]
                assert all(a[0] - a[-1] <= max(lengths) for a in rounds)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone_is_padded(family, attention):
    rollouts = random_rollouts()
    model = random_model(family, attention=attention)
    tapped = oisd.TappedModel(model, CONFIG)
    packed = tapped(oisd.pack(rollouts, CONFIG), score_only=True)["logprobs"]
    alone = [tapped(oisd.pack([rollout], CONFIG), score_only=True)["logprobs"] for rollout in rollouts]
    torch.testing.assert_close(packed, torch.cat(alone), **SINGLE)
    width = max(rollout.length for rollout in rollouts)
    padded, model = [], random_model(family)
    for rollout in rollouts:  # left padding, the model's own forward pass
        pad = width - rollout.length
        ids = torch.tensor([[0] * pad + rollout.prompt_ids + rollout.response_ids])
        mask = torch.tensor([[0] * pad + [1] * rollout.length])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
        predicting = logits[pad + len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        padded.append(predicting.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(padded), **SINGLE)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had, views of parameters aside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_tokens_by_vocabulary_or_tokens_by_tokens():
    """400 response tokens, vocabulary 2,000: nothing comes near 400 x 2,000 or 400 x 400."""
    config = with_config(lens_chunk_tokens=16, attention_steps=64, attention_weight=1.0)
    model = random_model(dtype=torch.float32, vocab_size=2000)
    rollout = dataclasses.replace(random_rollouts(1)[0], response_ids=[5] * 400, sampler_logprobs=[-4.0] * 400)
    rollout.old_logprobs = torch.full((400,), -7.0)
    tapped = oisd.TappedModel(model, config)
    with LargestTensor() as largest:
        sums = tapped(oisd.pack([rollout], config))
        (sums["token_loss_sum"] + sums["step_loss_sum"]).backward()
    assert largest.elements <= model.lm_head.weight.numel() == 2000 * 32 < min(400 * 400, 400 * 2000)


def test_sampling_depends_on_the_sequences_seed_alone(toy):
    """Alone or in a batch, first or last: the same tokens, which is what lets runs be split and resumed."""
    _, sampler, _, prompts = toy_sampler(toy)
    together = oisd.in_order(sampler.stream(prompts, list(range(len(prompts)))))
    for index in (0, 3, len(prompts) - 1):
        alone = oisd.in_order(sampler.stream([prompts[index]], [index]))[0]
        assert alone.response_ids == together[index].response_ids
    assert len({tuple(r.response_ids) for r in oisd.in_order(sampler.stream([prompts[0]] * 32, list(range(32))))}) > 2


def test_sampling_draws_from_the_softmax():
    """Gumbel-max against the probabilities: 20,000 draws at temperature 0.5, by chi-squared."""
    logits, draws = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]), 20_000
    sampling = oisd.SeededSampling(range(draws), temperature=0.5, end_ids=[1, 4])
    scores = sampling(torch.zeros(draws, 1), logits.expand(draws, 5))
    expected = (logits / 0.5).softmax(-1)
    counts = scores.argmax(-1).bincount(minlength=5)
    assert ((counts - draws * expected) ** 2 / (draws * expected)).sum() < 18.5  # 99.9 % quantile, 4 degrees of freedom
    recorded = torch.tensor(sampling.logprobs)[:, 0]
    torch.testing.assert_close(recorded, expected.log()[scores.argmax(-1)])
    ended = torch.isin(scores.argmax(-1), torch.tensor([1, 4])).tolist()
    assert sampling.finished == ended
    sampling(torch.zeros(draws, 2), logits.expand(draws, 5))  # nothing is recorded after the end
    assert [len(logprobs) for logprobs in sampling.logprobs] == [2 - end for end in ended]


# ---------------------------------------------------------------------------------------------------------------------
# Contracts
# ---------------------------------------------------------------------------------------------------------------------


def test_response_mask_comes_from_lengths():
    """EOS (1) in a response counts, a pad-like token too, the prompt never; borders separate positions."""
    rollouts = [
        oisd.Rollout([1, 5], [7, 1], [-1.0, -2.0], "stop", advantage=0.5),
        oisd.Rollout([9], [1, 1, 0], [-3.0] * 3, "length", advantage=-0.5),
    ]
    batch = oisd.pack(rollouts, with_config(attention_steps=2))
    assert batch.input_ids.tolist() == [[1, 5, 7, 1, 9, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.predicted.tolist() == [2, 3, 5, 6, 7] and batch.target_ids.tolist() == [7, 1, 1, 1, 0]
    assert batch.borders.tolist() == [0, 4, 8] and batch.lengths == [4, 4]
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5]
    assert batch.queries.tolist() == [1, 2, 4, 5]  # two steps each, the query before the predicted token
    assert batch.keys[3][batch.key_valid[3]].tolist() == [4, 5]  # no key of the neighbour


def test_rollouts_of_equal_rewards_leave_no_gradient():
    rollouts = [dataclasses.replace(rollout, advantage=0.0) for rollout in random_rollouts()]
    _, found = gradients(random_model(), with_config(attention_weight=1.0), rollouts)
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_attention_steps_are_even_and_unique():
    assert oisd.sample_attention_steps(3, 64).tolist() == [0, 1, 2]
    steps = oisd.sample_attention_steps(1000, 64).tolist()
    assert len(steps) == 64 and steps[0] == 0 and {b - a for a, b in itertools.pairwise(steps)} == {15, 16}


def test_every_table_loads(capsys):
    for table in ("tiny", "smollm2_135m", "qwen3_4b", "qwen3_8b", "octothinker_3b", "octothinker_8b"):
        name, config = oisd.load_config(["--config", f"configs.toml:{table}"])
        assert name == table
    assert config.student_layer == 31 and config.prompts_per_step == 128  # from the table, and from its base
    name, config = oisd.load_config(["--config=configs.toml:qwen3_4b", "--think_weight", "0", "--learning_rate=2e-6"])
    assert (config.think_weight, config.learning_rate, config.student_layer) == (0.0, 2e-6, 6)
    assert oisd.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for entry in dataclasses.fields(oisd.Config):
        assert f"--{entry.name} " in shown and oisd.field_docs()[entry.name]


BAD_INPUTS = [
    (["--learning_rat", "1"], "learning_rate"),
    (["--learning_rate", "fast"], "float"),
    (["--learning_rate"], "has no value"),
    (["--learning_rate", "-1"], "more than 0"),
    (["--num_steps", "1.5"], "int"),
    (["--resume", "maybe"], "bool"),
    (["--sampler", "vlm"], "did you mean 'vllm'"),
    (["--dtype", "fp16"], "float32 | bfloat16"),
    (["--temperature", "0"], "more than 0"),
    (["--temperature", "nan"], "more than 0"),
    (["--clip_low", "1.5"], "less than 1"),
    (["--dual_clip", "1"], "more than 1"),
    (["--dual_clip", "nan"], "more than 1"),
    (["--attention", "flash_attention_2"], "bfloat16 only"),
    (["--group_size", "1"], "at least 2"),
    (["--mini_batch_prompts", "5"], "does not divide"),
    (["--max_tokens_per_gpu", "10"], "cannot hold one rollout"),
    (["--vllm_memory", "2"], "between 0 and 1"),
    (["--model", ""], "empty"),
    (["--tracker", "wandb"], "pip install wandb"),
    (["tiny"], "not a field"),
    (["--config", "configs.toml:tyni"], "did you mean 'tiny'"),
    (["--config", "configs.toml"], "FILE:TABLE"),
    (["--config", "nothing.toml:tiny"], "no file"),
    (["--resume", "--output_dir", "nowhere"], "no run in nowhere"),
    (["--student_layer", "0"], "at least 1"),
    (["--student_layer", "3"], "has 3 layers"),
    (["--model", "./nowhere"], "./nowhere"),
    (["--train_data", "nowhere.jsonl"], "no such file"),
    (["--answer_field", "anser"], "did you mean 'answer'"),
    (["--max_prompt_tokens", "2", "--max_tokens_per_gpu", "500"], "at most max_prompt_tokens = 2"),
    (["--tensor_parallel", "2"], "launch a multiple of it"),
    (["--lora_rank", "-1"], "0 or more"),
]


@pytest.mark.parametrize("arguments,message", BAD_INPUTS, ids=[" ".join(words) for words, _ in BAD_INPUTS])
def test_bad_input_gets_one_line(arguments, message, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert oisd.main([*toy_arguments(toy, tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("oisd: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_first(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oisd, "find_spec", lambda name: None)
    for words, message in (
        (["--attention", "flash_attention_2", "--dtype", "bfloat16"], "flash-attn is not installed"),
        (["--lora_rank", "4"], "peft is not installed"),
        (["--tracker", "wandb"], "pip install wandb"),
    ):
        assert oisd.main([*toy_arguments(toy, tmp_path / "run"), *words]) == 2
        assert message in capsys.readouterr().err


def test_bad_tables_get_one_line(tmp_path):
    for text, message in (
        ("[a]\nnum_steps = '3'", "it takes int"),
        ("[a]\nnum_step = 3", "did you mean 'num_steps'"),
        ("[a]\nresume = 1", "it takes bool"),
        ("[a]\nbase = 'b'\n[b]\nbase = 'a'", "its own base"),
        ("[a]\nbase = 'c'", "no table 'c'"),
        ("[a", "not valid TOML"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(oisd.UserError, match=message):
            oisd.load_config(["--config", f"{tmp_path / 'c.toml'}:a"])


def test_resolved_config_is_a_config(tmp_path):
    config = with_config(system_prompt='Zwölf "🙂"\n\\boxed{}', learning_rate=1e-6)
    (tmp_path / "c.toml").write_text(oisd.toml_table("run", config), encoding="utf-8")
    assert oisd.load_config(["--config", f"{tmp_path / 'c.toml'}:run"]) == ("run", config)


def test_step_problems_are_epochs_in_order():
    problems = [oisd.Problem(row, [1], "1") for row in range(10)]
    config = with_config(prompts_per_step=4)
    rows = [problem.row for step in range(5) for problem in oisd.step_problems(problems, step, config)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]


@pytest.mark.skipif(not PAPER_DATA.exists(), reason="the paper's data sets are not part of the repository")
def test_paper_data_loads(toy):
    config = with_config(
        question_field="prompt", answer_field="reward_model.ground_truth", max_prompt_tokens=10**6, model=str(toy)
    )
    tokenizer = oisd.load_tokenizer(config)
    counts = {"deepmath-5k": 5000, "math500": 500, "amc2023": 40, "aime_2024": 30, "aime_2025": 30}
    for name, count in counts.items():
        problems, too_long = oisd.load_problems(str(PAPER_DATA / f"{name}.parquet"), tokenizer, config)
        assert (len(problems), too_long) == (count, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Grader
# ---------------------------------------------------------------------------------------------------------------------


RIGHT = r"""
0.5                  | \frac12
\dfrac{1}{2}         | \frac{1}{2}
\frac65              | 1\frac15
\frac13              | 0.333333
\frac{\pi}{10}       | 0.1\pi
0.0000672            | 6.72 \times 10^{-5}
42                   | 42.
42                   | 42.0
42                   | $42$.
42                   | \(42\)
42                   | \text{42.}
3                    | x = 3
x=3                  | 3
-\frac{\pi}{4}       | \frac{-\pi}{4}
\frac{1}{\sqrt2}     | \frac{\sqrt{2}}{2}
x^2+2x+1             | (x+1)^2
5x-7y=4              | 10x - 14y = 8
\{1,2\}              | \{2, 1\}
1,2                  | 2 \text{ and } 1
(3,\frac12)          | (3, 0.5)
(-\infty,1)\cup(2,3] | (2,3]\cup(-\infty,1)
x \in [-2,7]         | [-2, 7]
50\%                 | 0.5
50\%                 | 50
\$32,\!348           | 32348
58,500               | 58500
335{,}670            | 335\,670
1234567              | 1 234 567
1,200                | 1{,}200 \text{ cm}
90^\circ             | 90
15\mbox{ cm}^2       | 15
\frac{270}7\text{ degrees} | \frac{270}{7}^\circ
\text{Evelyn}        | Evelyn
Yes                  | \text{yes}.
True                 | true
\text{(C)}           | \textbf{C}
\mathbb{Z}/2\mathbb{Z} | \mathbb{Z} / 2\mathbb{Z}
\begin{pmatrix} 1/5 \\ -3 \end{pmatrix} | \begin{bmatrix} 0.2 \\ -3 \end{bmatrix}
2^{-99}              | \frac{1}{2^{99}}
\frac{\pi}{2^{99}}   | \frac{2\pi}{2^{100}}
"""
WRONG = r"""
\frac12              | \frac13
\frac13              | 0.333
42                   | 42.1
x=3                  | y=3
(1,2)                | (2,1)
(1,2)                | [1,2]
(1,200)              | 1200
\{1,200\}            | 1200
2,6                  | 2.6
3                    | 3, 4
3,4                  | 3
-\infty              | \infty
18 \text{ integers}  | 19
\text{east}          | \text{west}
C                    | D
Yes                  | No
1/2^99               | 1/2^98
\pi e^{-60}          | \pi e^{-61}
0.0000672            | 0.0000673
10^{-7}              | 0.0000002
12                   | 1 2
2t                   | 2
n = m                | n = t
\ln c                | \ln s
f(x) = x + c         | f(x) = x + m
\{\mathbf{0}\}       | \{\mathbf{1}\}
|n|                  | n
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}
"""
HOSTILE = [
    r"9^{9^{9^9}}",
    "100000!!",
    "(10^8)!",
    r"\binom{10^9}{10^8}",
    r"\sqrt[99999]{99999!}",
    r"\sum_{n=1}^{\infty}\frac{\sin(n^2)}{n^{1.5}}",
    "(" * 250 + "1" + ")" * 250,
    "{" * 10**6 + "}" * 10**6,
]


def table(text: str) -> list[tuple[str, str]]:
    return [tuple(part.strip() for part in line.split(" | ", 1)) for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def pool():
    with grading.Grader(workers=2, seconds=10.0) as grader:
        yield grader


def test_right_and_wrong_answers(pool):
    for verdict, pairs in ((1.0, table(RIGHT)), (0.0, table(WRONG))):
        golds, answers = zip(*pairs, strict=True)
        got = pool.grade([rf"So the answer is \boxed{{{answer}}}." for answer in answers], list(golds))
        assert [pair for pair, value in zip(pairs, got, strict=True) if value != verdict] == []
    assert (pool.timeouts, pool.crashes) == (0, 0)


@pytest.mark.parametrize(
    ("response", "content"),
    [
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{3} as asked, within \boxed{}.", "3"),
        (r"\boxed{3} and \boxed{ }", "3"),
        (r"\boxed{\frac{1}{2}}}}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}} }", r"\{1,2\}"),
        (r"\boxed{\left\{x}", r"\left\{x"),
        (r"\boxed{1 \boxed{2}}", "2"),
        (r"\boxed {7}", "7"),
        (r"\boxed{1} so \boxed{2", None),
        (r"\boxed{\boxed{}", None),
        (r"the answer is 3", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(response, content):
    assert grading.extract_boxed(response) == content


def test_extraction_is_linear():
    start = time.monotonic()
    for piece in ("{", "}", r"\boxed{", r"\boxed{}", r"\boxed{{", r"\boxed ", r"\boxed{1", "\\", " ", r"\boxed{}}"):
        grading.extract_boxed(piece * (10**6 // len(piece)))
        grading.extract_boxed(r"\boxed{" + piece * (10**6 // len(piece)))
    assert time.monotonic() - start < 20  # 5 seconds alone; hours were it quadratic


def test_clean_answer():
    same = [
        r"(1,200)",
        r"\{1,200\}",
        "2,6",
        "-2,1",
        "0,123",
        "1,2000",
        "[1,200)",
        "0.333...",
        r"x \text{ cm}",
        "$1$, $2$",
    ]
    assert [grading.clean_answer(text) for text in same] == same
    assert grading.clean_answer(r" $$1{,}234{,}567.5$$. ") == "1234567.5"
    assert grading.clean_answer(r"\$1,\!000,\!000") == r"\$1000000"
    assert grading.clean_answer(r"(1{,}200, 3)") == "(1200, 3)"
    assert grading.clean_answer(r"-1,200 \text{ m}") == r"-1200 \text{ m}"


def test_nothing_is_an_answer_only_in_a_box(pool):
    responses = ["42", r"\boxed{}", "", r"\boxed{42", r"\boxed{.}", r"\boxed{" + "0" * 600 + "42}"]
    assert pool.grade(responses, ["42"] * 4 + ["", "42"]) == [0.0] * 6


def test_unequal_lengths_are_refused(pool):
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        pool.grade(["a", "b"], ["a"])
    assert pool.grade([], []) == []


def alive(grader) -> int:
    return sum(worker is not None and worker.poll() is None for worker in grader._idle.queue)


def test_hostile_answers_cost_their_time_and_no_more():
    with grading.Grader(workers=2, seconds=1.0) as grader:
        start = time.monotonic()
        assert grader.grade([rf"\boxed{{{answer}}}" for answer in HOSTILE], ["7"] * len(HOSTILE)) == [0.0] * len(
            HOSTILE
        )
        assert time.monotonic() - start < 30  # 7 verdicts of 1 second by 2 workers, and their replacements
        assert grader.timeouts >= 5 and grader.crashes == 0
        assert (
            grader.grade([r"\boxed{0.5}", r"\boxed{4}", r"\boxed{2.0}"] * 4, [r"\frac24", "5", "2"] * 4)
            == [1, 0, 1] * 4
        )
        time.sleep(1.2)  # the clock does not run while a worker is idle
        assert grader._idle.qsize() == 2 and alive(grader) == 2


def test_a_killed_worker_is_a_crash_and_is_replaced():
    with grading.Grader(workers=1, seconds=60.0) as grader:
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]
        worker = grader._idle.queue[0]
        threading.Timer(0.5, worker.kill).start()
        assert grader.grade([r"\boxed{9^{9^{9^9}}}"], ["7"]) == [0.0]
        assert (grader.timeouts, grader.crashes) == (0, 1)
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]
        grader._idle.queue[0].kill()  # one that dies while idle costs no verdict
        grader._idle.queue[0].wait()
        assert grader.grade([r"\boxed{0.25}"], [r"\frac28"]) == [1.0] and grader.crashes == 1
        worker = grader._idle.queue[0]
        assert worker.poll() is None
    assert worker.poll() is not None and grader._idle.qsize() == 1


def test_a_stopped_worker_does_not_stop_the_program():
    with grading.Grader(workers=1, seconds=1.0) as grader:
        grader.grade([r"\boxed{1}"], ["2"])
        os.kill(grader._idle.queue[0].pid, signal.SIGSTOP)
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [0.0] and grader.crashes == 1
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_workers_are_limited_and_light():
    with grading.Grader(workers=1, memory_gib=1.0) as grader:
        grader.grade([r"\boxed{0.5}"], [r"\frac24"])
        pid = grader._idle.queue[0].pid
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (2**30, 2**30)
        assert os.getsid(pid) == pid  # its own session: no SIGINT from the terminal
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_callers_alarm_survives(pool):
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0)
        assert pool.grade([r"\boxed{0.75}"], [r"\frac34"]) == [1.0]
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100 and rang == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_blocked_or_ignored_alarm_of_the_caller_does_not_disarm_the_workers():
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        with grading.Grader(workers=1, seconds=1.0) as grader:
            grader.grade([r"\boxed{1}"], ["2"])
            rescue = threading.Timer(6, grader._idle.queue[0].kill)  # or a failure would be a hang
            rescue.start()
            assert grader.grade([r"\boxed{9^{9^{9^9}}}"], ["7"]) == [0.0] and grader.timeouts == 1
            rescue.cancel()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, before)


def test_grading_from_a_thread():
    got = []
    with grading.Grader(workers=1) as grader:
        work = [r"\boxed{0.75}", "no"], [r"\frac34", "1"]
        thread = threading.Thread(target=lambda: got.extend(grader.grade(*work)))
        thread.start()
        thread.join()
    assert got == [1.0, 0.0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent():
    program = (
        "from tools import grader as grading\n"
        "g = grading.Grader(2, 2.0)\n"
        "g.grade([r'\\boxed{1}', r'\\boxed{2}'], ['3', '3'])\n"
        "print(*[w.pid for w in g._idle.queue], flush=True)\n"
        "g.grade([r'\\boxed{9^{9^{9^9}}}'], ['3'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(oisd.__file__).parent)
    pids = parent.stdout.readline().split()
    time.sleep(0.3)  # one worker is stuck in C code now, the other idle
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while living := [pid for pid in pids if Path(f"/proc/{int(pid)}").exists()]:
        assert time.monotonic() < deadline, living
        time.sleep(0.05)


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    source = grading._WORKER_SOURCE.replace("from math_verify ", "from math_verifyy ")
    monkeypatch.setattr(grading, "_WORKER_SOURCE", source)
    with grading.Grader(workers=2) as grader:
        for _ in range(2):  # and the pool is not exhausted by it
            with pytest.raises(RuntimeError, match="No module named 'math_verifyy'"):
                grader.grade([r"\boxed{1}"], ["2"])


def test_what_libraries_print_does_no_harm(monkeypatch):
    line = "        parsed, units, zeros = read_gold(gold)\n"
    noisy = line + "        print('1\\n' * 10**5); os.write(1, b'1\\n'); os.write(2, b'1\\n' * 10**5)\n"
    assert line in grading._WORKER_SOURCE
    monkeypatch.setattr(grading, "_WORKER_SOURCE", grading._WORKER_SOURCE.replace(line, noisy))
    with grading.Grader(workers=1, seconds=3.0) as grader:
        responses, golds = [rf"\boxed{{{n}.0}}" for n in range(6)], ["0", "2", "2", "9", "4", "7"]
        assert grader.grade(responses, golds) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
        assert (grader.timeouts, grader.crashes) == (0, 0)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is of 3.11")
def test_the_working_directory_cannot_shadow_modules(tmp_path, monkeypatch):
    (tmp_path / "sympy.py").write_text("raise ImportError('the wrong sympy')")
    monkeypatch.chdir(tmp_path)
    with grading.Grader(workers=1) as grader:
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]


def test_golds_are_checked_by_parsing(pool):
    rows = pool.check_golds([r"\frac12", r"\boxed{", "3", "", "3"])
    assert rows == [1, 3]


@pytest.mark.skipif(not PAPER_DATA.exists(), reason="the paper's data sets are not part of the repository")
def test_every_gold_verifies_against_itself(pool):
    pandas = pytest.importorskip("pandas")
    golds = {}
    for name in ("deepmath-5k", "math500", "amc2023", "aime_2024", "aime_2025"):
        rows = pandas.read_parquet(PAPER_DATA / f"{name}.parquet")
        golds[name] = list(
            rows["final_answer"] if name == "deepmath-5k" else [r["ground_truth"] for r in rows["reward_model"]]
        )
    assert [len(column) for column in golds.values()] == [5000, 500, 40, 30, 30]
    every = list(itertools.chain(*golds.values()))
    assert [every[row] for row in pool.check_golds(every)] == []


# ---------------------------------------------------------------------------------------------------------------------
# The whole program
# ---------------------------------------------------------------------------------------------------------------------


def make_toy(folder, tied):
    """A small Qwen3 that has learnt to answer any sum with \\boxed{1}, \\boxed{2} or \\boxed{3}, at random."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    shape = SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "head_dim": 32}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**shape, **ends, tie_word_embeddings=tied, max_position_embeddings=128, dtype="float32")
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        prompts = [f"<user>{a}+{b}<assistant>" for a, b in torch.randint(0, 10, (32, 2)).tolist()]
        texts = [f"{p}\\boxed{{{d}}}<eos>" for p, d in zip(prompts, torch.randint(1, 4, (32,)).tolist())]
        ids = tokenizer(texts, return_tensors="pt").input_ids
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    problems = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(3) for b in range(3) if 1 <= a + b <= 3]
    (folder / "train.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder, tied=True)
    return folder


@pytest.fixture(scope="session")
def untied_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied_toy")
    make_toy(folder, tied=False)
    return folder


def toy_arguments(toy, output, **changes):
    fields = {
        "model": toy,
        "train_data": toy / "train.jsonl",
        "test_data": toy / "train.jsonl",
        "output_dir": output,
        "student_layer": 1,
        "prompts_per_step": 4,
        "mini_batch_prompts": 2,
        "max_response_tokens": 8,
        "learning_rate": 1e-3,
        "num_steps": 4,
        "checkpoint_every": 2,
        "rollouts_every": 2,
        "attention_weight": 1.0,
        "sampler": "hf",
    }
    words = ["--config", str(ROOT / "configs.toml:tiny")]
    return words + [f"--{name}={value}" for name, value in (fields | changes).items()]


def toy_sampler(toy):
    _, config = oisd.load_config(toy_arguments(toy, "unused"))
    tokenizer = oisd.load_tokenizer(config)
    model, _ = oisd.load_model(config)
    end_ids = oisd.end_token_ids(model.generation_config, tokenizer)
    problems, _ = oisd.load_problems(config.train_data, tokenizer, config)
    return config, oisd.HfSampler(config, model, end_ids), end_ids, [problem.prompt_ids for problem in problems]


def read_metrics(folder):
    timings = ("seconds", "seconds_rollout", "tokens_per_second", "peak_memory_gib")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timings} for row in rows]


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_resumed_is_uninterrupted(toy, tmp_path, changes):
    """Two steps, stop, two more: the metrics and the weights, bit for bit, of four steps in one go."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert oisd.main(toy_arguments(toy, whole, **changes)) == 0
    assert oisd.main(toy_arguments(toy, parted, num_steps=2, **changes)) == 0
    assert oisd.main([*toy_arguments(toy, parted, **changes), "--resume"]) == 0
    assert len(read_metrics(whole)) == 4 and read_metrics(parted) == read_metrics(whole)
    weights = [AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in (whole, parted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = AutoModelForCausalLM.from_pretrained(toy).state_dict()
    changed = [name for name in start if not torch.equal(start[name], weights[0][name])]
    linear = [name for name in start if ".layers." in name and start[name].ndim == 2]
    assert changed == linear if changes else len(changed) == len(start)
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_resuming_an_older_checkpoint_repeats_its_steps(toy, tmp_path):
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run)) == 0
    before = read_metrics(run)
    for path in (run / "checkpoints" / "step_000004").iterdir():
        path.unlink()
    (run / "checkpoints" / "step_000004").rmdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # as a crash leaves it
    assert oisd.main([*toy_arguments(toy, run), "--resume"]) == 0
    assert read_metrics(run) == before


def test_stopped_before_the_first_update_is_not_started(toy, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert oisd.main(toy_arguments(toy, whole, num_steps=2)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(oisd, "score", lambda run, rollouts: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
        assert oisd.main(toy_arguments(toy, stopped, num_steps=2)) == 128 + signal.SIGTERM
    assert "no checkpoint yet" in capsys.readouterr().err and oisd.checkpoints(stopped) == []
    assert oisd.main([*toy_arguments(toy, stopped, num_steps=2), "--resume"]) == 0
    assert read_metrics(stopped) == read_metrics(whole)


def test_what_a_run_leaves(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=3, eval_samples=8)) == 0
    shown = capsys.readouterr().out
    assert "<user>" in shown and "trained model:" in shown  # the first rendered prompt; the last line
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    required = (
        "step reward policy_loss think_loss attention_loss think_js attention_js grad_norm entropy student_entropy "
        "response_length truncated_fraction zero_std_fraction sampler_logprob_gap tokens_per_second seconds "
        "think_js_positive think_js_negative attention_js_positive attention_js_negative"
    )
    assert all(set(required.split()) <= set(row) for row in metrics) and [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert 0 <= row["reward"] <= 1 and 0 < row["think_js"] < oisd.LN2 and 0 < row["entropy"] < math.log(26)
        assert row["sampler_logprob_gap"] < 1e-4
    rollouts = [json.loads(line) for line in (run / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 32 and {r["reward"] for r in rollouts} == {0.0, 1.0}
    assert sum(r["reward"] for r in rollouts) / 32 == metrics[0]["reward"]
    assert all(len({r["row"] for r in rollouts[i : i + 8]}) == 1 for i in range(0, 32, 8))  # groups of one problem
    assert len({r["response"] for r in rollouts[:8]}) > 1 and metrics[0]["zero_std_fraction"] < 1
    for r in rollouts:  # what was written is what was graded
        answer = json.loads((toy / "train.jsonl").read_text().splitlines()[r["row"]])["answer"]
        assert r["reward"] == (f"\\boxed{{{answer}}}" in r["response"]) and (r["advantage"] > 0) <= (r["reward"] == 1)
    assert (run / "curves.png").stat().st_size > 10_000
    assert oisd.load_config(["--config", f"{run / 'config.toml'}:tiny"])[1].num_steps == 3
    final = AutoModelForCausalLM.from_pretrained(run / "final")
    assert final.dtype == torch.float32 and len(AutoTokenizer.from_pretrained(run / "final")) == len(tiny.VOCABULARY)
    assert oisd.main(toy_arguments(toy, run, num_steps=3)) == 2  # never into a folder that holds a run
    assert "already holds a run" in capsys.readouterr().err
    assert oisd.main([*toy_arguments(toy, run, num_steps=4, seed=1), "--resume"]) == 2
    assert "seed = 1, but the run" in capsys.readouterr().err


def test_a_model_learns(toy, tmp_path):
    """From a third right to nearly all, where every sum is 2: the sign of the policy's gradient in the program."""
    problems = [{"question": f"{a}+{2 - a}", "answer": "2"} for a in range(3)] * 8
    (tmp_path / "twos.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    data = {"train_data": tmp_path / "twos.jsonl", "test_data": tmp_path / "twos.jsonl"}
    assert oisd.main(toy_arguments(toy, tmp_path / "run", num_steps=12, eval_samples=8, **data)) == 0
    scores = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert scores["0"]["avg"]["value"] < 0.5 and scores["12"]["avg"]["value"] > 0.8, scores


def start_run(arguments):
    command = [sys.executable, str(ROOT / "oisd.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(toy, tmp_path, number):
    run = tmp_path / "run"
    process = start_run(toy_arguments(toy, run, num_steps=10_000, checkpoint_every=0))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, shown
    assert "go on with: python oisd.py --config" in shown and "Traceback" not in shown
    steps = len(read_metrics(run))
    assert [path.name for path in oisd.checkpoints(run)] == [f"step_{steps:06d}"]
    assert oisd.main([*toy_arguments(toy, run, num_steps=steps + 1, checkpoint_every=0), "--resume"]) == 0
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 2))


def test_half_written_checkpoints_are_passed_over(toy, tmp_path):
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=2)) == 0
    (run / "checkpoints" / "step_000009.part").mkdir()
    assert [path.name for path in oisd.checkpoints(run)] == ["step_000002"]


def test_wrong_weights_in_the_sampler_stop_the_run(toy, tmp_path, monkeypatch, capsys):
    other, _ = oisd.load_model(oisd.load_config(toy_arguments(toy, tmp_path))[1])
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    monkeypatch.setattr(oisd.HfSampler, "sync", lambda self, model: setattr(self, "model", other))
    assert oisd.main(toy_arguments(toy, tmp_path / "run")) == 1
    assert "the weights did not arrive" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["toy", "untied_toy"])
def test_vllm_engine_follows_the_trainer(kind, request, tmp_path):
    """A real engine: the trainer's log-probs before and after an update; without the sync the gap is caught."""
    pytest.importorskip("vllm", reason="vLLM is installed on GPUs, or as its CPU build in .ci/run")
    gaps = run_probe(request.getfixturevalue(kind), tmp_path)
    print(kind, gaps)
    assert max(gaps[when] for when in ("loaded", "before", "after")) < 1e-3 and "did not arrive" in gaps["unsynced"]
    assert gaps["distinct"] > 2 and gaps["repeated"]


def test_the_program_with_vllm(toy, tmp_path):
    """Three steps at a learning rate that changes everything: each is sampled from the weights of the one before."""
    pytest.importorskip("vllm", reason="vLLM is installed on GPUs, or as its CPU build in .ci/run")
    run = tmp_path / "run"
    process = start_run(toy_arguments(toy, run, sampler="vllm", num_steps=3, learning_rate=1e-2))
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 0, shown[-3000:]
    assert all(row["sampler_logprob_gap"] < 1e-3 for row in read_metrics(run))


# ---------------------------------------------------------------------------------------------------------------------
# Two processes: real FSDP2 over gloo
# ---------------------------------------------------------------------------------------------------------------------

TWO_RANKS = """
import json, sys, oisd
from accelerate import Accelerator
Accelerator.end_training = lambda self: None  # the group serves all runs
for words in json.loads(sys.argv[1]):
    assert oisd.main(words) == 0, words
"""
RUNS = {  # name: toy, settings
    "tied": ("toy", {}),
    "untied": ("untied_toy", {}),
    "tied, checkpointed": ("toy", {"gradient_checkpointing": "true"}),
    "untied, checkpointed": ("untied_toy", {"gradient_checkpointing": "true"}),
    # 3 prompts for two ranks, and an odd number of micro-batches; held out, 7 problems in batches of 2
    "unequal": ("toy", {"prompts_per_step": 3, "mini_batch_prompts": 1, "max_tokens_per_gpu": 40, "sampler_batch": 2}),
    "adapters": ("toy", {"lora_rank": 4, "learning_rate": 1e-2}),
}


def launch(program, *arguments, **settings):
    """Two processes by torchrun, as a Popen; `program` is a file or source text."""
    file = Path(tempfile.mkdtemp()) / "program.py"
    file.write_text(program.read_text() if isinstance(program, Path) else program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], **pipes, env=env, cwd=file.parent, **settings)


def without_last_checkpoint(source, target):
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step_000004")
    return target


@pytest.fixture(scope="session")
def one_and_two(request, tmp_path_factory):
    """Every one of RUNS by one process and by two: -> folder with a `1 name` and a `2 name` for each."""
    folder, words = tmp_path_factory.mktemp("ranks"), {}
    for name, (toy, changes) in RUNS.items():
        toy = request.getfixturevalue(toy)
        words[name] = toy_arguments(toy, folder / f"2 {name}", **changes)
        assert oisd.main(toy_arguments(toy, folder / f"1 {name}", **changes)) == 0
    parted = without_last_checkpoint(folder / "1 tied", folder / "2 after 1")
    runs = [*words.values(), [*toy_arguments(request.getfixturevalue("toy"), parted), "--resume"]]
    process = launch(TWO_RANKS, json.dumps(runs))
    shown = process.communicate(timeout=400)[0]
    assert process.returncode == 0, shown
    return folder


def assert_same_run(one, other):
    """Metrics and exported weights, to single precision: a sum over two ranks rounds otherwise than one over all."""
    for a, b in itertools.zip_longest(read_metrics(one), read_metrics(other)):
        a.pop("sampler_logprob_gap"), b.pop("sampler_logprob_gap")
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (one, other)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)
    differences = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]]
    print(f"{one.name} against {other.name}: weights differ by at most {max(differences):.2g}")


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(one_and_two, name):
    """Rollouts, every loss, the gradient norm and the weights after four steps of two updates each."""
    assert_same_run(one_and_two / f"1 {name}", one_and_two / f"2 {name}")


GROUP_OF_ONE = """
import sys, torch.distributed as dist, oisd
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sys.exit(oisd.main(sys.argv[1:]))
"""


def test_one_sharded_process_is_a_plain_one(toy, one_and_two, tmp_path):
    """What runs on a single GPU."""
    command = [sys.executable, "-c", GROUP_OF_ONE, *toy_arguments(toy, tmp_path / "run")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    assert_same_run(one_and_two / "1 tied", tmp_path / "run")


def test_saved_by_two_resumed_by_one_and_the_reverse(toy, one_and_two, tmp_path):
    assert_same_run(one_and_two / "1 tied", one_and_two / "2 after 1")
    parted = without_last_checkpoint(one_and_two / "2 tied", tmp_path / "1 after 2")
    assert oisd.main([*toy_arguments(toy, parted), "--resume"]) == 0
    assert_same_run(one_and_two / "2 tied", parted)


SHARDED = """
import os, oisd, torch, sys
from torch.distributed.tensor import DTensor
name, config = oisd.load_config(sys.argv[1:])
run = oisd.prepare(name, config)
parameters = list(run.model.parameters())
assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)
local, whole = (sum(p.numel() for p in ps) for ps in ([p.to_local() for p in parameters], parameters))
assert abs(local / whole - 0.5) < 0.01, (local, whole)
rollouts = oisd.sample_and_grade(run, run.problems[:4], 2, "train", 0)
oisd.score(run, rollouts)
for rollout in rollouts:
    rollout.advantage = 1.0
alone = oisd.backward(run, rollouts[:1], 1000)  # one rollout: the other rank's micro-batch is empty
assert alone["policy_loss"] != 0 and all(p.grad is not None for p in parameters)
norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9).full_tensor().item()
mine = [rollout.response_ids for rollout in rollouts]
assert oisd.gather([mine])[0] == mine  # all know all
oisd.say(f"norm {norm!r}")
run.accelerator.end_training()
"""


def test_ranks_hold_half_each_and_may_have_nothing_to_do(toy, tmp_path):
    process = launch(SHARDED, *toy_arguments(toy, tmp_path / "run"))
    shown = process.communicate(timeout=100)[0]
    assert process.returncode == 0, shown
    _, config = oisd.load_config(toy_arguments(toy, tmp_path / "alone"))
    run = oisd.prepare("alone", config)
    rollouts = oisd.sample_and_grade(run, run.problems[:4], 2, "train", 0)
    oisd.score(run, rollouts)
    rollouts[0].advantage = 1.0
    oisd.backward(run, rollouts[:1], 1000)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e9).item()
    run.grader.close()
    assert float(re.search(r"norm (\S+)", shown)[1]) == pytest.approx(norm, rel=1e-5)


DYING = """
import sys, oisd
log_metrics = oisd.log_metrics
def fail(run, metrics):
    log_metrics(run, metrics)
    if oisd.rank() == 1 and run.state["step"] == 2:
        raise MemoryError("no room left on this rank")
oisd.log_metrics = fail if sys.argv.pop(1) == "error" else log_metrics
oisd.program()
"""


@pytest.mark.parametrize("cause", ["error", "kill", "terminate"])
def test_a_rank_that_dies_takes_the_run_down(toy, tmp_path, cause):
    """Within a minute, with its own error shown; a SIGTERM to the launcher ends in a checkpoint by both."""
    folder = tmp_path / "run"
    words = toy_arguments(toy, folder, num_steps=1000, checkpoint_every=0, test_data="")
    process = launch(DYING, cause, *words)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    start = time.monotonic()
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    if cause == "kill":
        os.kill(children[-1], signal.SIGKILL)
    elif cause == "terminate":
        process.terminate()
    shown = process.communicate(timeout=60)[0]
    print(f"{cause}: over after {time.monotonic() - start:.1f} s")
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in children)
    if cause == "error":
        assert "MemoryError: no room left on this rank" in shown
    if cause == "terminate":
        assert "go on with: accelerate launch oisd.py" in shown, shown[-3000:]
        state = json.loads(next(folder.glob("checkpoints/step_*/state.json")).read_text())
        assert state["step"] == len(read_metrics(folder))


def test_two_ranks_with_an_engine_each(toy, tmp_path):
    """Different rollouts by rank, log-probs that agree after every update, an export that vLLM loads."""
    pytest.importorskip("vllm", reason="vLLM is installed on GPUs, or as its CPU build in .ci/run")
    folder = tmp_path / "run"
    changes = {"sampler": "vllm", "num_steps": 3, "learning_rate": 1e-2, "rollouts_every": 1, "test_data": ""}
    process = launch(ROOT / "oisd.py", *toy_arguments(toy, folder, **changes))
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 0, shown[-3000:]
    assert all(row["sampler_logprob_gap"] < 1e-3 for row in read_metrics(folder))
    rollouts = [json.loads(line) for line in (folder / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    ranks = [[rollout["response"] for rollout in half] for half in (rollouts[:16], rollouts[16:])]
    assert len(rollouts) == 32 and ranks[0] != ranks[1] and len({tuple(part) for part in ranks}) == 2
    shutil.copy(toy / "train.jsonl", folder / "final")
    assert run_probe(folder / "final", tmp_path)["loaded"] < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def shape(tmp_path_factory):
    """The config of a model of 21 M parameters, without weights."""
    folder = tmp_path_factory.mktemp("shape")
    large = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096}
    Qwen3Config(**large, **heads, tie_word_embeddings=False, dtype="float32").save_pretrained(folder)
    return folder


def plan_words(shape, **changes):
    fields = {"model": shape, "max_response_tokens": 256, "max_tokens_per_gpu": 1024} | changes
    return ["--config", f"{ROOT / 'configs.toml'}:tiny", *(f"--{name}={value}" for name, value in fields.items())]


@pytest.fixture(scope="session")
def planned(shape):
    return functools.cache(lambda gpus=1, **changes: plan.plan(oisd.load_config(plan_words(shape, **changes))[1], gpus))


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is a measure with glibc's allocator only")
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": "true"}], ids=["plain", "checkpointed"])
def test_planned_memory_is_what_a_step_takes(shape, planned, changes):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    command = [sys.executable, ROOT / "tools" / "bench.py", "memory", "--side", "measured"]
    command += plan_words(shape, **changes)
    measured = int(subprocess.run(command, env=env, capture_output=True, check=True).stdout.split()[1])
    print(f"{changes}: planned {planned(**changes).training / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert planned(**changes).training == pytest.approx(measured, rel=0.15)


def test_planned_parts_are_arithmetic(planned):
    layer = 512 * (8 + 2 * 4 + 8) * 64 + 3 * 512 * 1536 + 2 * 512 + 2 * 64
    parameters = 4 * layer + 2 * 8000 * 512 + 512
    for gpus in (1, 4):
        found = planned(gpus)
        assert found.parts["parameters"] == pytest.approx(4 * parameters / gpus, rel=0.01)
        assert found.parts["optimizer"] == pytest.approx(8 * parameters / gpus, rel=0.01)
        assert found.parts["gradients"] >= 4 * parameters / gpus * 0.7 and sum(found.parts.values()) == found.training
        assert found.resident == found.parts["parameters"] + found.parts["optimizer"]
        assert all(size >= 0 for size in found.parts.values())
    # Three responses of 256 tokens and one of 128, 32 more of each the prompt. A quarter of the work is scoring, one
    # the forward pass, two the backward pass; in training two products with the head forward and four backward.
    dense = 2 * 4 / 3 * (3 * 4 * layer * 1024 + 6 * 8000 * 512 * (3 * 256 + 128))
    attention = 4.5 * 2 * 4 * 512 * (3 * 288**2 + 160**2)  # causal: 2 H d T^2 forward, 2.5 times that backward
    assert found.flops == pytest.approx((dense + attention) / 1024 * found.tokens, rel=0.02)


def test_adapters_need_less(planned):
    all_weights, adapters = planned(4), planned(4, lora_rank=8)
    assert all(adapters.parts[part] < all_weights.parts[part] / 10 for part in ("optimizer", "gradients"))
    assert all_weights.training - adapters.training > 0.9 * 12 / 4 * 20e6  # gradient and moments of a quarter of them
    offloaded = planned(4, cpu_offload="true")
    assert offloaded.host == pytest.approx(16 * 5.2e6, rel=0.02) and offloaded.resident == 0
    assert offloaded.training == all_weights.training - offloaded.host


def test_the_plan_says_what_to_turn(shape, planned, capsys, monkeypatch):
    words, found = plan_words(shape, sampler="vllm"), planned(4)
    monkeypatch.setattr(plan, "plan", lambda config, gpus: found if gpus == 4 else None)
    assert oisd.main([*words, "--plan", "2x2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("card: yes") == 4 and all(part in shown for part in found.parts)
    config = dataclasses.replace(oisd.load_config(words)[1], gradient_checkpointing=True)
    for changes, message in (
        ({"training": 23e9, "parts": found.parts | {"activations, rest": 20e9}}, "a smaller max_tokens_per_gpu"),
        ({"training": 23e9, "parts": found.parts | {"logits chunk": 20e9}}, "a smaller lens_chunk_tokens"),
        ({"training": 23e9, "parts": found.parts | {"optimizer": 22e9}}, "more GPUs, lora_rank"),
        ({"resident": 15e9}, "vllm_memory at most 0.31"),
        ({"vllm_least": 12e9}, "vllm_memory at least 0.50"),
    ):
        assert message in plan.verdicts(dataclasses.replace(found, **changes), config)[24]
    for gpus in ("0", "x2", "2x", "four"):
        assert oisd.main([*words, "--plan", gpus]) == 2
        assert "name the GPUs" in capsys.readouterr().err


def run_probe(folder, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    probe = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env=env)
    assert probe.returncode == 0, probe.stdout[-3000:] + probe.stderr[-3000:]
    return json.loads(probe.stdout.strip().splitlines()[-1])


def probe_vllm(folder):
    """Run in a process of its own, as engines do not leave one cleanly; prints the gaps as JSON."""
    config, _, end_ids, prompts = toy_sampler(Path(folder))
    config = dataclasses.replace(config, sampler="vllm")
    model, _ = oisd.load_model(config)
    tapped = oisd.TappedModel(model, config).eval()
    sampler = oisd.VllmSampler(config, end_ids, torch.device("cpu"))

    def gap():
        rollouts = oisd.in_order(sampler.stream(prompts * 8, list(range(len(prompts) * 8))))
        with torch.no_grad():
            trainer = tapped(oisd.pack(rollouts, config), score_only=True)["logprobs"]
        differences = trainer - torch.tensor([value for r in rollouts for value in r.sampler_logprobs])
        return differences.abs().max().item(), [r.response_ids for r in rollouts]

    loaded, _ = gap()
    sampler.sync(model)
    long = [(prompts[0] * 5)[:32]] * 300  # more tokens than the engine takes at once, each request with a seed
    assert len(oisd.in_order(sampler.stream(long, list(range(300))))) == 300
    before, responses = gap()
    repeated = gap()[1] == responses
    with torch.no_grad():  # an update of every weight, embeddings and norms among them
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    run = run_of(model, config)
    try:
        unsynced = oisd.score(run, oisd.in_order(sampler.stream(prompts * 8, list(range(len(prompts) * 8)))))
    except oisd.TrainingError as problem:
        unsynced = str(problem)
    sampler.sync(model)
    after, _ = gap()
    numbers = {"loaded": loaded, "before": before, "unsynced": unsynced, "after": after}
    print(json.dumps(numbers | {"distinct": len(set(map(tuple, responses))), "repeated": repeated}))


if __name__ == "__main__":
    probe_vllm(sys.argv[1])
