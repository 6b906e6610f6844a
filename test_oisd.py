"""`pytest test_oisd.py`: on a CPU, in about a minute, why the losses can be believed.

In order: closed-form gradients in float64; exact identities; invariances; what counts as a response token. Models are
tiny and random. The whole program, on one and two processes, is tested in `tests/`.
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
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import inputs
import oisd
from settings import UserError

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "head_dim": 8,
}
FAMILIES = {"qwen3": Qwen3Config, "llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
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


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exact_model(**settings):
    """A model whose norms, unlike Transformers', compute in float64, so that two routes agree to 1e-12."""
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

    rollouts = []
    for _ in range(count):
        prompt, response = [[draw(0, 61) for _ in range(draw(low, high))] for low, high in ((2, 9), (1, 30))]
        advantage = float(torch.randn((), generator=generator, dtype=torch.float64)) * 1.5
        old = -4 + 0.3 * torch.randn(len(response), generator=generator, dtype=torch.float64)
        rollouts.append(oisd.Rollout(prompt, response, old.tolist(), "stop", advantage=advantage, old_logprobs=old))
    return rollouts


def run_of(model, config, **parts):
    """As much of a run as `accumulate_gradients`, `update_policy` and `set_old_logprobs` look at."""
    tapped = oisd.TappedModel(model, config).train()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(config=config, model=tapped, accelerator=accelerator, state={"step": 0}, **parts)


def gradients(model, config, rollouts, max_tokens=10**6):
    """One update's gradients by the program's own `accumulate_gradients`: -> (sums, gradient by parameter)."""
    model.zero_grad()
    sums = oisd.accumulate_gradients(run_of(model, config), rollouts, max_tokens)
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


def keys_by_hand(position, window, strided):
    """K_t of Eq. 9 for one query: the local window, and before it at most `strided` keys, evenly spaced from 0."""
    first_local = max(0, position + 1 - window)
    stride = max(1, math.ceil(first_local / max(1, strided)))
    return [*[*range(0, first_local, stride)][:strided], *range(first_local, position + 1)]


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
    advantages = torch.full((6,), advantage, dtype=torch.float64)
    (oisd.internal_loss_sum(js, advantages, torch.ones(6), CONFIG) / 6).backward()
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
    batch = SimpleNamespace(queries=queries, position_ids=torch.arange(T)[None])
    config = with_config(attention_window=3, attention_strided=2)
    js = oisd.attention_js(student, teacher, batch, config, chunk=2)
    advantages = torch.full((S,), advantage, dtype=torch.float64)
    (oisd.internal_loss_sum(js, advantages, torch.ones(S), CONFIG) / S).backward()
    query_grad, key_grad = torch.zeros(H, T, d, dtype=torch.float64), torch.zeros(Q, T, d, dtype=torch.float64)
    for step, t in enumerate(queries.tolist()):
        K = keys_by_hand(t, 3, 2)
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


def slopes(function, x, h=1e-5):
    """Central differences: -> (*shape of the result, *shape of x)."""
    columns = []
    for index in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[index] = h
        columns.append((function(x + step) - function(x - step)) / (2 * h))
    return torch.stack(columns, dim=-1).unflatten(-1, x.shape)


FINITE = {"rtol": 1e-7, "atol": 1e-9}


def test_the_derivatives_of_the_think_loss_by_finite_differences(float64):
    """Appendix A.3.1, line by line: by p, of the softmax, by z, and through the lens by h."""
    torch.manual_seed(6)
    tau, A = 3.0, torch.tensor([-0.6])
    tapped = oisd.TappedModel(exact_model(), CONFIG)
    E_u, h, q = tapped.head.detach(), torch.randn(32), torch.randn(61).softmax(-1)
    z = tapped.lens(h).detach()
    p = (z / tau).softmax(-1)
    g = (2 * p / (p + q)).log() / 2  # 1/2 log(p/m)
    jacobian = (p.diag() - p.outer(p)) / tau
    by_z = A / tau * p * (g - p @ g)

    @torch.no_grad()
    def loss(z):
        js = oisd.js_divergence(z[None], tau * q.log()[None], tau)
        return oisd.internal_loss_sum(js, A, torch.ones(1), CONFIG)

    torch.testing.assert_close(slopes(lambda p: js_by_hand(p, q), p, h=1e-6), g, **FINITE)
    torch.testing.assert_close(slopes(lambda z: (z / tau).softmax(-1), z), jacobian, **FINITE)
    torch.testing.assert_close(A * (jacobian.T @ g), by_z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes(loss, z), by_z, **FINITE)
    with torch.no_grad():
        by_h = slopes(tapped.lens_hidden, h).T @ E_u.T @ by_z  # J_LN^T E_u^T dL/dz
        torch.testing.assert_close(slopes(lambda h: loss(tapped.lens(h)), h), by_h, **FINITE)


