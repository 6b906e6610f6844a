"""The numbers that a run reports and the files that it leaves, against what plain Transformers make of its rollouts."""

import copy
import dataclasses
import itertools
import json
from collections import defaultdict
from statistics import fmean

import pytest
import torch
from conftest import read_metrics, toy_arguments
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Model

import grader
import laptop
import oisd
import plumbing
from baselines import opsd, ppo
from settings import toml_table
from test_oisd import js_by_hand, keys_by_hand


@pytest.fixture(autouse=True)
def spelling_decides(monkeypatch):
    """The toy's answers are digits: no process is needed to compare them."""
    monkeypatch.setattr(grader.Grader, "_verdict", lambda self, pair: pair[0] == pair[1])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rollouts_of(run, step=1):
    return read_lines(run / "rollouts" / f"step_{step:06d}.jsonl")


# One step with no two settings alike, so that none can stand for another.
STEP = {"num_steps": 1, "rollouts_every": 1, "test_data": "", "prompts_per_step": 12, "group_size": 3}
STEP |= {"max_response_tokens": 6, "temperature": 1.6, "distill_temperature": 0.7, "advantage_clip": 0.8}
STEP |= {"think_weight": 0.7, "attention_weight": 0.4, "attention_steps": 3, "attention_window": 3}
STEP |= {"attention_strided": 2, "clip_low": 0.03, "clip_high": 0.06, "dual_clip": 1.1, "learning_rate": 0.01}
STEP |= {"weight_decay": 0.5, "max_grad_norm": 0.05, "max_tokens_per_gpu": 100, "lens_chunk_tokens": 16}
STEP |= {"max_logprob_gap": 1.0}
SHIFTS = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, -0.6])  # by response token, of the sampler against the trainer


def shifted_by(shifts, stream=laptop.HfSampler.stream):
    def shifted(self, prompts, seeds):
        for index, ids, logprobs, reason in stream(self, prompts, seeds):
            yield index, ids, (torch.tensor(logprobs) + shifts[: len(ids)]).tolist(), reason

    return shifted


