"""`pytest test_oisd.py`: why the losses can be believed. On a CPU, in 15 seconds.

It opens with `objective_by_hand`, the paper's complete loss in plain autograd, which the program
must match to 1e-12. Then come closed-form gradients, the lens pass, attention, advantages,
invariances and the response mask. Models are tiny and random. `tests/` has everything else.
"""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import oisd
from support import models
from support.kernels import LN2

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "head_dim": 8,
}
FAMILIES = {"qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}
CONFIG = oisd.Config(
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
# Transformers computes norms, rotary angles and eager softmax in float32 whatever the dtype, so two
# routes through a model agree to single precision.
SINGLE = {"rtol": 1e-4, "atol": 1e-6}


# ---- The objective, Eq. 2 to 11, written out -----------------------------------------------------


def objective_by_hand(model, rollouts, config):
    """Eq. 11: L_GRPO is a mean over tokens; the internal losses are means over rollouts."""
    parts = [losses_by_hand(model, rollout, config) for rollout in rollouts]
    grpo, think, attention = (torch.stack(losses) for losses in zip(*parts))
    R = len(rollouts)
    T = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    S = T.clamp(max=config.attention_steps)
    token_share = step_share = torch.full((R,), 1 / R)
    if config.internal_mean == "token":  # our option
        token_share, step_share = T / T.sum(), S / S.sum()
    loss = config.policy_weight * grpo.sum() / T.sum()
    loss = loss + config.think_weight * (token_share * think).sum()
    return loss + config.attention_weight * (step_share * attention).sum()


def losses_by_hand(model, rollout, config):
    """Eq. 2 to 10 for one rollout: -> sum of GRPO's loss over its tokens, L_think and L_attn."""
    h, q, k = layers_by_hand(model, rollout)
    inner, L = config.student_layer, len(h)
    M = len(rollout.prompt_ids)
    context = slice(M - 1, -1)  # the last position of each context predicts the next token
    E_u, LN, tau = model.lm_head.weight, model.model.norm, config.distill_temperature
    z = LN(h[L][context]) @ E_u.T  # Eq. 3

    # GRPO: the clipped surrogate with a dual clip
    targets = torch.tensor(rollout.response_ids)[:, None]
    logprobs = (z / config.temperature).log_softmax(-1).gather(1, targets)[:, 0]
    ratio = (logprobs - rollout.old_logprobs).exp()
    A = rollout.advantage
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    if A < 0:
        surrogate = surrogate.clamp(min=config.dual_clip * A)

    # What to think, Eq. 5 to 7
    A = max(-config.advantage_clip, min(config.advantage_clip, A))
    lens_E_u, lens_LN = E_u, LN
    if config.lens_grad == "hidden":  # the student's gradient stops at h^l
        frozen = {"normalized_shape": (32,), "weight": LN.weight.detach(), "eps": LN.eps}
        lens_E_u, lens_LN = E_u.detach(), functools.partial(F.rms_norm, **frozen)
    student = lens_LN(h[inner][context]) if config.lens_norm else h[inner][context]
    p = (student @ lens_E_u.T / tau).softmax(-1)
    think = A * js_by_hand(p, (z / tau).softmax(-1).detach())

    # Where to look, Eq. 8 to 10
    attention = []
    for step in oisd.sample_attention_steps(len(rollout.response_ids), config.attention_steps):
        t = M - 1 + step
        K = keys_by_hand(t, config.attention_window, config.attention_strided)
        aligned = []
        for layer in (inner, L):
            scores = q[layer][:, t, None] @ k[layer][:, : t + 1].mT / math.sqrt(8)
            a = scores.softmax(-1)[:, 0, K]  # Eq. 8: (H, |K_t|)
            aligned.append(a / a.sum(-1, keepdim=True))  # Eq. 9
        attention.append(A * js_by_hand(aligned[0], aligned[1].detach()).mean())  # over heads
    return -surrogate.sum(), think.mean(), torch.stack(attention).mean()


def layers_by_hand(model, rollout):
    """Eq. 2: -> by layer, from 1, the residual stream (T, D), queries and keys (H, T, d)."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    T = ids.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    H = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(H, torch.arange(T)[None])
    H = H[0]
    hidden, queries, keys = {}, {}, {}
    for index, layer in enumerate(model.model.layers, 1):
        attention, x = layer.self_attn, layer.input_layernorm(H)
        q = attention.q_norm(attention.q_proj(x).view(T, 4, 8)).transpose(0, 1)
        k = attention.k_norm(attention.k_proj(x).view(T, 2, 8)).transpose(0, 1)
        v = attention.v_proj(x).view(T, 2, 8).transpose(0, 1)
        q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], *rotary))
        k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))  # a key head serves two query heads
        weights = (q @ k.mT / math.sqrt(8)).masked_fill(future, -torch.inf).softmax(-1)
        H = H + attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
        H = H + layer.mlp(layer.post_attention_layernorm(H))
        hidden[index], queries[index], keys[index] = H, q, k
    return hidden, queries, keys


def keys_by_hand(position, window, strided):
    """K_t of Eq. 9: the local window, and up to `strided` keys before it, evenly spaced from 0."""
    local_start = max(0, position + 1 - window)
    stride = max(1, math.ceil(local_start / max(1, strided)))
    return [*[*range(0, local_start, stride)][:strided], *range(local_start, position + 1)]


def js_by_hand(p, q):
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


# ---- Random models and rollouts ----------------------------------------------------------------


def with_config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def random_model(family="qwen3", tied=False, attention="sdpa", dtype=torch.float64, **shape):
    torch.manual_seed(0)
    config = FAMILIES[family](**SHAPE | shape, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for parameter in model.parameters():  # the usual initialization makes everything uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            parameter.data.add_(0.1)
    return model


def exact_model(**settings):
    """Build a Qwen3 whose norms compute in float64, so that two routes agree to 1e-12."""
    model = random_model(**settings)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ == "Qwen3RMSNorm":
                exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


def random_rollouts(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rollouts = []
    for _ in range(count):
        prompt = [draw(0, 61) for _ in range(draw(2, 9))]
        response = [draw(0, 61) for _ in range(draw(1, 30))]
        advantage = float(normal()) * 1.5
        rollouts.append(rollout_of(prompt, response, advantage, -4 + 0.3 * normal(len(response))))
    return rollouts


def rollout_of(prompt, response, advantage, old):
    """A rollout whose sampler and trainer agree on its log-probs."""
    logprobs = old.tolist()
    return oisd.Rollout(prompt, response, logprobs, "stop", advantage=advantage, old_logprobs=old)


def run_of(model, config, optimizer=None):
    """Build as much of a run as an update looks at."""
    tapped = oisd.TappedModel(model, config).train()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    parts = {"model": tapped, "optimizer": optimizer, "accelerator": accelerator}
    return SimpleNamespace(config=config, state={"step": 0}, **parts)


def gradients(model, config, rollouts, max_tokens=10**6):
    """Compute one update with the program: -> losses and sums of metrics, gradients by name."""
    model.zero_grad()
    losses, metrics = oisd.accumulate_gradients(run_of(model, config), rollouts, max_tokens)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return losses | {name: float(pair[0]) for name, pair in metrics.items()}, found


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


READINGS = {
    "paper": {},
    "no norm": {"lens_norm": False, "distill_temperature": 2.0},
    "no gradient to the head": {"lens_grad": "hidden", "temperature": 0.8},
}
WEIGHTS = {
    "grpo": {"think_weight": 0.0, "attention_weight": 0.0},
    "all": {"think_weight": 0.7, "attention_weight": 0.4},
    "think": {"policy_weight": 0.0, "attention_weight": 0.0},
    "attention": {"policy_weight": 0.0, "think_weight": 0.0, "attention_weight": 1.0},
}


@pytest.mark.parametrize("internal_mean", ["rollout", "token"])
@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("reading", READINGS)
def test_the_objective_is_the_papers(float64, monkeypatch, which, internal_mean, reading):
    """Loss and all gradients to 1e-12, in one micro-batch and in five with an empty sixth."""
    config = with_config(**WEIGHTS[which], **READINGS[reading], internal_mean=internal_mean)
    generator = torch.Generator().manual_seed(4)
    rollouts = []
    for count, advantage in ((3, 0.5), (17, -0.75), (200, 1.5), (40, -2.5), (1, 0.3)):
        ids = torch.randint(61, (6 + count,), generator=generator).tolist()
        old = -4 + 0.3 * torch.randn(count, generator=generator)
        rollouts.append(rollout_of(ids[:6], ids[6:], advantage, old))
    model = exact_model(tied=which == "all")
    expected = objective_by_hand(model, rollouts, config)
    expected.backward()
    dense = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    dense = {name: gradient.clone() for name, gradient in dense.items()}

    found, mine = gradients(model, config, rollouts)
    monkeypatch.setattr(oisd, "my_micro_batches", lambda *_: [[4], [2], [0], [3], [1], []])
    found_split, split = gradients(model, config, rollouts)
    torch.testing.assert_close(split, mine, rtol=1e-12, atol=1e-13)
    assert found_split == pytest.approx(found, rel=1e-12)
    dense |= {name: torch.zeros_like(mine[name]) for name in mine.keys() - dense.keys()}
    torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)
    losses = ("policy", "think", "attention")
    total = sum(getattr(config, f"{name}_weight") * found[f"{name}_loss"] for name in losses)
    assert math.isclose(total, expected.item(), rel_tol=1e-12)


# ---- Closed forms, Appendix A.3 ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("advantage", [0.6, -0.6, 3.0, -3.0])
def test_the_think_gradient_is_the_closed_form(advantage, temperature):
    """A.3.1: dL/dz = clip(A) / (2 tau N) p (log(p/m) - KL(p||m)); |A| = 3 is clipped to 1."""
    torch.manual_seed(1)
    student = torch.randn(6, 17, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 17, dtype=torch.float64)
    js = oisd.js_divergence(student, teacher, temperature)
    advantages = torch.full((6,), advantage, dtype=torch.float64)
    (oisd.internal_loss_sum(js, advantages, torch.ones(6), CONFIG) / 6).backward()
    p, q = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    m = (p + q) / 2
    kl = (p * (p / m).log()).sum(-1, keepdim=True)
    clipped = max(-1, min(1, advantage))
    expected = clipped / (2 * temperature * 6) * p * ((p / m).log() - kl)
    torch.testing.assert_close(js.detach(), js_by_hand(p, q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-14)


def random_tap(H=4, Q=2, T=9, d=8):
    tap = oisd.Tap()
    query = torch.randn(1, H, T, d, dtype=torch.float64, requires_grad=True)
    tap.see(query, torch.randn(1, Q, T, d, dtype=torch.float64, requires_grad=True))
    return tap


NINE = oisd.Rollout([1, 2, 3], [4] * 6, [-1.0] * 6, "stop", advantage=1.0)  # nine tokens


@pytest.mark.parametrize("advantage", [0.6, -0.6, 3.0, -3.0])
def test_the_attention_gradient_is_the_closed_form(advantage):
    """A.3.2: d/d score = clip(A) / (2 H S) a (log(a/m) - KL(a||m)); dq and dk follow from q k."""
    torch.manual_seed(2)
    student, teacher = random_tap(), random_tap()
    config = with_config(attention_steps=3, attention_window=3, attention_strided=2)
    batch = oisd.pack([NINE], config)
    js = oisd.attention_js(student, teacher, batch, config, chunk=2)
    advantages = torch.full((3,), advantage, dtype=torch.float64)
    (oisd.internal_loss_sum(js, advantages, torch.ones(3), CONFIG) / 3).backward()
    query_grad, key_grad = torch.zeros_like(student.query[0]), torch.zeros_like(student.key[0])
    clipped = max(-1, min(1, advantage))
    for t in batch.queries.tolist():
        K = keys_by_hand(t, 3, 2)
        for h in range(4):
            g = h // 2  # the key head of this query head
            taps = (student, teacher)
            scores = [tap.query[0, h, t] @ tap.key[0, g, K].T * 8**-0.5 for tap in taps]
            a, b = (score.detach().softmax(-1) for score in scores)
            m = (a + b) / 2
            kl = (a * (a / m).log()).sum()
            by_score = clipped / (2 * 4 * 3) * a * ((a / m).log() - kl)
            query_grad[h, t] += by_score @ student.key[0, g, K].detach() * 8**-0.5
            key_grad[g, K] += by_score[:, None] * student.query[0, h, t].detach() * 8**-0.5
    torch.testing.assert_close(student.query.grad[0], query_grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(student.key.grad[0], key_grad, rtol=1e-10, atol=1e-14)
    assert teacher.query.grad is None and teacher.key.grad is None


def test_no_gradient_reaches_the_teacher():
    """With every ratio clipped, only the internal losses train: layers up to the student's."""
    config = with_config(attention_weight=1.0, lens_grad="hidden", clip_low=0.0, clip_high=0.0)
    model, rollouts = random_model(), random_rollouts()
    for rollout in rollouts:
        far = -1e3 if rollout.advantage > 0 else 1e3
        rollout.old_logprobs = torch.full_like(rollout.old_logprobs, far)
    _, found = gradients(model, config, rollouts)
    learning = {name for name, gradient in found.items() if gradient.any()}
    above = ("layers.2", "layers.3", "lm_head", "model.norm")
    assert learning and not any(part in name for name in learning for part in above)
    assert all(any(f"layers.{i}.mlp" in name for name in learning) for i in (0, 1))


# ---- The lens and the pass over the vocabulary ---------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_layer_gives_the_models_logits(family, tied):
    model = random_model(family, tied, dtype=torch.float32)
    tapped = oisd.TappedModel(model, CONFIG)
    tapped.taps[-1].recording = True
    logits = model(input_ids=torch.arange(40)[None], use_cache=False).logits
    assert torch.equal(tapped.lens(tapped.taps[-1].hidden), logits)  # bit for bit
    oisd.check(tapped)


def lens_inputs(seed=3, D=12, V=61):
    """Random hidden states of both layers (N, D), a head (V, D), and a batch of N tokens."""
    torch.manual_seed(seed)
    batch = oisd.pack(random_rollouts(3), CONFIG)
    batch.sampler_logprobs = batch.old_logprobs - 0.3 * torch.randn(len(batch.target_ids))
    N = len(batch.target_ids)
    shapes = ((N, D), (N, D), (V, D))
    return *(torch.randn(shape, dtype=torch.float64) for shape in shapes), batch


def dense_stats(final, student, head, batch, config):
    """Log-probs, entropy, JS and student entropy, (N,) each, from full logits."""
    T, tau = config.temperature, config.distill_temperature
    exact = torch.promote_types(final.dtype, torch.float32)  # under autocast logits are bfloat16
    final_logits, student_logits = (F.linear(x, head).to(exact) for x in (final, student))
    p, q = (student_logits / tau).softmax(-1), (final_logits / tau).softmax(-1).detach()
    policy = (final_logits / T).softmax(-1)
    entropy, student_entropy = (-(x * x.log()).sum(-1) for x in (policy, p))
    logprobs = policy.log().gather(1, batch.target_ids[:, None])[:, 0]
    return logprobs, entropy, js_by_hand(p, q), student_entropy


def dense_loss(final, student, head, batch, config):
    logprobs = dense_stats(final, student, head, batch, config)[0]
    student_head = head if config.lens_grad == "all" else head.detach()
    js = oisd.js_divergence(
        F.linear(student, student_head), F.linear(final, head), config.distill_temperature
    )
    old = batch.old_logprobs
    weights = oisd.importance_weights(old, batch.sampler_logprobs, config.importance_cap)
    policy = oisd.policy_loss_sum(logprobs, old, batch.advantages, config, weights)
    think = oisd.internal_loss_sum(js, batch.advantages, batch.token_scales, config)
    return policy + config.think_weight * think


@pytest.mark.parametrize(
    "chunk,changes",
    [
        (1, {}),
        (5, {"temperature": 0.6, "importance_cap": 1.1}),
        (5, {"distill_temperature": 2.0, "think_weight": 0.5}),
        (1000, {"think_weight": 0.0}),
    ],
)
def test_the_chunked_lens_pass_is_the_dense_one(chunk, changes):
    config = with_config(lens_chunk_tokens=chunk, **changes)
    *inputs, batch = lens_inputs()
    leaves, dense = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = dense_loss(*dense, batch, config)
    expected.backward()
    loss, policy, think, *stats = oisd.LensPass.apply(*leaves, batch, config)
    (3 * loss).backward()
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(policy + config.think_weight * think, expected.detach(), **close)
    torch.testing.assert_close(loss, expected, **close)
    for mine, theirs in zip(leaves, dense):
        torch.testing.assert_close(mine.grad, 3 * theirs.grad, rtol=1e-9, atol=1e-11)
    for mine, theirs in zip(stats, dense_stats(*inputs, batch, config)):
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scoring_has_the_bits_of_training_and_no_student_means_grpo(temperature):
    config = with_config(temperature=temperature, think_weight=0.0)
    final, student, head, batch = lens_inputs()
    inputs = final.requires_grad_(), student, head, batch, config
    logprobs, entropy = oisd.LensPass.apply(*inputs)[3:5]
    scored = oisd.read_tokens(final, head, batch.target_ids, config)
    assert torch.equal(scored[0], logprobs) and torch.equal(scored[1], entropy)
    loss, policy, think, alone, _, js, _ = oisd.LensPass.apply(final, None, head, batch, config)
    assert torch.equal(loss, policy) and torch.equal(alone, logprobs)
    assert think == 0 and not js.any()
    loss.backward()
    leaf = final.detach().requires_grad_()
    dense_loss(leaf, student, head, batch, config).backward()
    torch.testing.assert_close(final.grad, leaf.grad, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_no_further_from_the_truth_than_plain_autograd():
    """Under autocast, against float64: the errors of gradients and log-probs."""
    config = with_config(temperature=0.7, dtype="bfloat16")
    *inputs, batch = lens_inputs(5, D=32)
    truth = [x.clone().requires_grad_() for x in inputs]
    old = dense_stats(*truth, batch, config)[0].detach()
    batch = dataclasses.replace(batch, old_logprobs=old, sampler_logprobs=old)
    dense_loss(*truth, batch, config).backward()
    mine, plain = ([x.float().requires_grad_() for x in inputs] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _, logprobs, *_ = oisd.LensPass.apply(*mine, batch, config)
        loss.backward()
        dense_loss(*plain, batch, config).backward()
        plain_logprobs = dense_stats(*plain, batch, config)[0]
    for ours, theirs, exact in zip(mine, plain, truth):
        error, limit = (ours.grad - exact.grad).norm(), (theirs.grad - exact.grad).norm()
        assert error <= 1.1 * limit < 0.1 * exact.grad.norm()
    error = (logprobs - old).abs().max()
    assert 1e-3 < error <= 1.1 * (plain_logprobs - old).abs().max()  # it does compute in bfloat16


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_change_no_bit(family, count):
    """With `count` of four layers recomputed; these layers alone run twice."""
    config, rollouts = with_config(attention_weight=1.0), random_rollouts()
    expected = gradients(random_model(family), config, rollouts)
    model, calls = random_model(family), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    models.recompute_some(model, count)
    for index, layer in enumerate(model.model.layers):
        seen = functools.partial(lambda index, *_: calls.append(index), index)
        layer.input_layernorm.register_forward_pre_hook(seen)
    found, mine = gradients(model, config, rollouts)
    twice = [index for index in range(4) if calls.count(index) == 2]
    assert twice == {1: [3], 3: [1, 2, 3], 4: [0, 1, 2, 3]}[count]
    assert found == expected[0]
    torch.testing.assert_close(mine, expected[1], rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remember the most elements of any operation's result, views aside."""

    elements = 0

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
    rollout = rollout_of([1, 2], [5] * 400, 0.5, torch.full((400,), -7.0))
    tapped = oisd.TappedModel(model, config)
    with LargestTensor() as largest:
        sums = tapped(tapped.losses, oisd.pack([rollout], config))
        (sums.token_loss + sums.step_loss).backward()
    assert largest.elements <= model.lm_head.weight.numel() < min(400 * 400, 400 * 2000)


# ---- Attention: keys, kernels, packed rows -------------------------------------------------------


@pytest.mark.parametrize("window,strided", [(1, 0), (4, 0), (4, 3), (3, 1), (64, 64), (2, 7)])
def test_sampled_keys_are_a_window_and_evenly_spaced_keys_before_it(window, strided):
    keys, valid = oisd.sample_attention_keys(torch.arange(200), window, strided)
    for position in range(200):
        chosen = keys[position][valid[position]].tolist()
        assert chosen == keys_by_hand(position, window, strided)
        assert len(chosen) <= window + strided
    assert oisd.sample_attention_keys(torch.tensor([9]), 3, 2)[0].tolist() == [[0, 4, 7, 8, 9]]


def test_sampled_decoding_steps_are_even_and_unique():
    assert oisd.sample_attention_steps(3, 64) == [0, 1, 2]
    steps = oisd.sample_attention_steps(1000, 64)
    assert len(steps) == 64 and {b - a for a, b in itertools.pairwise(steps)} == {15, 16}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone_is_padded(family):
    rollouts, model = random_rollouts(), random_model(family)
    twin = rollouts[0].response_ids[::-1]  # neighbors of equal length share a call
    rollouts.insert(1, dataclasses.replace(rollouts[0], response_ids=twin))
    tapped = oisd.TappedModel(random_model(family), CONFIG)

    def score(rollouts):
        return tapped(tapped.response_logprobs, oisd.pack(rollouts, CONFIG))

    packed = score(rollouts)
    torch.testing.assert_close(packed, torch.cat([score([one]) for one in rollouts]), **SINGLE)
    width = max(rollout.length for rollout in rollouts)
    padded = []
    for rollout in rollouts:  # left padding, the model's own forward pass
        pad = width - rollout.length
        ids = torch.tensor([[0] * pad + rollout.prompt_ids + rollout.response_ids])
        mask = torch.tensor([[0] * pad + [1] * rollout.length])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        settings = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        logits = model(input_ids=ids, **settings).logits[0, pad + len(rollout.prompt_ids) - 1 : -1]
        targets = torch.tensor(rollout.response_ids)[:, None]
        padded.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
    torch.testing.assert_close(packed, torch.cat(padded), **SINGLE)


# ---- Losses and advantages -----------------------------------------------------------------------


def test_the_policy_loss_by_hand():
    """Inside the clip; clipped where that is the pessimistic side; bounded by the dual clip."""
    ratio = torch.tensor([1.0, 1.5, 0.5, 0.5, 1.5, 20.0], dtype=torch.float64)
    advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    expected = -2.0 + -2.4 + -1.0 + 0.8 + 1.5 + 10.0
    logprobs = ratio.log().requires_grad_()
    loss = oisd.policy_loss_sum(logprobs, torch.zeros(6), advantages, CONFIG)
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)
    loss.backward()
    by_hand = torch.tensor([-2.0, 0.0, -1.0, 0.0, 1.5, 0.0], dtype=torch.float64)  # -ratio A or 0
    torch.testing.assert_close(logprobs.grad, by_hand, rtol=1e-12, atol=1e-12)
    clipped = oisd.clipped(logprobs, torch.zeros(6), advantages, CONFIG)
    assert clipped.tolist() == (by_hand == 0).tolist()
    wider = with_config(clip_high=0.4)  # cuts the second token's ratio at 1.4
    higher = oisd.policy_loss_sum(logprobs.detach(), torch.zeros(6), advantages, wider)
    assert math.isclose(higher.item(), expected - 2 * 0.2, rel_tol=1e-12)


@pytest.mark.parametrize("think,attention", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_measuring_js_changes_no_gradient(think, attention):
    found = {}
    for measure in (True, False):
        weights = {"think_weight": think, "attention_weight": attention}
        config = with_config(**weights, measure_js=measure)
        found[measure] = gradients(random_model(), config, random_rollouts())
    torch.testing.assert_close(found[False][1], found[True][1], rtol=0, atol=0)
    trained, measured = found[False][0], found[True][0]
    assert trained.items() <= measured.items() and {"think_js", "attention_js"} <= measured.keys()
    assert ("think_js" in trained, "attention_js" in trained) == (think > 0, attention > 0)


def test_importance_weights_are_truncated_ratios():
    trainer, sampler = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5])
    weights = oisd.importance_weights(trainer, sampler, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-0.5)]))
    assert torch.equal(oisd.importance_weights(trainer, sampler, 0.0), torch.ones(3))