def test_the_derivatives_of_the_attention_loss_by_finite_differences(float64):
    """Appendix A.3.2, line by line: by the attention, of the softmax, by its logits, by queries and keys."""
    torch.manual_seed(7)
    H, T, d, t, A = 2, 9, 4, 8, torch.tensor([0.6])
    student_query, student_key = torch.randn(H, T, d), torch.randn(1, T, d)  # both heads share one key head
    teacher, config = oisd.Tap(), with_config(attention_window=3, attention_strided=2)
    teacher.query, teacher.key, teacher.scaling = torch.randn(1, H, T, d), torch.randn(1, 1, T, d), d**-0.5
    batch = SimpleNamespace(queries=torch.tensor([t]), position_ids=torch.arange(T)[None])

    @torch.no_grad()
    def loss(query, key):
        student = oisd.Tap()
        student.query, student.key, student.scaling = query[None], key[None], d**-0.5
        js = oisd.attention_js(student, teacher, batch, config)
        return oisd.internal_loss_sum(js, A, torch.ones(1), CONFIG)

    C = keys_by_hand(t, 3, 2)
    by_query, by_key = torch.zeros(H, T, d), torch.zeros(1, T, d)
    for h in range(H):
        q, K = student_query[h, t], student_key[0, C]
        s = K @ q / math.sqrt(d)
        p, target = s.softmax(-1), (teacher.key[0, 0, C] @ teacher.query[0, h, t] / math.sqrt(d)).softmax(-1)
        g = (2 * p / (p + target)).log() / (2 * H)
        by_s = A * p * (g - p @ g)
        by_p = slopes(lambda p, target=target: A * js_by_hand(p, target) / H, p)[0]
        torch.testing.assert_close(by_p, A * g, **FINITE)
        torch.testing.assert_close(slopes(lambda s: s.softmax(-1), s), p.diag() - p.outer(p), **FINITE)
        torch.testing.assert_close(slopes(lambda q, K=K: K @ q / math.sqrt(d), q), K / math.sqrt(d), **FINITE)
        by_query[h, t] = K.T @ by_s / math.sqrt(d)
        by_key[0, C] += by_s.outer(q) / math.sqrt(d)
    torch.testing.assert_close(slopes(lambda query: loss(query, student_key), student_query), by_query, **FINITE)
    torch.testing.assert_close(slopes(lambda key: loss(student_query, key), student_key), by_key, **FINITE)


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
        sums = tapped(tapped.losses, batch)
        (sums["token_loss"] + sums["step_loss"]).backward()
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
    tap, ids = tapped.taps[-1], torch.arange(40)[None]
    tap.recording = True
    logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(tapped.lens(tap.hidden), logits)  # bit for bit
    inputs.check_model(tapped)


def test_a_head_that_does_more_than_unembed_is_refused():
    model = random_model(dtype=torch.float32)
    tapped = oisd.TappedModel(model, CONFIG)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: torch.tanh(logits / 5) * 5)  # soft-capping
    with pytest.raises(UserError, match="more than unembed"):
        inputs.check_model(tapped)


