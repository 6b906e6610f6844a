"""The other rows of the paper's tables: estimators, PPO, OPSD and BuPO. Their runs are in `test_processes.py`."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import oisd
import pytest
import torch
from baselines import bupo, estimators, opsd, ppo
from support import problems
from support.settings import UserError
from test_oisd import CONFIG, random_model, random_rollouts, run_of

from conftest import read_lines, toy_arguments

PROGRAMS = {"_rloo": estimators, "_reinforce_pp": estimators, "_ppo": ppo, "_bupo": bupo, "_opsd": opsd}
WEIGHTS = {"": (1, 0.1), "_grpo": (0, 0), "_think": (1, 0), "_attention": (0, 0.1), "_think_half": (0.5, 0)}
WEIGHTS |= {"_think_double": (2, 0), "_rloo": (0, 0), "_reinforce_pp": (0, 0), "_ppo": (0, 0), "_bupo": (0, 0)}
WEIGHTS |= {"_opsd": (1, 0)}  # of L_think and L_attn, by row of the paper's tables


def of_kind(kind, **changes):
    """Turn the tests' config into a baseline's."""
    return kind(**dataclasses.asdict(CONFIG) | {"think_weight": 0.0, "attention_weight": 0.0} | changes)


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters()]


def test_advantages_of_rloo_and_reinforce_pp():
    """Of ten tokens, three have the reward 1. RLOO compares within groups of three."""
    scale = math.sqrt(2.1 / 9 + 1e-8)
    expected = {"rloo": [1, -0.5, -0.5, 0, 0, 0], "reinforce_pp": [0.7 / scale] + [-0.3 / scale] * 5}
    for estimator in expected:
        config = of_kind(estimators.EstimatorConfig, estimator=estimator, group_size=3)
        rollouts = [oisd.Rollout([1], [2] * count, [], "stop") for count in (3, 1, 2, 2, 1, 1)]
        rollouts[0].reward = 1.0
        estimators.set_advantages(SimpleNamespace(config=config), rollouts)
        assert [rollout.advantage for rollout in rollouts] == pytest.approx(expected[estimator])


def test_gae_is_the_double_sum():
    gamma, decay = 0.9, 0.7
    values = [torch.randn(n) for n in (5, 1, 3)]
    rewards = [1.0, 0.0, 0.5]
    for v, reward, found in zip(values, rewards, ppo.advantages_of(values, rewards, gamma, decay)):
        n = len(v)
        v = [*v.tolist(), 0.0]
        deltas = [(reward if t == n - 1 else 0.0) + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * decay) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_value_gains_nothing_far_from_its_old_one():
    """The second of four is clipped to 0.5. The last two are beyond their returns, where the full error counts."""
    values = torch.tensor([0.0, 1.0, 1.0, -1.0], requires_grad=True)
    returns = torch.tensor([1.0, 2.0, 0.5, 0.0])
    loss = ppo.value_loss_sum(values, torch.zeros(4), returns, 0.5)
    loss.backward()
    assert loss.item() == (1 + 1.5**2 + 0.5**2 + 1) / 2 and values.grad.tolist() == [-1, 0, 0.5, -1]


def test_the_critic_learns_a_known_value(monkeypatch):
    """Responses that begin with token 3 get the reward 1, and those with 4 get 0. Only the critic learns."""
    config = of_kind(ppo.PpoConfig, learning_rate=1e-3, policy_weight=0.0)
    monkeypatch.setattr(oisd, "TappedModel", ppo.ActorCritic)
    run = run_of(random_model(dtype=torch.float32), config)
    run.optimizer = torch.optim.AdamW(run.model.parameter_groups(), lr=config.learning_rate)
    rollouts = [oisd.Rollout([1, 2], [3 + i % 2, 5 + i, 7], [0.0] * 3, "stop", reward=1.0 - i % 2) for i in range(8)]
    for _ in range(60):
        ppo.set_advantages(run, rollouts)
        advantages = torch.cat([rollout.advantage for rollout in rollouts])
        assert abs(advantages.mean()) < 1e-5 and abs(advantages.std() - 1) < 1e-4  # whitened over the step
        oisd.accumulate_gradients(run, rollouts, 1000)
        policy_norm, critic_norm = oisd.clip_gradients(run)  # apart from each other
        assert policy_norm == 0 < critic_norm
        run.optimizer.step()
        run.optimizer.zero_grad()
    for index, values in enumerate(oisd.token_values(run, rollouts, run.model.values)):
        expected = torch.tensor([0.5, 1 - index % 2, 1 - index % 2])  # the mean, until the token is read
        assert (values - expected).abs().max() < 0.1, values


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_opsd_is_the_dense_js_to_the_model_that_sees_the_solution(clip):
    config = of_kind(opsd.OpsdConfig, think_weight=0.5, js_clip=clip, max_teacher_tokens=16)
    model, dense = random_model(), random_model()
    tapped = opsd.SelfTeacher(model, config)
    rollouts = random_rollouts(4)
    for index, rollout in enumerate(rollouts):
        rollout.notes = {"teacher_ids": [*rollout.prompt_ids, *range(9, 12 + index)]}
    sums = tapped(tapped.losses, oisd.pack(rollouts, config))
    sums.token_loss.backward()
    loss = 0.0
    for rollout in rollouts:
        p, q = (
            dense(torch.tensor([prompt + rollout.response_ids])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            for prompt in (rollout.prompt_ids, rollout.notes["teacher_ids"])
        )
        q = q.detach()
        m = (p + q) / 2
        terms = (p * (p / m).log() + q * (q / m).log()) / 2
        loss = loss + (terms.clamp(max=clip) if clip else terms).sum()
    assert sums.metrics["think_js"][0].item() == pytest.approx(loss.item(), rel=1e-5)
    (0.5 * loss).backward()
    torch.testing.assert_close(gradients_of(model), gradients_of(dense), rtol=1e-3, atol=1e-6)


def test_only_the_teachers_prompt_has_the_solution(toy):
    changes = {"config": "configs.toml:tiny_opsd", "attention_weight": 0, "max_teacher_tokens": 11}
    _, config = oisd.load_config(toy_arguments(toy, "unused", **changes), opsd.OpsdConfig)
    tokenizer = problems.load_tokenizer(config.model, config.chat_template)
    taught, _ = opsd.load_problems(config.train_data, tokenizer, config)
    rollouts = [oisd.Rollout(problem.prompt_ids, [5], [0.0], "stop", row=problem.row) for problem in taught]
    opsd.before_updates(SimpleNamespace(problems=taught), rollouts)
    for rollout, row in zip(rollouts, read_lines(toy / "train.jsonl"), strict=True):
        shown, taught = (tokenizer.decode(ids) for ids in (rollout.prompt_ids, rollout.notes["teacher_ids"]))
        assert shown == f"<user>{row['question']}<assistant>"
        assert taught == f"<user>{row['question']}={row['solution']}<assistant>"
        assert rollout.length + rollout.extra_tokens == 11 + 1 and rollout.advantage == 1
    with pytest.raises(UserError, match="reads a reference solution"):
        opsd.load_problems(config.train_data, tokenizer, dataclasses.replace(config, solution_field="proof"))


def test_bupo_is_grpo_of_the_inner_policy():
    """Log-probs and gradients are those of dense autograd. Nothing above the inner layer gets a gradient."""
    config = of_kind(bupo.BupoConfig, lens_norm=False)
    model, dense = random_model(), random_model()
    tapped = bupo.InnerPolicy(model, config)
    tapped.inner = True
    batch = oisd.pack(random_rollouts(), config)
    tapped(tapped.losses, batch).token_loss.backward()
    logprobs = []
    for rollout in batch.rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        hidden = dense(ids, output_hidden_states=True).hidden_states[config.student_layer]
        logits = dense.lm_head(hidden)[0, len(rollout.prompt_ids) - 1 : -1]
        logprobs.append(logits.log_softmax(-1)[range(len(logits)), rollout.response_ids])
    logprobs = torch.cat(logprobs)
    torch.testing.assert_close(tapped(tapped.inner_logprobs, batch).double(), logprobs.detach(), rtol=1e-4, atol=1e-5)
    oisd.policy_loss_sum(logprobs, batch.old_logprobs, batch.advantages, config).backward()
    torch.testing.assert_close(gradients_of(model), gradients_of(dense), rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match="set both to 0"):
        of_kind(bupo.BupoConfig, think_weight=1.0)


def test_the_tables_are_the_papers_rows():
    rows = [("qwen3_4b", row) for row in WEIGHTS]
    rows += itertools.product(("qwen3_8b", "octothinker_3b", "octothinker_8b"), ("", "_grpo", "_bupo"))
    for model, row in rows:
        kind = PROGRAMS[row].METHOD.config if row in PROGRAMS else oisd.Config
        _, config = oisd.load_config([f"--config=configs.toml:{model}{row}"], kind)
        assert (config.think_weight, config.attention_weight) == WEIGHTS[row]
        assert config.lens_norm == (row != "_bupo")
        assert getattr(config, "estimator", row[1:]) == row[1:] and getattr(config, "js_clip", 0.05) == 0.05
        sizes = (config.prompts_per_step, config.group_size, config.num_steps, config.learning_rate)
        assert sizes == (128, 8, 300, 1e-6)