def test_js_is_bounded_symmetric_and_zero_for_equals():
    torch.manual_seed(4)
    one, other = 5 * torch.randn(2, 50, 20)
    js = oisd.js_divergence(one, other)
    assert (js > 0).all() and (js <= LN2).all()
    torch.testing.assert_close(js, oisd.js_divergence(other, one))
    assert oisd.js_divergence(one, one + 3).abs().max() < 1e-6  # a shift of logits changes nothing
    assert torch.equal(oisd.js_divergence(one, one), torch.zeros(50))
    with pytest.raises(ValueError, match="differ"):
        oisd.js_divergence(one, other[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_js_is_finite_for_extreme_logits(dtype):
    far, low = 3e4, -math.inf
    student = torch.tensor([[far, 0, -far], [low, 1, low], [0, low, low]], dtype=dtype)
    teacher = torch.tensor([[-far, 0, far], [low, low, 1], [0, low, low]], dtype=dtype)
    js = oisd.js_divergence(student.requires_grad_(), teacher)
    js.sum().backward()
    expected = torch.tensor([LN2, LN2, 0.0], dtype=js.dtype)
    torch.testing.assert_close(js.detach(), expected)
    assert student.grad.isfinite().all()


def test_group_advantages_are_standardized_and_zero_where_a_group_agrees():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]).double()
    advantages = oisd.group_advantages(rewards, 4)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # sample standard deviation
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]).double() / (std + 1e-6)
    torch.testing.assert_close(advantages[:4], expected)
    assert torch.equal(advantages[4:], torch.zeros(8).double())  # exactly
    equal = torch.full((8,), 0.1)  # whose float32 standard deviation is not 0
    assert torch.equal(oisd.group_advantages(equal, 8), torch.zeros(8))