def sampled_keys(batch, config):
    """-> key positions in the rollout, which are valid, where each query's rollout starts."""
    positions = batch.position_ids[0, batch.queries]
    keys, valid = oisd.sample_attention_keys(positions, config.attention_window, config.attention_strided)
    return keys, valid, (batch.queries - positions)[:, None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_attention_is_the_renormalised_eager_attention(family, attention):
    rollout = random_rollouts(count=3)
    config = with_config(attention_steps=100)
    reference = random_model(family, attention="eager")
    tapped = oisd.TappedModel(random_model(family, attention=attention), config)
    batch = oisd.pack(rollout, config)
    tapped.hidden_states(batch)
    for tap, layer in ((tapped.student_tap, 1), (tapped.taps[-1], 3)):
        keys, valid, starts = sampled_keys(batch, config)
        sampled = oisd.attention_scores(tap, batch.queries, keys + starts, valid).softmax(-1)  # (S, H, K)
        row = 0
        for one, start in zip(rollout, batch.borders.tolist()):
            ids = torch.tensor([one.prompt_ids + one.response_ids])
            full = reference(input_ids=ids, output_attentions=True, use_cache=False).attentions[layer][0]  # (H, T, T)
            for step in range(len(one.response_ids)):
                query = len(one.prompt_ids) - 1 + step
                keys = keys_by_hand(query, config.attention_window, config.attention_strided)
                expected = full[:, query, keys] / full[:, query, keys].sum(-1, keepdim=True)
                torch.testing.assert_close(sampled[row][:, valid[row]], expected, **SINGLE)
                assert int(batch.queries[row]) == start + query
                row += 1
        assert row == len(sampled)


def dense_stats(final, student, head, targets, config):
    """Log-probs, entropy, JS and student entropy, (N,) each, from whole logits and the definitions."""
    T, tau = config.temperature, config.distill_temperature
    exact = torch.promote_types(final.dtype, torch.float32)  # under autocast the products are bfloat16
    final_logits, student_logits = (F.linear(hidden, head).to(exact) for hidden in (final, student))
    js = js_by_hand((student_logits / tau).softmax(-1), (final_logits.detach() / tau).softmax(-1))
    policy, inner = (final_logits / T).log_softmax(-1), (student_logits / tau).log_softmax(-1)
    entropy, student_entropy = (-(log_p.exp() * log_p).sum(-1) for log_p in (policy, inner))
    return policy.gather(1, targets[:, None])[:, 0], entropy, js, student_entropy


def dense_gradients(final, student, head, targets, advantages, scales, old, config):
    inputs = [x.clone().requires_grad_() for x in (final, student, head)]
    student_head = inputs[2] if config.lens_grad == "all" else head
    logprobs, *_ = dense_stats(inputs[0], inputs[1], inputs[2], targets, config)
    student_logits, final_logits = F.linear(inputs[1], student_head), F.linear(inputs[0], inputs[2])
    js = oisd.js_divergence(student_logits, final_logits, config.distill_temperature)
    loss = oisd.policy_loss_sum(logprobs, old, advantages, config)
    loss = loss + config.think_weight * oisd.internal_loss_sum(js, advantages, scales, config)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def tokens_of(targets, advantages, scales, old):
    """What the lens pass looks at of a batch."""
    logprobs = {"old_logprobs": old, "sampler_logprobs": old}
    return SimpleNamespace(target_ids=targets, advantages=advantages, token_scales=scales, **logprobs)


@pytest.mark.parametrize(
    "chunk,changes",
    [
        (1, {}),
        (5, {"temperature": 0.6}),
        (5, {"distill_temperature": 2.0, "think_weight": 0.5}),
        (16, {"lens_grad": "hidden"}),
        (1000, {"think_weight": 0.0}),
    ],
)
def test_chunked_lens_pass_is_the_dense_one(chunk, changes):
    config = with_config(lens_chunk_tokens=chunk, **changes)
    torch.manual_seed(3)
    N, D, V = 16, 12, 31
    final, student, head = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D)))
    targets, advantages = torch.randint(V, (N,)), 2 * torch.randn(N, dtype=torch.float64)
    scales, old = torch.rand(N, dtype=torch.float64) + 0.5, torch.randn(N, dtype=torch.float64) - 4
    expected, expected_gradients = dense_gradients(final, student, head, targets, advantages, scales, old, config)

    inputs = [x.clone().requires_grad_() for x in (final, student, head)]
    batch = tokens_of(targets, advantages, scales, old)
    loss, policy, think, *stats = oisd.LensPass.apply(*inputs, batch, config)
    (3 * loss).backward()
    torch.testing.assert_close(policy + config.think_weight * think, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    for tensor, gradient in zip(inputs, expected_gradients):
        torch.testing.assert_close(tensor.grad, 3 * gradient, rtol=1e-9, atol=1e-11)
    for mine, dense in zip(stats, dense_stats(final, student, head, targets, config)):
        torch.testing.assert_close(mine, dense, rtol=1e-11, atol=1e-12)


def test_scoring_reads_the_bits_of_training_and_a_pass_without_student_is_grpo():
    torch.manual_seed(3)
    final, student, head = (torch.randn(n, 12, dtype=torch.float64) for n in (16, 16, 31))
    targets, advantages, old = torch.randint(31, (16,)), torch.randn(16).double(), torch.randn(16).double() - 4
    batch = tokens_of(targets, advantages, torch.ones(16), old)
    _, _, _, logprobs, entropy, *_ = oisd.LensPass.apply(final.requires_grad_(), student, head, batch, CONFIG)
    scored = oisd.read_tokens(final, head, targets, CONFIG)
    assert torch.equal(scored[0], logprobs) and torch.equal(scored[1], entropy) and not scored[0].requires_grad
    loss, policy, think, alone, _, js, student_entropy = oisd.LensPass.apply(final, None, head, batch, CONFIG)
    assert torch.equal(loss, policy) and torch.equal(alone, logprobs)
    assert think == 0 and not js.any() and not student_entropy.any()
    loss.backward()
    leaf = final.detach().requires_grad_()
    dense = (leaf @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    oisd.policy_loss_sum(dense, old, advantages, CONFIG).backward()
    torch.testing.assert_close(final.grad, leaf.grad, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_no_further_from_the_truth_than_plain_autograd():
    """Under autocast, against float64: the errors of gradients and log-probs, next to those of the dense version."""
    torch.manual_seed(5)
    N, D, V, config = 64, 32, 101, with_config(temperature=0.7, dtype="bfloat16")
    truth = [torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D))]
    targets, advantages = torch.randint(V, (N,)), torch.randn(N, dtype=torch.float64)
    old = dense_stats(*truth, targets, config)[0]
    _, expected = dense_gradients(*truth, targets, advantages, torch.ones(N), old, config)
    batch = tokens_of(targets, advantages.float(), torch.ones(N), old.float())
    inputs = [x.float().requires_grad_() for x in truth]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _, *stats = oisd.LensPass.apply(*inputs, batch, config)
        logprobs, _, js, _ = dense_stats(*inputs, targets, config)
    policy, think = oisd.token_losses(logprobs, js, batch, slice(None), config)
    dense = torch.autograd.grad(policy + think, inputs)
    loss.backward()
    for mine, plain, true in zip([x.grad for x in inputs], dense, expected):
        assert (mine - true).norm() <= 1.1 * (plain - true).norm() < 0.1 * true.norm()
    assert 1e-3 < (stats[0] - old).abs().max() <= 1.1 * (logprobs - old).abs().max()  # it does compute in bfloat16


def layer_by_hand(layer, H, rotary):
    """Eq. 2: the residual stream (T, D) behind a decoder layer; and its queries and keys, (heads, T, d) each."""
    attention, T = layer.self_attn, len(H)
    x = layer.input_layernorm(H)
    q, k, v = (projection(x).view(T, -1, 8) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = (x.transpose(0, 1) for x in (attention.q_norm(q), attention.k_norm(k), v))
    q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], *rotary))
    k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))  # a key head serves two query heads
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = (q @ k.mT / math.sqrt(8)).masked_fill(future, -torch.inf).softmax(-1)
    H = H + attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
    return H + layer.mlp(layer.post_attention_layernorm(H)), q, k


