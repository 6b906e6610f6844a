"""The other rows of the paper's tables: PPO's critic, OPSD's teacher, the layer rule, and every table as a run."""

import dataclasses
import functools
import itertools
import json
import shutil
import tomllib
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_same_metrics, launch, read_metrics, toy_arguments
from safetensors.torch import load_file

import oisd
from baselines import opsd, ppo
from settings import UserError
from test_oisd import CONFIG, random_model, random_rollouts
from tools import layers
from tools import solutions as tools_solutions

METHODS = {"gae": ppo.PPO, "none": opsd.OPSD}  # by `advantage`


def of_kind(kind, **changes):
    """The tests' config as that of a baseline."""
    values = {entry.name: getattr(CONFIG, entry.name) for entry in dataclasses.fields(CONFIG)}
    del values["advantage"]
    return kind(**values | changes)


# ---------------------------------------------------------------------------------------------------------------------
# PPO


@pytest.mark.parametrize("gamma,decay", [(1.0, 1.0), (0.9, 1.0), (1.0, 0.8), (0.9, 0.7), (0.5, 0.0)])
def test_gae_is_the_double_sum(gamma, decay):
    torch.manual_seed(0)
    values, rewards = [torch.randn(n) for n in (5, 1, 3)], [1.0, 0.0, 0.5]
    for v, reward, found in zip(values, rewards, ppo.advantages_of(values, rewards, gamma, decay)):
        v, n = [*v.tolist(), 0.0], len(v)
        deltas = [(reward if t == n - 1 else 0.0) + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * decay) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        if gamma == decay == 1:  # what is still to come, less the value
            torch.testing.assert_close(found, reward - torch.tensor(v[:-1], dtype=torch.float64))


def test_values_move_near_the_old_ones():
    values = torch.tensor([0.0, 1.0, 1.0, -1.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.5, 0.0])
    # second: held at 0.5, an error of 1.5; third: 0.5 beyond its return, which counts whole; fourth: likewise
    loss = ppo.value_loss_sum(values, old, returns, 0.5)
    torch.testing.assert_close(loss.item(), (1 + 2.25 + 0.25 + 1) / 2)
    loss.backward()
    assert values.grad.tolist() == [-1, 0, 0.5, -1]
    assert ppo.value_loss_sum(values, old, returns, 0.0).item() == (1 + 1 + 0.25 + 1) / 2


def made_run(model_class, config):
    model = model_class(random_model(dtype=torch.float32), config).train()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(config=config, model=model, accelerator=accelerator, state={"step": 0})


@pytest.mark.parametrize("shared", [False, True])
def test_the_critic_learns_a_known_value(shared):
    """Responses that begin with token 3 get reward 1, those with 4 get 0: so the value is known once that is read."""
    config = of_kind(ppo.PpoConfig, share_trunk=shared, learning_rate=1e-3, think_weight=0.0, attention_weight=0.0)
    run = made_run(ppo.ActorCritic, config)
    run.optimizer = oisd.make_optimizer(run.model, config, fused=False)
    rollouts = [oisd.Rollout([1, 2], [3 + i % 2, 5 + i, 7], [0.0] * 3, "stop", reward=1.0 - i % 2) for i in range(8)]
    policy = {name: p.clone() for name, p in run.model.model.named_parameters()}
    for _ in range(60):
        ppo.set_advantages(run, rollouts)
        for rollout in rollouts:
            rollout.advantage = torch.zeros(3)  # the critic alone learns
        for rollout, (_, logprobs) in zip(rollouts, oisd.score(run, rollouts, run.model.response_logprobs)):
            rollout.old_logprobs = logprobs
        run.model.train()
        sums = oisd.accumulate_gradients(run, rollouts, 1000)
        run.optimizer.step()
        run.optimizer.zero_grad()
    values = [values for (values,) in oisd.score(run, rollouts, run.model.values)]
    for index, value in enumerate(values):
        assert abs(value[0] - 0.5) < 0.1, value  # before it is read: the mean
        assert (value[1:] - (1 - index % 2)).abs().max() < 0.1, value
    assert 0 < sums["value_loss"] / 24 < 0.06  # half of the first token's variance, a third of the tokens: 0.042
    moved = [name for name, p in run.model.model.named_parameters() if (p - policy[name]).abs().max() > 1e-3]
    assert bool(moved) == shared  # a second trunk leaves the policy alone