# ---- Invariances ---------------------------------------------------------------------------------


def test_an_empty_micro_batch_adds_exactly_nothing():
    """A rank without rollouts computes one token; its gradients are zeros, not None."""
    model = random_model()
    tapped = oisd.TappedModel(model, with_config(attention_weight=1.0))
    sums = tapped(tapped.losses, oisd.pack([], CONFIG))
    values = [*sums[:2], *sums.token_parts.values(), *sums.metrics.values()]
    assert not any(value.any() for value in values)
    (sums.token_loss + sums.step_loss).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert tapped(tapped.response_logprobs, oisd.pack([], CONFIG)).shape == (0,)


def test_updates_are_clipped_steps_on_mini_batches():
    """4 prompts x 2 rollouts in mini-batches of 2 prompts: two SGD steps, gradients clipped."""
    config = with_config(prompts_per_step=4, group_size=2, mini_batch_prompts=2, max_grad_norm=0.05)
    rollouts, model, other = random_rollouts(8), random_model(), random_model()
    run = run_of(model, config, torch.optim.SGD(model.parameters(), lr=1.0))
    metrics = oisd.update_policy(run, rollouts)
    norms = []
    for half in (rollouts[:4], rollouts[4:]):
        _, found = gradients(other, config, half)
        norms.append(torch.stack([gradient.norm() for gradient in found.values()]).norm())
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter -= found[name] * 0.05 / norms[-1]
    assert min(norms) > 0.05
    assert metrics["grad_norm"] == pytest.approx(float(sum(norms) / 2), rel=1e-4)
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], **SINGLE)