def look(model, prompt, response, config):
    """One rollout through the plain model -> log-probs, JS, both entropies (N,) and attention JS (S,)."""
    first, count = len(prompt), len(response)
    output = model(torch.tensor([prompt + response]), output_hidden_states=True, output_attentions=True)
    norm, head = model.model.norm, model.lm_head
    if config.lens_grad == "hidden":
        norm, head = (copy.deepcopy(part).requires_grad_(False) for part in (norm, head))
    logits = output.logits[0, first - 1 : -1]
    student = head(norm(output.hidden_states[config.student_layer][0, first - 1 : -1]))
    policy = (logits / config.temperature).softmax(-1)
    teacher = (logits.detach() / config.distill_temperature).softmax(-1)
    student = (student / config.distill_temperature).softmax(-1)
    logprobs = policy.log().gather(1, torch.tensor(response)[:, None])[:, 0]
    entropy, student_entropy = (-(p * p.log()).sum(-1) for p in (policy, student))
    attention_js, steps = [], min(config.attention_steps, count)
    for query in [first - 1 + index * count // steps for index in range(steps)]:
        keys = keys_by_hand(query, config.attention_window, config.attention_strided)
        seen = [output.attentions[layer - 1][0, :, query, keys] for layer in (config.student_layer, 3)]  # (H, K)
        a, b = (weights / weights.sum(-1, keepdim=True) for weights in seen)
        attention_js.append(js_by_hand(a, b.detach()).mean())
    return logprobs, js_by_hand(student, teacher), entropy, student_entropy, torch.stack(attention_js)


def step_by_hand(toy, rows, advantages, config):
    """The updates of one step, dense -> its metrics, the weights after it, how many tokens each clip cut."""
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float64, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(toy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    ids = [[tokenizer(row[part]).input_ids for part in ("prompt", "response")] for row in rows]
    old = [look(model, *pair, config)[0].detach() for pair in ids]
    found, own, norms, cuts = defaultdict(list), {}, [], torch.zeros(3)
    start = [parameter.detach().bfloat16() for parameter in model.parameters()]
    for update in torch.arange(len(rows)).split(config.mini_batch_prompts * config.group_size):
        apart, losses = defaultdict(float), defaultdict(float)
        R, N = len(update), sum(len(ids[i][1]) for i in update)
        S = sum(min(config.attention_steps, len(ids[i][1])) for i in update)
        for i in update.tolist():
            A, C = advantages[i], max(-config.advantage_clip, min(config.advantage_clip, advantages[i]))
            C = C if config.advantage_sign in ("both", "positive" if C > 0 else "negative") else 0.0
            logprobs, js, entropy, student_entropy, attention_js = look(model, *ids[i], config)
            ratio = (logprobs - old[i]).exp()
            surrogate = torch.minimum(ratio * A, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * A)
            high, low = (A > 0) & (ratio > 1 + config.clip_high), (A < 0) & (ratio < 1 - config.clip_low)
            dual = (A < 0) & (ratio > config.dual_clip)
            policy = -torch.where(dual, config.dual_clip * A, surrogate)
            if config.importance_cap:
                policy = policy * (-SHIFTS[: len(ratio)]).exp().clamp(max=config.importance_cap)
            losses["policy"] += policy.sum() / N
            think, attention = C * js * N / (R * len(js)), C * attention_js * S / (R * len(attention_js))
            if config.internal_mean == "token":
                think, attention = C * js, C * attention_js
            losses["think"] += think.sum() / N
            losses["attention"] += attention.sum() / S
            cuts += torch.stack([high, low, dual]).sum(1)
            values = {"think_js": js, "clip_fraction": high | low | dual, "attention_js": attention_js}
            values |= {"entropy": entropy, "student_entropy": student_entropy}
            sign = "positive" if A > 0 else "negative" if A < 0 else "zero"
            values |= {f"think_js_{sign}": js, f"attention_js_{sign}": attention_js}
            for name, tensor in values.items():
                found[name] += tensor.tolist()
        for name, loss in losses.items():
            apart[name] = getattr(config, f"{name}_weight") * loss
            found[f"{name}_loss"].append(loss.item())
        if config.gradient_norms_every and not norms:
            for name, loss in apart.items():
                gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
                own[f"grad_norm_{name}"] = sum((g**2).sum() for g in gradients if g is not None).sqrt().item()
        sum(apart.values()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    means = {name: fmean(values) for name, values in found.items() if "zero" not in name}
    moved = [(weight.bfloat16() != before).flatten() for weight, before in zip(model.parameters(), start)]
    own |= {"grad_norm": fmean(norms), "moved_weights": torch.cat(moved).float().mean().item()}
    return means | own, model.state_dict(), cuts


@pytest.mark.parametrize(
    "changes",
    [
        {"mini_batch_prompts": 12, "gradient_norms_every": 1},
        {"mini_batch_prompts": 6, "lens_grad": "hidden", "importance_cap": 1.2, "gradient_norms_every": 2},
        {"mini_batch_prompts": 12, "advantage_sign": "positive", "policy_weight": 0.6, "internal_mean": "token"},
        {"mini_batch_prompts": 12, "advantage_sign": "negative", "gradient_norms_every": 1},
    ],
    ids=["one update", "two updates", "positive", "negative"],
)
def test_a_step_is_what_it_says(toy, tmp_path, monkeypatch, changes):
    """Rewards, advantages, every metric and the new weights, recomputed from the rollouts with dense autograd."""
    monkeypatch.setattr(laptop.HfSampler, "stream", shifted_by(SHIFTS))
    arguments = toy_arguments(toy, tmp_path / "run", **STEP | changes)
    _, config = oisd.load_config(arguments)
    assert oisd.main(arguments) == 0
    rows, problems = rollouts_of(tmp_path / "run"), read_lines(toy / "train.jsonl")
    tokenizer, advantages = AutoTokenizer.from_pretrained(toy), []
    for row in rows:
        problem, boxes = problems[row["row"]], row["response"].split("\\boxed{")[1:]
        said = boxes[-1].split("}")[0] if boxes and "}" in boxes[-1] else None
        assert row["prompt"] == f"<user>{problem['question']}<assistant>"
        assert row["reward"] == (said == problem["answer"]), row
        assert row["tokens"] == len(tokenizer(row["response"]).input_ids)
        assert row["finish_reason"] == ("stop" if row["response"].endswith("<eos>") else "length")
    groups = torch.tensor([row["reward"] for row in rows]).view(12, 3)
    for group in groups:
        advantages += ((group - group.mean()) / (group.std() + 1e-6)).tolist()
    assert [row["advantage"] for row in rows] == pytest.approx(advantages, rel=1e-5)

    expected, weights, cuts = step_by_hand(toy, rows, advantages, config)
    expected |= {
        "step": 1,
        "reward": groups.mean().item(),
        "response_length": fmean(row["tokens"] for row in rows),
        "truncated_fraction": fmean(row["tokens"] == 6 and "<eos>" not in row["response"] for row in rows),
        "zero_std_fraction": fmean(len(set(group)) == 1 for group in groups.tolist()),
        "sampler_logprob_gap": fmean(x for row in rows for x in SHIFTS.abs().tolist()[: row["tokens"]]),
        "grader_failures": 0,
    }
    (found,) = read_metrics(tmp_path / "run")
    moved = found.pop("moved_weights"), expected.pop("moved_weights")
    assert moved[0] == pytest.approx(moved[1], abs=0.002) and 0.5 < moved[0] < 1, moved  # a rounding apart
    assert found == pytest.approx(expected, rel=1e-4)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").state_dict()
    for name, tensor in final.items():  # AdamW moves by about learning_rate, whatever the gradient's size
        far = (tensor - weights[name]).abs() > 0.02 * config.learning_rate
        assert far.float().mean() < 1e-3, name  # where a gradient is all but 0, float32 may miss its sign
    # What must have happened for the numbers above to say something.
    assert 0 < expected["truncated_fraction"] < 0.5 and 0.1 < expected["zero_std_fraction"] < 0.9, expected
    assert (cuts > 0).all() if config.mini_batch_prompts == 6 else not cuts.any(), cuts


def test_failed_verdicts_are_counted_by_step(toy, tmp_path, monkeypatch):
    """`grader_failures`: of the step's own rollouts, by time and by crash; those of held-out ones are not in it."""

    def verdict(self, pair):
        self.timeouts += pair == ("1", "2")
        self.crashes += pair == ("1", "3")
        return pair[0] == pair[1] or None

    monkeypatch.setattr(grader.Grader, "_verdict", verdict)
    data = write_lines(tmp_path / "ones.jsonl", [{"question": "0+1", "answer": "1"}])
    steps = {"num_steps": 3, "rollouts_every": 1, "prompts_per_step": 1, "mini_batch_prompts": 1, "grader_workers": 1}
    assert oisd.main(toy_arguments(toy, tmp_path / "run", train_data=data, test_data=data, **steps)) == 0
    counts = [row["grader_failures"] for row in read_metrics(tmp_path / "run")]
    said = [{row["response"] for row in rollouts_of(tmp_path / "run", step)} for step in (1, 2, 3)]
    assert counts == [len({"\\boxed{2}<eos>", "\\boxed{3}<eos>"} & texts) for texts in said] and sum(counts) >= 4


TEMPLATE = (
    "{% for m in messages %}{{ {'system': 0, 'user': 1, 'assistant': 2}[m.role] }}={{ m.content }},{% endfor %}"
    "{{ 8 if enable_thinking else 9 }}{{ '+' if add_generation_prompt }}"
)
CHAT = [{"role": "system", "content": "7"}, {"role": "user", "content": "1+1"}]
CHAT += [{"role": "assistant", "content": "2"}, {"role": "user", "content": "2+1"}]
DEFAULT = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPTS = [
    ("0+1", {"max_prompt_tokens": 100}, f"0={DEFAULT},1=0+1,9+"),
    ("0+1", {"system_prompt": "4", "thinking": "true"}, "0=4,1=0+1,8+"),
    ("0+1", {"system_prompt": ""}, "1=0+1,9+"),
    (CHAT, {"system_prompt": "4"}, "0=7,1=1+1,2=2,1=2+1,9+"),
    (CHAT[1:], {"system_prompt": "4"}, "0=4,1=1+1,2=2,1=2+1,9+"),
    (CHAT, {"system_prompt": ""}, "1=1+1,2=2,1=2+1,9+"),
]


@pytest.mark.parametrize("question,changes,expected", PROMPTS, ids=["default", "set", "none", "own", "chat", "removed"])
def test_prompts_are_rendered_as_told(toy, tmp_path, capsys, question, changes, expected):
    """System message and thinking flag, as the model sees them: what is printed, and what the rollouts answered."""
    changes["train_data"] = write_lines(tmp_path / "data.jsonl", [{"question": question, "answer": "1"}])
    small = {"prompts_per_step": 1, "mini_batch_prompts": 1, "num_steps": 1, "rollouts_every": 1, "test_data": ""}
    assert oisd.main(toy_arguments(toy, tmp_path / "run", chat_template=TEMPLATE, **small, **changes)) == 0
    tokenizer = AutoTokenizer.from_pretrained(toy)
    expected = tokenizer.decode(tokenizer(expected).input_ids)  # letters are unknown to the toy
    assert f"the first prompt:\n---\n{expected}\n---\n" in capsys.readouterr().out
    assert {row["prompt"] for row in rollouts_of(tmp_path / "run")} == {expected}


def test_when_what_is_drawn_and_scored(toy, tmp_path, capsys):
    """With weights that stand still: other draws in every step, the same held-out draws, each at its own interval."""
    run, rows = tmp_path / "run", [{"question": f"{a}+1", "answer": str(a + 1)} for a in range(3)]
    long = {"question": "1+1+1", "answer": "3"}
    data = {"train_data": write_lines(tmp_path / "train.jsonl", [rows[0], long])}
    data["test_data"] = write_lines(tmp_path / "test.jsonl", [long, *rows, rows[0], long])
    steps = {"num_steps": 5, "rollouts_every": 2, "eval_every": 2, "eval_problems": 3, "eval_samples": 40}
    small = {"prompts_per_step": 1, "mini_batch_prompts": 1, "learning_rate": 1e-9, "max_prompt_tokens": 5}
    assert oisd.main(toy_arguments(toy, run, **data, **steps, **small)) == 0
    assert "1 training problems, 1 too long; 3 held out, 2 too long" in capsys.readouterr().out
    assert {path.stem for path in (run / "rollouts").iterdir()} == {"step_000002", "step_000004"}
    second, fourth = ([row["response"] for row in rollouts_of(run, step)] for step in (2, 4))
    assert second != fourth and len(set(second)) > 1
    scores = json.loads((run / "held_out.json").read_text())
    assert list(scores) == ["0", "2", "4", "5"] and 0 < scores["0"]["accuracy"] < 1
    assert all(score == scores["0"] for score in scores.values())
    assert (scores["0"]["problems"], scores["0"]["samples"]) == (3, 40)


def test_several_ends_bfloat16_and_shards(toy, tmp_path, monkeypatch):
    """A second end token stops and is kept; the export has the dtype of the model's files, in however many."""
    source, final = tmp_path / "model", tmp_path / "run" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    model.to(torch.bfloat16).generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("}")]
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    save, small = PreTrainedModel.save_pretrained, {"max_shard_size": "30KB"}
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda self, to, **kw: save(self, to, **kw | small))
    steps = {"num_steps": 1, "rollouts_every": 1, "learning_rate": 1e-9, "test_data": ""}
    assert oisd.main(toy_arguments(toy, final.parent, **steps, model=source)) == 0
    rows = rollouts_of(final.parent)
    assert all(row["response"].endswith(("}", "<eos>")) == (row["finish_reason"] == "stop") for row in rows)
    assert all("}" not in row["response"][:-1] for row in rows)
    assert sum(row["tokens"] == 3 and row["response"] == "\\boxed{2}" for row in rows) > 4

    files = sorted(final.glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2 and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (json.loads((folder / "generation_config.json").read_text()) for folder in (source, final))
    assert after == before
    loaded = AutoModelForCausalLM.from_pretrained(final).state_dict()
    torch.testing.assert_close(dict(loaded), dict(model.state_dict()), rtol=0, atol=1e-8)


def test_an_unknown_gap_ends_the_run(toy, tmp_path, monkeypatch, capsys):
    """NaN is not below the limit."""
    monkeypatch.setattr(laptop.HfSampler, "stream", shifted_by(torch.full((8,), torch.nan)))
    assert oisd.main(toy_arguments(toy, tmp_path / "run", test_data="")) == 1
    assert "differ by nan nats" in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("bad,kept", [(3, ["step_000001"]), (4, [])], ids=["first update", "second update"])
def test_a_gradient_that_is_no_number_ends_the_run(toy, tmp_path, monkeypatch, capsys, bad, kept):
    """No update is made of it, and a checkpoint is written only of weights between two steps."""
    calls, adamw = itertools.count(1), torch.optim.AdamW

    def watched(parameters, **settings):
        parameters[0]["params"][0].register_hook(lambda gradient: gradient * (torch.nan if next(calls) == bad else 1))
        return adamw(parameters, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    assert oisd.main(toy_arguments(toy, tmp_path / "run", test_data="", checkpoint_every=0)) == 1
    assert "stopped after step 1: the gradient norm is nan" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == kept


def test_scores_come_from_evaluation_mode(toy, tmp_path, monkeypatch):
    """Old log-probs without dropout and the like; updates in training mode, without which no layer is checkpointed."""
    calls, forward = [], Qwen3Model.forward

    def watched(self, *args, **kwargs):
        calls.append((bool(kwargs.get("use_cache")), torch.is_grad_enabled(), self.training))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", watched)
    assert oisd.main(toy_arguments(toy, tmp_path / "run", test_data="", num_steps=2)) == 0
    calls = list(itertools.dropwhile(lambda call: not call[0], calls))  # what precedes the first generation are checks
    assert all(training == gradient for _, gradient, training in calls)
    assert calls.count((False, False, False)) == 2 and calls.count((False, True, True)) == 4


MAY_CHANGE = "num_steps checkpoint_every checkpoints_kept rollouts_every eval_every tracker grader_seconds "
MAY_CHANGE += "grader_workers max_tokens_per_gpu lens_chunk_tokens recompute_layers sampler_batch vllm_memory "
MAY_CHANGE += "vllm_eager max_logprob_gap tensor_parallel cpu_offload gradient_norms_every"
WORDS = {"sampler": "vllm", "advantage": "rloo", "lens_grad": "hidden", "dtype": "bfloat16", "attention": "eager"}
WORDS |= {"tracker": "tensorboard", "advantage_sign": "positive", "vllm_memory": 0.5, "recompute_layers": 1}
WORDS |= {"internal_mean": "token"}


def test_what_would_change_results_may_not_change_on_resume(toy, tmp_path, capsys):
    """Every such setting, one at a time, is refused by name; the others are taken."""
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=0, test_data="")) == 0
    capsys.readouterr()
    other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 + 0.01, str: lambda x: x + "x"}
    for name, value in dataclasses.asdict(oisd.load_config(["--resume", str(run)])[1]).items():
        value = WORDS.get(name) or other[type(value)](value)
        words = ["--resume", str(run), f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
        if name in MAY_CHANGE.split():
            assert getattr(oisd.load_config(words)[1], name) == value
        elif name not in ("resume", "output_dir"):
            assert oisd.main(words) == 2, name
            assert f"--resume: {name} = {value!r}, but the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind,table,mean",
    [
        (oisd.Config, "tiny", "token"),
        (ppo.PpoConfig, "tiny_ppo", "token"),
        (opsd.OpsdConfig, "tiny_opsd", "rollout"),  # the field means nothing to it
    ],
)
def test_a_run_from_before_internal_mean_goes_on_as_it_began(kind, table, mean, tmp_path):
    lines = toml_table(*oisd.load_config([f"--config=configs.toml:{table}"], kind)).splitlines()
    older = [line for line in lines if not line.startswith("internal_mean")]
    assert len(older) == len(lines) - 1
    for text, expected in ((lines, "rollout"), (older, mean)):
        (tmp_path / "config.toml").write_text("\n".join(text), encoding="utf-8")
        assert oisd.load_config(["--resume", str(tmp_path)], kind)[1].internal_mean == expected