def test_ppo_whitens_over_the_step_and_clips_the_critic_apart():
    config = of_kind(ppo.PpoConfig, max_grad_norm=0.1, mini_batch_prompts=2, group_size=2, prompts_per_step=2)
    run = made_run(ppo.ActorCritic, config)
    torch.nn.init.normal_(run.model.value_head.weight)
    rollouts = [dataclasses.replace(r, reward=float(i % 2)) for i, r in enumerate(random_rollouts(4))]
    for rollout, (_, logprobs) in zip(rollouts, oisd.score(run, rollouts, run.model.response_logprobs)):
        rollout.old_logprobs = logprobs
    ppo.set_advantages(run, rollouts)
    flat = torch.cat([rollout.advantage for rollout in rollouts])
    assert abs(flat.mean()) < 1e-5 and abs(flat.std() - 1) < 1e-4
    for rollout in rollouts:  # gamma = lambda = 1: every return is the reward
        torch.testing.assert_close(rollout.notes["returns"], torch.full((len(rollout.response_ids),), rollout.reward))
    run.optimizer = oisd.make_optimizer(run.model, config, fused=False)
    clipped = {}
    run.optimizer.step = lambda: clipped.update(
        {i: torch.stack([p.grad.norm() for p in group["params"]]).norm() for i, group in enumerate(groups)}
    )
    groups = run.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-6, 1e-5])
    metrics = oisd.update_policy(run, rollouts)
    assert metrics["grad_norm"] > 0.1 and all(abs(norm - 0.1) < 1e-4 for norm in clipped.values())
    assert sum(len(group["params"]) for group in groups) == len(list(run.model.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# OPSD


def taught_rollouts(count=4):
    rollouts = random_rollouts(count)
    for index, rollout in enumerate(rollouts):
        rollout.advantage, rollout.notes = 1.0, {"teacher_ids": [*rollout.prompt_ids, *range(9, 12 + index)]}
    return rollouts


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_opsd_is_the_dense_js_to_the_model_that_sees_the_solution(clip):
    config = of_kind(opsd.OpsdConfig, attention_weight=0.0, think_weight=0.5, js_clip=clip, max_teacher_tokens=16)
    model, other, rollouts = random_model(), random_model(), taught_rollouts()
    tapped = opsd.SelfTeacher(model, config)
    batch = oisd.pack(rollouts, config)
    sums = tapped(tapped.losses, batch)
    sums["token_loss"].backward()
    loss = 0.0
    for rollout in rollouts:
        logits = {}
        for role, prompt in (("student", rollout.prompt_ids), ("teacher", rollout.notes["teacher_ids"])):
            row = torch.tensor([prompt + rollout.response_ids])
            logits[role] = other(row).logits[0, len(prompt) - 1 : -1]
        p, q = logits["student"].softmax(-1), logits["teacher"].detach().softmax(-1)  # the teacher is no leaf
        m = (p + q) / 2
        terms = (p * (p / m).log() + q * (q / m).log()) / 2
        loss = loss + (terms.clamp(max=clip) if clip else terms).sum()
    torch.testing.assert_close(sums["think_js"].item(), loss.item(), rtol=1e-5, atol=0)
    (0.5 * loss).backward()
    for (name, mine), dense in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(mine.grad, dense.grad, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_solution_is_in_the_teachers_prompt_alone(toy):
    words = toy_arguments(toy, "unused", attention_weight=0.0)
    _, config = oisd.load_config([*words, "--config=configs.toml:tiny_opsd"], opsd.OpsdConfig)
    tokenizer = oisd.load_tokenizer(config)
    problems, too_long = opsd.load_problems(config.train_data, tokenizer, config)
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    assert len(problems) == len(rows) and too_long == 0
    for problem, row in zip(problems, rows):
        assert tokenizer.decode(problem.prompt_ids) == f"<user>{row['question']}<assistant>"
        shown = f"<user>{row['question']}={row['solution']}<assistant>"
        assert tokenizer.decode(problem.teacher_ids) == shown
    rollouts = [oisd.Rollout(problem.prompt_ids, [5], [0.0], "stop", row=problem.row) for problem in problems]
    opsd.set_advantages(SimpleNamespace(problems=problems), rollouts)
    assert [r.notes["teacher_ids"] for r in rollouts] == [p.teacher_ids for p in problems]
    shortest = min(len(problem.teacher_ids) for problem in problems)
    few = dataclasses.replace(config, max_teacher_tokens=shortest)
    kept, too_long = opsd.load_problems(config.train_data, tokenizer, few)
    assert kept and len(kept) + too_long == len(rows) and all(len(p.teacher_ids) == shortest for p in kept)


def test_messages_keep_all_but_the_last():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q {solution}"}]
    found = opsd.with_solution(messages, "A", "{question} | {solution}")
    assert found == [messages[0], {"role": "user", "content": "Q {solution} | A"}]
    assert messages[1]["content"] == "Q {solution}"


BAD = [
    (opsd.OPSD, "tiny_opsd", {"solution_field": "proof"}, "OPSD's teacher reads a reference solution"),
    (opsd.OPSD, "tiny_opsd", {"max_teacher_tokens": 2}, "no teacher's prompt has at most 2"),
    (opsd.OPSD, "tiny_opsd", {"attention_weight": 0.1}, "the other has to be 0"),
    (opsd.OPSD, "tiny_opsd", {"solution_template": "{question}"}, "lacks {question} or {solution}"),
    (opsd.OPSD, "tiny_rloo", {}, "advantage = 'rloo' is for oisd.py: launch that"),
    (opsd.OPSD, "tiny_opsd", {"policy_layer": 1, "policy_layer_steps": 1}, "policy_layer = 1: OPSD has no such thing"),
    (opsd.OPSD, "tiny_opsd", {"max_teacher_tokens": 2000}, "max_teacher_tokens + max_response_tokens = 20"),
    (ppo.PPO, "tiny_ppo", {"gae_lambda": 1.5}, "less than or equal to 1"),
    (oisd.Method(), "tiny_ppo", {}, "advantage = 'gae' is for baselines/ppo.py: launch that"),
    (oisd.Method(), "qwen3_4b_opsd", {}, "advantage = 'none' is for baselines/opsd.py: launch that"),
    (oisd.Method(), "tiny_bupo", {"policy_layer_steps": 0}, "set both or neither"),
    (oisd.Method(), "tiny_bupo", {"importance_cap": 2}, "set it to 0"),
    (oisd.Method(), "tiny_bupo", {"think_weight": 1}, "no lens is trained, set it to 0"),
    (oisd.Method(), "tiny_bupo", {"policy_layer": 3}, "has 3 layers"),
    (oisd.Method(), "tiny", {"student_layer": "3"}, "has 3 layers"),
]


@pytest.mark.parametrize("method,table,changes,message", BAD, ids=[f"{row[1]} {row[2]}" for row in BAD])
def test_what_does_not_go_together_gets_one_line(method, table, changes, message, toy, tmp_path, capsys):
    base = {} if table == "tiny_opsd" else {"attention_weight": 0.0}
    kept = row_settings(table) if table.startswith("tiny") else {}
    words = toy_arguments(toy, tmp_path / "run", **kept | base | changes)
    assert oisd.main([*words, f"--config=configs.toml:{table}"], method) == 2
    error = capsys.readouterr().err
    assert error.startswith("oisd: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_bupo_optimises_the_inner_policy_first(toy, tmp_path):
    """One step of it leaves what stands above as it was; the next step is GRPO's."""
    rows = {"policy_layer": 1, "policy_layer_steps": 1, "think_weight": 0.0, "attention_weight": 0.0, "test_data": ""}
    moved = []
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        assert oisd.main(toy_arguments(toy, folder, num_steps=steps, **rows)) == 0
        before, after = load_file(toy / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
        moved.append({name.split(".")[2] for name in after if not torch.equal(before[name], after[name])})
    assert "0" in moved[0] and not {"1", "2"} & moved[0] and {"0", "1", "2"} <= moved[1]


# ---------------------------------------------------------------------------------------------------------------------
# The layer rule


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_exploration_signals_are_those_of_the_residual_stream(family):
    """Against the model's own hidden states, and what its attention adds to them."""
    model, rollouts = random_model(family, dtype=torch.float32), random_rollouts(3)
    for name, parameter in model.named_parameters():  # so that the lens of a normed stream is another
        torch.nn.init.normal_(parameter) if "norm" in name else None
    tapped = oisd.TappedModel(model, CONFIG)
    found = tapped(layers.ffn_entropies, tapped, oisd.pack(rollouts, CONFIG))
    assert all(tap.hidden is None for tap in tapped.taps)
    column = 0
    for rollout in rollouts:
        added: list[torch.Tensor] = []
        keep = functools.partial(lambda added, _, __, output: added.append(output[0][0]), added)
        hooks = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
        last: list[torch.Tensor] = []
        hooks.append(model.model.norm.register_forward_pre_hook(lambda _, taken, last=last: last.append(taken[0][0])))
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        where = slice(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        states, expected = [state[0] for state in output.hidden_states], []
        before = [states[i] + added[i] for i in range(4)]
        after = [*states[1:4], last[0]]  # the model's own last state is normed
        for read in (lambda h: model.lm_head(model.model.norm(h)), model.lm_head):
            for logits in map(read, before + after):
                p = logits[where].log_softmax(-1)
                expected.append(-(p.exp() * p).sum(-1))
        mine = found[..., column : column + len(rollout.response_ids)].flatten(0, 2)
        torch.testing.assert_close(mine, torch.stack(expected), rtol=1e-4, atol=1e-4)
        column += len(rollout.response_ids)
    assert not any(layer._forward_hooks_with_kwargs or layer._forward_pre_hooks for layer in tapped.layers)


def test_the_last_positive_layer_below_the_teacher(tmp_path, capsys):
    before = [1.0, 1.0, 1.0, 1.0]
    with_norm, without = [1.5, 1.25, 0.75, 2.0], [0.5, 0.25, 0.75, 2.0]
    assert layers.report(torch.tensor([[before, with_norm], [before, without]]), tmp_path) == [2, 0]
    said = capsys.readouterr().out
    assert "with the norm: student layer 2" in said
    assert "without the norm: no FFN below layer 4 raises the lens entropy" in said
    lines = (tmp_path / "layers.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[1] == "1,1.0,1.5,0.5,1.0,0.5,-0.5" and lines[0].endswith("signal_without_norm")
    assert (tmp_path / "layers.png").stat().st_size > 5000


def test_parallel_layers_have_no_point_between(tmp_path):
    from test_families import tapped

    model = tapped("gpt_neox")
    with pytest.raises(UserError, match="side by side"):
        model(layers.ffn_entropies, model, oisd.pack(random_rollouts(1), CONFIG))


def test_layers_measured_alone_are_the_same_in_any_batches(toy, tmp_path):
    measured = []
    for tokens in (128, 4096):
        words = toy_arguments(toy, tmp_path / str(tokens), max_prompt_tokens=32, max_tokens_per_gpu=tokens)
        assert layers.main(words) == 0
        rows = (tmp_path / str(tokens) / "layers.csv").read_text().splitlines()[1:]
        measured.append([float(value) for row in rows for value in row.split(",")])
    assert len(measured[0]) == 21 and measured[0] == pytest.approx(measured[1], abs=1e-5)
    assert layers.main(["--model", str(tmp_path / "nowhere")]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Reference solutions


def test_solutions_are_joined_by_question(toy, tmp_path, capsys):
    """White space does not count, thoughts are left out, a solution without an end is passed over; and they train."""

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def asked(question, gold):
        prompt = [{"role": "user", "content": question}]
        return {"question": question, "prompt": prompt, "reward_model": {"ground_truth": gold}}

    def solved(question, *texts):
        return {"question": question} | {f"r1_solution_{i}": text for i, text in enumerate(texts, 1)}

    problems = write("problems.jsonl", [asked("1+1", "2"), asked("1 +\n 2", "3"), asked("0+1", "1"), asked("2+2", "4")])
    given = [solved("1 + 2 ", "<think>endless", "<think>a</think>\n\n three ", ""), solved("1+1", "two", "", None)]
    given += [solved("9+9", "18", "", ""), solved("2+2", "<think>endless", "", None), solved("1+1", "zwei", "", "")]
    solutions, output = write("solutions.jsonl", given), tmp_path / "joined.jsonl"
    assert tools_solutions.main([str(output), "--problems", problems, "--solutions", solutions]) == 0
    assert "2 of 4 problems have a solution" in capsys.readouterr().out
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["prompt"][0]["content"], row["solution"]) for row in found] == [("1+1", "two"), ("1 +\n 2", "three")]
    config = dataclasses.replace(settings_of("qwen3_4b_opsd"), model=str(toy), train_data=str(output), system_prompt="")
    taught, _ = opsd.load_problems(str(output), oisd.load_tokenizer(config), config)
    assert [problem.answer for problem in taught] == ["2", "3"]
    for other in ([solved("7+7", "14")], [{"question": "1+1", "proof": "two"}]):
        other = write("other.jsonl", other)
        assert tools_solutions.main([str(output), "--problems", problems, "--solutions", other]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert len(output.read_text().splitlines()) == 2  # what was there stays


# ---------------------------------------------------------------------------------------------------------------------
# Every table

SIZES = {  # of the toy's runs, instead of the tables'
    "question_field": "question",
    "answer_field": "answer",
    "chat_template": "",
    "eval_problems": 0,
    "mini_batch_prompts": 2,
    "max_prompt_tokens": 32,
    "max_response_tokens": 8,
    "max_tokens_per_gpu": 128,
    "group_size": 8,
    "attention_steps": 4,
    "dtype": "float32",
    "num_steps": 2,
    "checkpoint_every": 1,
    "rollouts_every": 1,
    "thinking": "false",
    "vllm_memory": 0.4,
    "recompute_layers": "0",
}
TABLES = [name for name in tomllib.loads((ROOT / "configs.toml").read_text()) if name != "paper"]


def settings_of(table):
    kinds = {"ppo": ppo.PpoConfig, "opsd": opsd.OpsdConfig}
    return oisd.load_config(["--config", f"configs.toml:{table}"], kinds.get(table.rsplit("_", 1)[-1], oisd.Config))[1]


def row_settings(table):
    """What of a table's method stays on a model of three layers, as options."""
    config = settings_of(table)
    kept = {name: getattr(config, name) for name in ("think_weight", "attention_weight")}
    if config.policy_layer:
        kept |= {"policy_layer": 1, "policy_layer_steps": 1}  # the second step, and a resumed run, are GRPO's
    if config.advantage == "none":
        kept |= {"solution_template": "{question}={solution}", "max_teacher_tokens": 64}
    return kept


def distinct_rows():
    """Tables by what is left of them on the toy: the same rows of several models once."""
    rows = {}
    for table in TABLES:
        config = settings_of(table)
        rows.setdefault((config.advantage, config.lens_norm, str(row_settings(table))), []).append(table)
    return {tables[0]: tables for tables in rows.values()}


ROWS = distinct_rows()
TWO_RANKS = """
import json, sys, oisd
from accelerate import Accelerator
from baselines import opsd, ppo
Accelerator.end_training = lambda self: None  # the group serves all runs
methods = {"ppo": ppo.PPO, "opsd": opsd.OPSD, "oisd": oisd.Method()}
for method, words in json.loads(sys.argv[1]):
    assert oisd.main(words, methods[method]) == 0, words
oisd.plumbing.program(lambda: 0)
"""


def row_words(table, toy, folder):
    words = toy_arguments(toy, folder, **SIZES | {"prompts_per_step": 4, "learning_rate": 1e-3} | row_settings(table))
    return [*words, f"--config=configs.toml:{table}"]


def test_every_table_is_among_the_rows():
    assert sorted(itertools.chain(*ROWS.values())) == sorted(TABLES)
    assert {f"tiny{row}" for row in ("", *PAPER_ROWS)} == {row for row in ROWS if row.startswith("tiny")} == set(ROWS)
    for model in ("qwen3_8b", "octothinker_3b", "octothinker_8b"):
        assert {f"{model}_grpo", f"{model}_bupo"} <= set(TABLES)
    for row in ("", *PAPER_ROWS):  # a row behind `tiny` is that of the paper's model
        kept = "advantage think_weight attention_weight lens_norm".split()
        pair = [settings_of(f"{model}{row}") for model in ("tiny", "qwen3_4b")]
        assert len({tuple(getattr(config, name) for name in kept) for config in pair}) == 1, row
        shared = "prompts_per_step group_size num_steps learning_rate train_data clip_low clip_high".split()
        for name in shared if row != "_opsd" else shared[:4]:
            assert getattr(pair[1], name) == getattr(settings_of("qwen3_4b"), name)
    assert settings_of("qwen3_4b_opsd").js_clip == 0.05  # OPSD's published code
    with pytest.raises(UserError, match=r"is for baselines/opsd\.py"):
        oisd.load_config(["--config", "configs.toml:tiny_opsd"])


PAPER_ROWS = "_grpo _think _attention _think_half _think_double _rloo _reinforce_pp _ppo _bupo _opsd".split()


@pytest.fixture(scope="session")
def rows_by_two(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    names = {"gae": "ppo", "none": "opsd"}
    runs = [(names.get(settings_of(row).advantage, "oisd"), row_words(row, toy, folder / row)) for row in ROWS]
    process = launch(TWO_RANKS, json.dumps(runs))
    shown = process.communicate(timeout=900)[0]
    assert process.returncode == 0, shown
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_two_ranks_and_a_resumed_run_are_one_run(row, toy, rows_by_two, tmp_path):
    """Two steps of the row: all metrics and weights, by one process and by two, and cut off after the first step."""
    method = METHODS.get(settings_of(row).advantage, oisd.Method())
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert oisd.main(row_words(row, toy, whole), method) == 0
    metrics = read_metrics(whole)
    assert len(metrics) == 2 and all(0 < m["reward"] < 1 and m["grad_norm"] > 0 for m in metrics)
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoints" / "step_000002")
    assert oisd.main(["--resume", str(parted)], method) == 0
    assert read_metrics(parted) == metrics
    assert_same_metrics(metrics, read_metrics(rows_by_two / row))
    weights = [load_file(f / "final" / "model.safetensors") for f in (whole, parted, rows_by_two / row)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])
        torch.testing.assert_close(weights[2][name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        (opsd.OPSD, {"advantage_sign": "negative"}, "advantage_sign = 'negative': OPSD has no such thing"),
        (opsd.OPSD, {"internal_mean": "token"}, "internal_mean = 'token': OPSD has no such thing"),
        (opsd.OPSD, {"gradient_norms_every": 1}, "gradient_norms_every = 1: OPSD has no such thing"),
        (ppo.PPO, {"share_trunk": "true", "gradient_norms_every": 1}, "with share_trunk"),
    ],
)
def test_what_a_baseline_cannot_do_is_refused(program, words, said, toy, tmp_path, capsys):
    table = f"{ROOT / 'configs.toml'}:{program.config.table}"
    arguments = ["--config", table, *toy_arguments(toy, tmp_path / "run", **words)[2:]]
    arguments = [word for word in arguments if not word.startswith("--attention_weight")]
    assert oisd.main(arguments, program) == 2 and said in capsys.readouterr().err