def test_truncated_responses_can_be_left_out():
    """The update is that of the others alone; without others there is none, not even a decay."""
    config = with_config(group_size=4, mini_batch_prompts=2, mask_truncated=True)
    rollouts, model, other = random_rollouts(8), random_model(), random_model()
    for rollout in rollouts[::2]:
        rollout.finish_reason = "length"
    run = run_of(model, config, torch.optim.SGD(model.parameters(), lr=1.0))
    oisd.update_policy(run, rollouts)
    run = run_of(other, config, torch.optim.SGD(other.parameters(), lr=1.0))
    oisd.update_policy(run, rollouts[1::2])
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], **SINGLE)
    weights = [parameter.clone() for parameter in model.parameters()]
    run = run_of(model, config, torch.optim.AdamW(model.parameters(), weight_decay=1.0))
    assert oisd.update_policy(run, rollouts[::2]) == {}
    assert all(map(torch.equal, weights, model.parameters()))


# ---- The response mask ---------------------------------------------------------------------------


def test_the_response_mask_comes_from_lengths():
    """EOS (1) in a response counts, a pad-like token too, the prompt never."""
    rollouts = [
        oisd.Rollout([1, 5], [7, 1], [-1.0, -2.0], "stop", advantage=0.5),
        oisd.Rollout([9], [1, 1, 0], [-3.0] * 3, "length", advantage=torch.tensor([3.0, 4.0, 5.0])),
    ]
    batch = oisd.pack(rollouts, with_config(attention_steps=2))
    assert batch.input_ids.tolist() == [[1, 5, 7, 1, 9, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.predicted.tolist() == [2, 3, 5, 6, 7]
    assert batch.target_ids.tolist() == [7, 1, 1, 1, 0]
    assert batch.borders.tolist() == [0, 4, 8]
    assert batch.advantages.tolist() == [0.5, 0.5, 3.0, 4.0, 5.0]  # PPO's differ by token
    assert batch.query_advantages.tolist() == [0.5, 0.5, 3.0, 4.0]
    assert batch.queries.tolist() == [1, 2, 4, 5]  # before each rollout's first two tokens