def losses_by_hand(model, rollout, config):
    """Eq. 2 to 10 for one rollout, dense: -> sum of GRPO's loss over tokens, L_think and L_attn as in the paper."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    H = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(H, torch.arange(ids.shape[1])[None])
    H, h, q, k = H[0], {}, {}, {}
    for index, layer in enumerate(model.model.layers, 1):
        H, q[index], k[index] = layer_by_hand(layer, H, rotary)
        h[index] = H
    inner, L, tau, M = config.student_layer, len(h), config.distill_temperature, len(rollout.prompt_ids)
    context = slice(M - 1, -1)  # the last position of each context, where the next token is predicted
    E_u, LN = model.lm_head.weight, model.model.norm
    if config.lens_grad == "hidden":  # the student's gradient stops at h^l
        frozen = {"normalized_shape": (32,), "weight": LN.weight.detach(), "eps": LN.eps}
        read_out = E_u.detach(), functools.partial(F.rms_norm, **frozen)
    else:
        read_out = E_u, LN
    z = LN(h[L][context]) @ E_u.T  # Eq. 3
    targets = torch.tensor(rollout.response_ids)[:, None]
    ratio = ((z / config.temperature).log_softmax(-1).gather(1, targets)[:, 0] - rollout.old_logprobs).exp()
    A = rollout.advantage
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    grpo = -surrogate.clamp(min=config.dual_clip * A) if A < 0 else -surrogate
    A = max(-config.advantage_clip, min(config.advantage_clip, A))

    student = read_out[1](h[inner][context]) if config.lens_norm else h[inner][context]
    p, teacher = (student @ read_out[0].T / tau).softmax(-1), (z / tau).softmax(-1).detach()  # Eq. 5, 6
    think = (A * js_by_hand(p, teacher)).mean()  # Eq. 7

    attention = []
    for step in oisd.sample_attention_steps(len(rollout.response_ids), config.attention_steps):
        t, aligned = M - 1 + step, []
        K = keys_by_hand(t, config.attention_window, config.attention_strided)
        for layer in (inner, L):
            a = (q[layer][:, t, None] @ k[layer][:, : t + 1].mT / math.sqrt(8)).softmax(-1)[:, 0]  # Eq. 8: (H, |c_t|)
            aligned.append(a[:, K] / a[:, K].sum(-1, keepdim=True))  # Eq. 9
        attention.append(A * js_by_hand(aligned[0], aligned[1].detach()).mean())  # over heads
    return grpo.sum(), think, torch.stack(attention).mean(), len(attention)  # Eq. 10


def objective_by_hand(model, rollouts, config):
    """Eq. 11: L_GRPO is a mean over tokens, the internal losses are means over rollouts, or over tokens as well."""
    grpo, think, attention, steps = zip(*(losses_by_hand(model, rollout, config) for rollout in rollouts))
    lengths, R = [len(rollout.response_ids) for rollout in rollouts], len(rollouts)
    of_tokens, of_steps = [1 / R] * R, [1 / R] * R
    if config.internal_mean == "token":
        of_tokens, of_steps = ([x / sum(counts) for x in counts] for counts in (lengths, steps))
    loss = config.policy_weight * sum(grpo) / sum(lengths)
    loss = loss + config.think_weight * sum(share * x for share, x in zip(of_tokens, think))
    return loss + config.attention_weight * sum(share * x for share, x in zip(of_steps, attention))


CASES = {
    "paper": {},
    "no norm": {"lens_norm": False, "distill_temperature": 2.0},
    "hidden": {"lens_grad": "hidden", "temperature": 0.8},
    "no norm, hidden": {"lens_norm": False, "lens_grad": "hidden"},
}
WEIGHTS = {
    "all": {"think_weight": 0.7, "attention_weight": 0.4},
    "think": {"policy_weight": 0.0, "attention_weight": 0.0},
    "attention": {"policy_weight": 0.0, "think_weight": 0.0, "attention_weight": 1.0},
}


@pytest.mark.parametrize("internal_mean", ["rollout", "token"])
@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
def test_the_objective_is_the_papers_written_out(float64, monkeypatch, which, internal_mean, case):
    """Responses of 3, 17, 200, 40 and 1 tokens, in one micro-batch and in five and an empty one: dense autograd."""
    config = with_config(**WEIGHTS[which], **CASES[case], internal_mean=internal_mean)
    generator = torch.Generator().manual_seed(4)
    rollouts = []
    for count, advantage in ((3, 0.5), (17, -0.75), (200, 1.5), (40, -2.5), (1, 0.3)):
        prompt, response = (torch.randint(61, (n,), generator=generator).tolist() for n in (6, count))
        old = -4 + 0.3 * torch.randn(count, generator=generator)
        rollouts.append(oisd.Rollout(prompt, response, old.tolist(), "stop", advantage=advantage, old_logprobs=old))
    model = exact_model(tied=which == "all")
    expected = objective_by_hand(model, rollouts, config)
    expected.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    whole, mine = gradients(model, config, rollouts)
    monkeypatch.setattr(oisd, "micro_batches", lambda *_: [[4], [2], [0], [3], [1], []])
    parts, split = gradients(model, config, rollouts)
    assert_same_gradients(split, mine, rtol=1e-12, atol=1e-13)
    assert parts == pytest.approx(whole, rel=1e-12)
    dense = {name: dense.get(name, torch.zeros_like(gradient)) for name, gradient in mine.items()}
    assert_same_gradients(mine, dense, rtol=1e-12, atol=1e-12)
    weights = config.policy_weight, config.think_weight, config.attention_weight
    found = [whole[name] for name in ("policy_loss", "think_loss", "attention_loss")]
    assert math.isclose(sum(w * x for w, x in zip(weights, found)), expected.item(), rel_tol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_is_not_checkpointed(family, count):
    """With `count` of four layers recomputed: the same bits, and these layers alone run twice."""
    config, rollouts = with_config(attention_weight=1.0), random_rollouts()
    plain_sums, plain = gradients(random_model(family), config, rollouts)
    model, calls = random_model(family), []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs.recompute_some(model, count)
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    run = run_of(model, config)
    sums = oisd.accumulate_gradients(run, rollouts, 10**6)
    twice = [index for index in range(4) if calls.count(index) == 2]
    assert twice == {1: [3], 3: [1, 2, 3], 4: [0, 1, 2, 3]}[count] and len(calls) == 4 + count
    assert sums == plain_sums
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, plain, rtol=0, atol=0)
    assert all(tap.hidden is tap.query is tap.key is None for tap in run.model.taps)  # nothing is kept


def test_updates_are_clipped_steps_on_mini_batches():
    """4 prompts x 2 rollouts in mini-batches of 2 prompts: two steps of SGD, on gradients of norm 0.05 at most."""
    config = with_config(group_size=2, mini_batch_prompts=2, max_grad_norm=0.05, max_tokens_per_gpu=100)
    rollouts, model, other = random_rollouts(8), random_model(), random_model()
    run = run_of(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    metrics = oisd.update_policy(run, rollouts)
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


@pytest.mark.parametrize("lens_norm", [True, False])
def test_an_inner_policy_trains_what_it_stands_on_alone(lens_norm):
    """BuPO: gradients of layer 2's policy against dense autograd, and none at all above it but in the head."""
    config = with_config(think_weight=0.0, attention_weight=0.0, lens_norm=lens_norm, dual_clip=3.0)
    model, other, rollouts = random_model(), random_model(), random_rollouts(4)
    run = run_of(model, config)
    run.model.policy_layer = 2
    batch = oisd.pack(rollouts, config)
    final, inner = run.model.response_logprobs(batch)
    losses, logprobs = 0.0, []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        output = other(ids, output_hidden_states=True)
        hidden = output.hidden_states[2]
        logits = other.lm_head(other.model.norm(hidden) if lens_norm else hidden)[0, len(rollout.prompt_ids) - 1 : -1]
        targets = torch.tensor(rollout.response_ids)[:, None]
        logprobs.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
        advantages = torch.full((len(targets),), rollout.advantage, dtype=torch.float64)
        losses = losses + oisd.policy_loss_sum(logprobs[-1], rollout.old_logprobs, advantages, config)
    torch.testing.assert_close(inner, torch.cat(logprobs), **SINGLE)
    assert (final - inner).abs().max() > 0.1
    sums = oisd.accumulate_gradients(run, rollouts, 10**6)
    torch.testing.assert_close(sums["policy_loss"], losses.item() / len(batch.predicted), **SINGLE)
    (losses / len(batch.predicted)).backward()
    for (name, mine), dense in zip(model.named_parameters(), other.parameters()):
        above = ".layers.2." in name or ".layers.3." in name or (name == "model.norm.weight" and not lens_norm)
        assert (mine.grad is None) == (dense.grad is None) == above, name
        if not above:
            torch.testing.assert_close(mine.grad, dense.grad, **SINGLE)
    assert "think_js" not in sums  # no lens while an inner policy is optimised