def test_spread_weights_look_the_same_and_move_as_much_as_the_masters(toy):
    """In bfloat16 nothing changes at first; then a step of a tenth of a cell moves a tenth of the weights by one."""
    model, plain = (AutoModelForCausalLM.from_pretrained(toy) for _ in range(2))
    for parameter in [*model.parameters(), *plain.parameters()]:
        parameter.data = parameter.data.bfloat16().float()
    embedding = model.get_input_embeddings().weight.data
    embedding[0, :3], plain.get_input_embeddings().weight.data[0, :3] = torch.tensor([[0.0, 1.0, -0.5]] * 2)  # binades
    embedding[1], plain.get_input_embeddings().weight.data[1] = 0.1, 0.1  # not on the grid
    plumbing.spread_weights(model, seed=0)
    assert torch.equal(plumbing.bfloat16_images(model), plumbing.bfloat16_images(plain))
    assert torch.equal(embedding[1], torch.full_like(embedding[1], 0.1)) and embedding[0, 0] == 0
    for one, other in zip(model.parameters(), plain.parameters()):
        assert (one.ndim == 1) == torch.equal(one, other)
    weight, middle = model.model.layers[0].mlp.up_proj.weight.data, plain.model.layers[0].mlp.up_proj.weight.data
    bits = middle.abs().view(torch.int32)
    cell = (bits + 2**16).view(torch.float32) - middle.abs()
    for sign in (1, -1):
        step = sign * 0.1 * cell * middle.sign()  # away from zero, or towards it
        assert torch.equal((middle + step).bfloat16(), middle.bfloat16())
        image = ((weight + step).bfloat16().float() - middle) * middle.sign()
        assert (image / cell).sum() == pytest.approx(sign * 0.1 * cell.numel(), rel=0.25)
        assert set((image / cell).unique().tolist()) <= {0.0, sign * 1.0, sign * 0.5}


def test_a_run_with_spread_weights_starts_as_the_published_model_and_resumes(toy, tmp_path, capsys):
    source = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(toy).to(torch.bfloat16)
    for part in (model, AutoTokenizer.from_pretrained(toy)):
        part.save_pretrained(source)
    words = {"model": source, "dtype": "bfloat16", "spread_weights": "true", "test_data": ""}
    assert oisd.main(toy_arguments(toy, tmp_path / "none", num_steps=0, **words)) == 0
    assert "spread_weights: 100 % of" in capsys.readouterr().out
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "none" / "final").state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    assert oisd.main(toy_arguments(toy, tmp_path / "whole", **words)) == 0
    assert oisd.main(toy_arguments(toy, tmp_path / "parted", num_steps=2, **words)) == 0
    assert oisd.main(["--resume", str(tmp_path / "parted"), "--num_steps", "4"]) == 0
    whole, parted = (read_metrics(tmp_path / name) for name in ("whole", "parted"))
    assert whole == parted and 0 < whole[0]["moved_weights"] < whole[3]["moved_weights"] < 1