def test_scores_are_taken_at_the_sampling_temperature():
    config = with_config(temperature=0.6)
    model, rollouts = random_model(), random_rollouts(3)
    batch = oisd.pack(rollouts, config)
    scores = oisd.TappedModel(model, config).response_logprobs(batch)[0]
    ids = [torch.tensor([r.prompt_ids + r.response_ids]) for r in rollouts]
    logits = [model(input_ids=i).logits[0, len(r.prompt_ids) - 1 : -1] for i, r in zip(ids, rollouts)]
    expected = (torch.cat(logits) / 0.6).log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    torch.testing.assert_close(scores, expected, **SINGLE)


def test_sliding_windows_are_refused_where_they_would_be_ignored():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=20), attn_implementation="sdpa")
    inputs.check_model(oisd.TappedModel(model, with_config(max_prompt_tokens=10, max_response_tokens=10)))
    with pytest.raises(UserError, match="sliding window of 20"):
        inputs.check_model(oisd.TappedModel(model, with_config(max_prompt_tokens=11, max_response_tokens=10)))


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Stands in for PyTorch's kernel, which needs CUDA: what its documentation says, sequence by sequence."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:end].repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        unseen = (distance < -window_size[1]) | ((distance > window_size[0]) & (window_size[0] >= 0))
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(unseen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("family,window", [("qwen3", None), ("mistral", None), ("mistral", 7)])
def test_varlen_gets_the_borders_heads_and_window(monkeypatch, family, window):
    """Hidden states and gradients with the stand-in, against each rollout alone by sdpa."""
    monkeypatch.setattr(oisd.varlen, "varlen_attn", varlen_attn)
    rollouts, config = random_rollouts(5), with_config()
    shape = {"sliding_window": window} if family == "mistral" else {}
    packed, plain = (random_model(family, attention=kernel, **shape) for kernel in ("varlen", "sdpa"))
    alone = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        alone.append(plain.get_decoder()(input_ids=ids).last_hidden_state[0, len(rollout.prompt_ids) - 1 : -1])
    expected = torch.cat(alone)
    tapped = oisd.TappedModel(packed, config)
    batch = oisd.pack(rollouts, config)
    seen = tapped.hidden_states(batch)[batch.predicted - 1]
    torch.testing.assert_close(seen, expected, **DOUBLE)
    weight = torch.randn_like(seen)
    theirs = torch.autograd.grad((expected * weight).sum(), list(plain.get_decoder().parameters()))
    ours = torch.autograd.grad((seen * weight).sum(), list(packed.get_decoder().parameters()))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, **DOUBLE)
    if not window:
        inputs.check_model(tapped)  # rows that are not packed, as in generation, go another way


def test_varlen_gets_one_dtype_and_only_what_it_knows(monkeypatch):
    """Outside FSDP a float32 norm leaves query and key float32 under autocast; torch 2.11 has no `enable_gqa`."""
    seen = []

    def older(query, key, value, *borders, scale, window_size):
        seen.append({query.dtype, key.dtype, value.dtype})
        return varlen_attn(query, key, value, *borders, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(oisd.varlen, "varlen_attn", older)
    config, rollouts = with_config(dtype="bfloat16"), random_rollouts(3)
    scores = []
    for kernel in ("varlen", "sdpa"):
        tapped = oisd.TappedModel(random_model(attention=kernel, dtype=torch.float32), config)
        scores.append(tapped(tapped.response_logprobs, oisd.pack(rollouts, config))[0])
    assert seen == [{torch.bfloat16}] * 4
    assert (scores[0] - scores[1]).abs().mean() < 0.1  # bfloat16's own difference


@pytest.mark.parametrize("think,attention", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_without_measure_js_the_gradient_is_the_same_and_the_rest_is_left_out(think, attention):
    weights, found = {"think_weight": think, "attention_weight": attention}, []
    for measure in (True, False):
        config = with_config(**weights, measure_js=measure)
        found.append(gradients(random_model(), config, random_rollouts()))
    (all_sums, with_js), (sums, without) = found
    assert_same_gradients(without, with_js, rtol=0, atol=0)
    assert sums.items() <= all_sums.items() and "think_js" in all_sums and "attention_js" in all_sums
    assert ("think_js" in sums, "attention_js" in sums) == (think > 0, attention > 0)


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
    logprobs = tapped(tapped.response_logprobs, batch)[0]
    weights = (batch.old_logprobs - batch.sampler_logprobs).exp().clamp(max=2)
    expected = oisd.policy_loss_sum(logprobs, batch.old_logprobs, batch.advantages, config, weights)
    torch.testing.assert_close(tapped(tapped.losses, batch)["token_loss"].detach(), expected, **SINGLE)


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


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    advantages = oisd.group_advantages(rewards, 4)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # sample standard deviation
    torch.testing.assert_close(advantages[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]).double() / (std + 1e-6))
    assert torch.equal(advantages[4:], torch.zeros(8).double())  # exactly
    assert torch.equal(oisd.group_advantages(torch.full((8,), 0.1), 8), torch.zeros(8))  # whose float std is not 0
    for bad in (torch.ones(7), torch.ones(2, 4), torch.tensor([1.0, math.nan, 0, 0])):
        with pytest.raises(ValueError):
            oisd.group_advantages(bad, 4)
        with pytest.raises(ValueError):
            oisd.leave_one_out_advantages(bad, 4)


def test_leave_one_out_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    third = 1 / 3
    expected = torch.tensor([1, -third, -third, -third, third, third, third, -1, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(oisd.leave_one_out_advantages(rewards, 4), expected)
    assert torch.equal(oisd.leave_one_out_advantages(torch.full((8,), 0.1), 8), torch.zeros(8))


def test_whitening_counts_every_token():
    """A response of three tokens and reward 1, one of one and 0, one of four and 0: mean 3/8, variance 15/8/7."""
    found = oisd.whiten(torch.tensor([1.0, 0, 0]), torch.tensor([3, 1, 4]))
    scale = math.sqrt(15 / 8 / 7 + 1e-8)
    torch.testing.assert_close(found, torch.tensor([5 / 8, -3 / 8, -3 / 8]) / scale)
    tokens = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    torch.testing.assert_close(oisd.whiten(tokens, torch.ones(8))[[0, 3, 4]], found)
    torch.testing.assert_close(found[0] * 3 + found[1] + found[2] * 4, torch.tensor(0.0), rtol=0, atol=1e-6)
    assert torch.equal(oisd.whiten(torch.full((3,), 0.1), torch.tensor([3, 1, 4])), torch.zeros(3))  # all agree


@pytest.mark.parametrize("advantage,expected", [
    ("grpo", [0.75**0.5, -(0.75**0.5), 0, 0]),  # +-1/2 by a standard deviation of sqrt(1/2), twice; a group that agrees
    ("rloo", [1, -1, 0, 0]),
    ("reinforce_pp", None),
])
def test_advantages_of_a_step(advantage, expected):
    rollouts = [oisd.Rollout([1], [2] * n, [], "stop", reward=r) for n, r in ((3, 1.0), (1, 0.0), (4, 0.0), (2, 0.0))]
    oisd.set_advantages(SimpleNamespace(config=with_config(advantage=advantage, group_size=2)), rollouts)
    found = torch.tensor([rollout.advantage for rollout in rollouts])
    if advantage == "reinforce_pp":  # of ten tokens, three have the reward 1: not 0 in a group that agrees
        expected = torch.tensor([0.7, -0.3, -0.3, -0.3]) / math.sqrt(2.1 / 9 + 1e-8)
    elif advantage == "grpo":
        expected = torch.tensor([0.5, -0.5, 0, 0]) / (math.sqrt(0.5) + 1e-6)
    torch.testing.assert_close(found, torch.as_tensor(expected).float())


def test_advantages_may_differ_by_token():
    rollouts = random_rollouts(3)
    plain, apart = oisd.pack(rollouts, CONFIG), [dataclasses.replace(r) for r in rollouts]
    for rollout in apart:
        rollout.advantage = torch.arange(len(rollout.response_ids)).double()
    batch = oisd.pack(apart, CONFIG)
    indices = torch.cat([torch.arange(len(r.response_ids)) for r in rollouts])
    assert torch.equal(batch.advantages, indices.double()) and torch.equal(batch.queries, plain.queries)
    steps = [oisd.sample_attention_steps(len(r.response_ids), CONFIG.attention_steps) for r in rollouts]
    assert batch.query_advantages.tolist() == [float(step) for part in steps for step in part]


@pytest.mark.parametrize("window,strided", [(1, 0), (4, 0), (4, 3), (3, 1), (64, 64), (2, 7)])
def test_attention_keys(window, strided):
    positions = torch.arange(200)
    keys, valid = oisd.sample_attention_keys(positions, window, strided)
    for position in positions.tolist():
        chosen = keys[position][valid[position]].tolist()
        assert chosen == sorted(set(chosen)) == keys_by_hand(position, window, strided)
        first_local = max(0, position + 1 - window)
        assert [key for key in chosen if key >= first_local] == list(range(first_local, position + 1))
        far = [key for key in chosen if key < first_local]
        assert len(far) <= strided and len({b - a for a, b in itertools.pairwise(far)}) <= 1
        assert not far or (far[0] == 0 and first_local - far[-1] <= max(1, math.ceil(first_local / strided)))
        assert bool(far) == (first_local > 0 and strided > 0)
    for bad in ((0, 4), (4, -1)):
        with pytest.raises(ValueError):
            oisd.sample_attention_keys(positions, *bad)


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
    sums = tapped(tapped.losses, oisd.pack([], CONFIG))
    assert all(value == 0 for value in sums.values())
    (sums["token_loss"] + sums["step_loss"]).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert tapped(tapped.response_logprobs, oisd.pack([], CONFIG))[0].shape == (0,)


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
    packed = tapped(tapped.response_logprobs, oisd.pack(rollouts, CONFIG))[0]
    alone = [tapped(tapped.response_logprobs, oisd.pack([rollout], CONFIG))[0] for rollout in rollouts]
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
        sums = tapped(tapped.losses, oisd.pack([rollout], config))
        (sums["token_loss"] + sums["step_loss"]).backward()
    assert largest.elements <= model.lm_head.weight.numel() == 2000 * 32 < min(400 * 400, 400 * 2000)


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
    keys, valid, starts = sampled_keys(batch, CONFIG)
    assert (keys + starts)[3][valid[3]].tolist() == [4, 5]  # no key of the neighbour


def test_rollouts_of_equal_rewards_leave_no_gradient():
    rollouts = [dataclasses.replace(rollout, advantage=0.0) for rollout in random_rollouts()]
    _, found = gradients(random_model(), with_config(attention_weight=1.0), rollouts)
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_attention_steps_are_even_and_unique():
    assert oisd.sample_attention_steps(3, 64) == [0, 1, 2]
    steps = oisd.sample_attention_steps(1000, 64)
    assert len(steps) == 64 and steps[0] == 0 and {b - a for a, b in itertools.pairwise(steps)} == {15, 16}

