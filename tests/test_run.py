"""One process: what a run computes, leaves and survives."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_order, read_metrics, start_run, toy_arguments, toy_sampler, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import laptop
import oisd
import plumbing
from settings import UserError, toml_table


def test_sampling_depends_on_the_sequences_seed_alone(toy):
    """Alone or in a batch, first or last: the same tokens, which is what lets runs be split and resumed."""
    _, sampler, _, prompts = toy_sampler(toy)
    together = in_order(sampler.stream(prompts, list(range(len(prompts)))), prompts)
    for index in (0, 3, len(prompts) - 1):
        alone = in_order(sampler.stream([prompts[index]], [index]), [prompts[index]])[0]
        assert alone.response_ids == together[index].response_ids
    assert len({tuple(ids) for _, ids, _, _ in sampler.stream([prompts[0]] * 32, list(range(32)))}) > 2


def test_sequences_that_have_ended_leave_the_batch(toy, monkeypatch):
    """No draw changes; the log-probs do by rounding, and the model sees fewer rows."""
    _, config = oisd.load_config(toy_arguments(toy, "unused", max_response_tokens=40))
    model, _ = oisd.load_model(config)
    ends = list(range(0, model.config.vocab_size, 7))
    prompts = [[1 + i % 5] * (2 + i % 4) for i in range(12)]
    sampler = laptop.HfSampler(model, ends, config, torch.device("cpu"))
    seen, found = [], []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.logits)))
    for segment in (3, 1000):
        monkeypatch.setattr(laptop, "SEGMENT", segment)
        found.append(sorted(sampler.stream(prompts, list(range(12)))))
        seen.append(None)
    rows = [sum(part) for part in (seen[: seen.index(None)], seen[seen.index(None) + 1 : -1])]
    assert rows[0] < 0.8 * rows[1]
    for (index, ids, logprobs, finish), other in zip(*found):
        assert (index, ids, finish) == (other[0], other[1], other[3])
        assert logprobs == pytest.approx(other[2], abs=1e-5)


def test_sampling_draws_from_the_softmax():
    """Gumbel-max against the probabilities: 20,000 draws at temperature 0.5, by chi-squared."""
    logits, draws = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]), 20_000
    sampling = laptop.SeededSampling(range(draws), temperature=0.5, end_ids=[1, 4])
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




@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_resumed_is_uninterrupted(toy, tmp_path, changes):
    """Two steps, stop, two more: the metrics and the weights, bit for bit, of four steps in one go."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert oisd.main(toy_arguments(toy, whole, **changes)) == 0
    assert oisd.main(toy_arguments(toy, parted, num_steps=2, **changes)) == 0
    assert oisd.main(["--resume", str(parted), "--num_steps", "4"]) == 0
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
    assert oisd.main(["--resume", str(run)]) == 0
    assert read_metrics(run) == before


def test_stopped_before_the_first_update_is_not_started(toy, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert oisd.main(toy_arguments(toy, whole, num_steps=2)) == 0
    with monkeypatch.context() as patch:
        problems = oisd.step_problems  # asked for once a step; scoring held-out problems does not
        patch.setattr(oisd, "step_problems", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or problems(*a))
        assert oisd.main(toy_arguments(toy, stopped, num_steps=2)) == 128 + signal.SIGTERM
    assert "no checkpoint yet" in capsys.readouterr().err and plumbing.checkpoints(stopped) == []
    assert oisd.main(["--resume", str(stopped)]) == 0
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
    rollouts = [json.loads(line) for line in (run / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    assert len(rollouts) == 32 and {r["reward"] for r in rollouts} == {0.0, 1.0}
    assert sum(r["reward"] for r in rollouts) / 32 == metrics[1]["reward"]
    assert all(len({r["row"] for r in rollouts[i : i + 8]}) == 1 for i in range(0, 32, 8))  # groups of one problem
    assert len({r["response"] for r in rollouts[:8]}) > 1 and metrics[1]["zero_std_fraction"] < 1
    for r in rollouts:  # what was written is what was graded
        answer = json.loads((toy / "train.jsonl").read_text().splitlines()[r["row"]])["answer"]
        assert r["reward"] == (f"\\boxed{{{answer}}}" in r["response"]) and (r["advantage"] > 0) <= (r["reward"] == 1)
    assert (run / "curves.png").stat().st_size > 10_000
    assert oisd.load_config(["--config", f"{run / 'config.toml'}:tiny"])[1].num_steps == 3
    final = AutoModelForCausalLM.from_pretrained(run / "final")
    assert final.dtype == torch.float32 and len(AutoTokenizer.from_pretrained(run / "final")) == len(laptop.VOCABULARY)
    assert oisd.main(toy_arguments(toy, run, num_steps=3)) == 2  # never into a folder that holds a run
    assert "already holds a run" in capsys.readouterr().err
    assert oisd.main(["--resume", str(run), "--seed", "1"]) == 2
    assert "seed = 1, but the run" in capsys.readouterr().err


def test_a_model_learns(toy, tmp_path):
    """From a third right to nearly all, where every sum is 2: the sign of the policy's gradient in the program."""
    problems = [{"question": f"{a}+{2 - a}", "answer": "2"} for a in range(3)] * 8
    (tmp_path / "twos.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    data = {"train_data": tmp_path / "twos.jsonl", "test_data": tmp_path / "twos.jsonl"}
    assert oisd.main(toy_arguments(toy, tmp_path / "run", num_steps=12, eval_samples=8, **data)) == 0
    scores = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert scores["0"]["accuracy"] < 0.5 and scores["12"]["accuracy"] > 0.8, scores




@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(toy, tmp_path, number):
    run = tmp_path / "run"
    process = start_run(toy_arguments(toy, run, num_steps=10_000, checkpoint_every=0))
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(number)
    shown = process.communicate(timeout=240)[0]
    assert process.returncode == 128 + number, shown
    assert "continue by: python oisd.py --resume" in shown and "Traceback" not in shown
    steps = len(read_metrics(run))
    assert [path.name for path in plumbing.checkpoints(run)] == [f"step_{steps:06d}"]
    assert oisd.main(["--resume", str(run), "--num_steps", str(steps + 1)]) == 0
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 2))


def test_half_written_checkpoints_are_passed_over(toy, tmp_path):
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=2)) == 0
    (run / "checkpoints" / "step_000009.part").mkdir()
    assert [path.name for path in plumbing.checkpoints(run)] == ["step_000002"]


def test_wrong_weights_in_the_sampler_stop_the_run(toy, tmp_path, monkeypatch, capsys):
    other, _ = oisd.load_model(oisd.load_config(toy_arguments(toy, tmp_path))[1])
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    monkeypatch.setattr(laptop.HfSampler, "sync", lambda self, model: setattr(self, "model", other))
    assert oisd.main(toy_arguments(toy, tmp_path / "run")) == 1
    assert "the weights did not arrive" in capsys.readouterr().err



def lines_of(path):
    return path.read_text().splitlines()


def test_the_last_step_is_saved_whatever_checkpoint_every(toy, tmp_path):
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=3, checkpoint_every=2)) == 0
    assert [path.name for path in plumbing.checkpoints(run)] == ["step_000002", "step_000003"]


def test_two_runs_never_share_a_folder(toy, tmp_path, monkeypatch, capsys):
    """Fresh names are claimed by making them; a folder that is being trained in is locked, to `--resume` as well."""
    monkeypatch.chdir(tmp_path)
    config = oisd.load_config(toy_arguments(toy, ""))[1]
    (first, lock), (second, other) = (plumbing.open_folder("toy", config) for _ in range(2))
    assert (str(first), str(second)) == ("runs/toy", "runs/toy-2")
    (first / "config.toml").write_text(toml_table("toy", config))
    for words in (toy_arguments(toy, second), ["--resume", str(first)]):
        assert oisd.main(words) == 2
        assert "another process is training in" in capsys.readouterr().err
    lock.close(), other.close()


def test_resuming_loses_nothing_that_was_there(toy, tmp_path, capsys):
    """Steps after the newest checkpoint come again; what they had left, and a line cut off, is moved aside."""
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=3, checkpoint_every=2, rollouts_every=1)) == 0
    before, step_3 = read_metrics(run), (run / "rollouts" / "step_000003.jsonl").read_text()
    plumbing.remove_folder(run / "checkpoints" / "step_000003")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # as a crash leaves it
    assert oisd.main(["--resume", str(run), "--rollouts_every", "0"]) == 0
    assert "continuing after step 2" in capsys.readouterr().out and read_metrics(run) == before
    assert [line[:9] for line in lines_of(run / "abandoned" / "metrics.jsonl")] == ['{"step": ', '{"step": ']
    assert (run / "abandoned" / "step_000003.jsonl").read_text() == step_3
    assert sorted(path.name for path in (run / "rollouts").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]
    for path in plumbing.checkpoints(run):
        plumbing.remove_folder(path)
    assert oisd.main(["--resume", str(run)]) == 0
    assert "no checkpoint yet: starting with step 1" in capsys.readouterr().out and read_metrics(run) == before
    assert len(lines_of(run / "abandoned" / "metrics.jsonl")) == 5


def test_a_resumed_run_has_the_data_it_was_started_with(toy, tmp_path, capsys):
    run, data = tmp_path / "run", tmp_path / "train.jsonl"
    data.write_text((toy / "train.jsonl").read_text())
    assert oisd.main(toy_arguments(toy, run, num_steps=1, train_data=data)) == 0
    data.write_text("".join(line + "\n" for line in lines_of(data)[:4]))
    assert oisd.main(["--resume", str(run), "--num_steps", "2"]) == 2
    assert "train_data is 4 problems" in (shown := capsys.readouterr().err) and "started with 7 problems" in shown


def test_a_run_that_cannot_go_on_saves_what_is_whole(toy, tmp_path, monkeypatch, capsys):
    """A gap before any update of step 3: step 2 is saved. A bad gradient in the second update of a step: nothing is."""
    run, score = tmp_path / "run", oisd.set_old_logprobs

    def drifting(run, rollouts):
        if run.state["step"] == 2:
            rollouts[0].sampler_logprobs = [-math.nan] * len(rollouts[0].sampler_logprobs)
        return score(run, rollouts)

    monkeypatch.setattr(oisd, "set_old_logprobs", drifting)
    assert oisd.main(toy_arguments(toy, run, checkpoint_every=0)) == 1
    assert "stopped after step 2: log-probs of sampler and trainer differ by nan" in (shown := capsys.readouterr().err)
    assert "step_000002 is whole; continue by: python oisd.py --resume" in shown
    monkeypatch.undo()
    clip, norms = torch.nn.utils.clip_grad_norm_, iter([1.0, 1.0, 1.0, math.inf])  # the second update of step 4
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) * next(norms))
    assert oisd.main(["--resume", str(run)]) == 1
    assert "stopped after step 3: the gradient norm is inf; step_000002 is whole" in capsys.readouterr().err
    monkeypatch.undo()
    assert oisd.main(["--resume", str(run)]) == 0 and len(read_metrics(run)) == 4


FULL_DISK = """
import resource, sys, oisd
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(oisd.main(sys.argv[2:]))
"""


def test_a_full_disk_costs_the_checkpoint_and_no_more(toy, tmp_path):
    """No file may exceed 200 kB, so the checkpoint of step 4 fails: one line, no half of it left, step 2 whole."""
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=2)) == 0
    words = [sys.executable, "-c", FULL_DISK, "200000", "--resume", str(run), "--num_steps", "4"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert shown.returncode == 1 and "Traceback" not in shown.stderr, shown.stderr
    assert "the checkpoint of step 4 was not written" in shown.stderr and "step_000002 is whole" in shown.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    assert oisd.main(["--resume", str(run), "--num_steps", "4"]) == 0


def test_a_checkpoint_is_never_half_under_its_name(tmp_path, monkeypatch):
    """Dying amid a deletion leaves the folder under another name."""
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    monkeypatch.setattr(plumbing.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plumbing.remove_folder(tmp_path / "checkpoints" / "step_000002")
    assert plumbing.checkpoints(tmp_path) == [] and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_picture_never_ends_a_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    plumbing.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    plumbing.draw_curves(tmp_path / "nowhere")
    assert "curves.png was not drawn: FileNotFoundError" in capsys.readouterr().out


def test_a_signal_while_ranks_gather_is_not_lost(monkeypatch):
    """The flag is read, gathered, and never written back: what the handler sets meanwhile counts at the next look."""
    with plumbing.Signals() as signals:

        def gather(mine):
            os.kill(os.getpid(), signal.SIGTERM)
            return mine

        with monkeypatch.context() as patch:
            patch.setattr(plumbing, "gather", gather)
            signals.check()
        with pytest.raises(plumbing.Interrupted):
            signals.check()


SLOW = """
import sys, time, pathlib, oisd
def wait(problems, step, config):
    pathlib.Path(config.output_dir, "waiting").touch()
    time.sleep(600)
oisd.step_problems = wait
sys.exit(oisd.main(sys.argv[1:]))
"""


def test_a_second_signal_leaves_at_once(toy, tmp_path):
    """The first waits for the end of the rollouts, here for ever; one that follows within a second changes nothing."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", SLOW, *toy_arguments(toy, run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(run / "waiting", process)
    for pause in (0.2, 1.5):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "once more to leave at once" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and plumbing.checkpoints(run) == []


def test_adapters_of_transposed_layers_are_exported_merged(toy, tmp_path):
    """GPT-2's linear layers are Conv1D, (in, out): the merged weights are those that peft itself merges."""
    from peft import LoraConfig, inject_adapter_in_model

    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61))
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model)
    merged = dict(oisd.full_weights(model, torch.float32, torch.device("cpu")))
    ids = torch.arange(20)[None]
    expected = model.eval()(ids).logits
    plain = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61))
    missing, unexpected = plain.load_state_dict(merged, strict=False)
    assert unexpected == [] and missing == ["lm_head.weight"]  # tied
    torch.testing.assert_close(plain.eval()(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_held_out_scores_survive_resumption(toy, tmp_path, monkeypatch):
    """The last step's score is in its checkpoint, and one that a signal has prevented is made up for."""
    run = tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, num_steps=2, checkpoint_every=2, eval_every=1)) == 0
    with monkeypatch.context() as patch:
        log = plumbing.log_metrics
        patch.setattr(plumbing, "log_metrics", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or log(*a))
        assert oisd.main(["--resume", str(run), "--num_steps", "4"]) == 128 + signal.SIGTERM
    assert list(json.loads((run / "held_out.json").read_text())) == ["0", "1", "2"]
    assert oisd.main(["--resume", str(run), "--num_steps", "4"]) == 0
    scores = json.loads((run / "held_out.json").read_text())
    assert list(scores) == ["0", "1", "2", "3", "4"] and scores["0"]["problems"] == 7


def test_the_laptops_model_is_not_made_over_another_folder(tmp_path):
    (tmp_path / "tiny_model").mkdir()
    (tmp_path / "tiny_model" / "thesis.tex").touch()
    with pytest.raises(UserError, match="stands in the way"):
        laptop.make(tmp_path / "tiny_model")
    assert (tmp_path / "tiny_model" / "thesis.tex").exists()


def test_a_full_disk_is_seen_before_the_first_step(toy, tmp_path, monkeypatch, capsys):
    """51,776 weights: checkpoints of steps 2 and 4, of 12 bytes a weight, and 4 for the export."""
    free = 51_776 * (2 * 12 + 4)
    for room, code in ((free - 1, 2), (free, 0)):
        monkeypatch.setattr(plumbing.shutil, "disk_usage", lambda _, room=room: SimpleNamespace(free=room))
        assert oisd.main(toy_arguments(toy, tmp_path / "run")) == code
        error = capsys.readouterr().err
        assert code == 0 or ("GB free, but 2 checkpoints" in error and "checkpoints_kept" in error), error
        assert code == 0 or not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps,every,kept,count", [(300, 0, 1, 1), (300, 300, 1, 1), (5, 2, 5, 3), (300, 50, 2, 3)])
def test_the_disk_must_hold_what_will_be_written(steps, every, kept, count, tmp_path, monkeypatch):
    """A trained weight is 12 bytes of a checkpoint and 4 of the export; what a resumed run has written counts."""
    model = torch.nn.Linear(100, 100, bias=False)
    model.frozen = torch.nn.Linear(100, 100, bias=False).requires_grad_(False)
    config = oisd.Config(num_steps=steps, checkpoint_every=every, checkpoints_kept=kept)
    needed = 10_000 * (12 * count + 2 * 4)
    for held in (0, 500):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / "weights").write_bytes(bytes(held))
        room = SimpleNamespace(free=needed - held)
        monkeypatch.setattr(plumbing.shutil, "disk_usage", lambda _, room=room: room)
        plumbing.check_disk(tmp_path, model, config, torch.float32)
        room.free -= 1
        with pytest.raises(UserError, match=f"but {count} checkpoints"):
            plumbing.check_disk(tmp_path, model, config, torch.float32)


def test_rollouts_travel_as_arrays_and_arrive_as_they_were():
    logprobs = torch.randn(8192).tolist()  # float32, as samplers give them
    ids, ones = list(range(8192)), torch.ones(8192)
    rollout = oisd.Rollout([1, 2], ids, logprobs, "stop", row=3, advantage=ones, notes={"a": 1})
    sent = pickle.dumps(rollout)
    arrived = pickle.loads(sent)
    for name, value in vars(rollout).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: type(a) is type(b) and a == b
        assert same(getattr(arrived, name), value), name
    assert len(sent) < 8192 * (4 + 4 + 4) + 2000  # four bytes for each id, log-prob and advantage


def test_rank_0_has_all_threads_while_it_loads(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(plumbing, "world", lambda: 2)
    monkeypatch.setattr(plumbing.os, "sched_getaffinity", lambda _: range(threads + 3), raising=False)
    with pytest.raises(ZeroDivisionError), plumbing.all_threads():
        assert torch.get_num_threads() == threads + 3
        _ = 1 / 0
    assert torch.get_num_threads() == threads


def test_vllm_takes_what_the_fullest_gpu_has_left(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79e9, 80e9))
    monkeypatch.setattr(plumbing, "gather", lambda mine: [*mine, 0.61])
    device, model = torch.device("cuda", 0), torch.nn.Linear(1000, 2_000_000, bias=False, device="meta")
    assert plumbing.vllm_share(device, model) == 0.61
    monkeypatch.setattr(plumbing, "gather", lambda mine: mine)
    assert plumbing.vllm_share(device, model) == 0.66  # (79 - 1.5 - 2 x 12) / 80: 12 bytes a trained weight
    monkeypatch.setattr(plumbing, "world", lambda: 2)
    assert plumbing.vllm_share(device, model) == 0.81
    assert plumbing.vllm_share(device, None) == 0.9  # in the host's memory
    monkeypatch.setattr(plumbing, "world", lambda: 1)
    assert plumbing.vllm_share(device, model.requires_grad_(False)) == 0.86  # 4 bytes a frozen one
    with pytest.raises(UserError, match="leave vLLM nothing"):
        plumbing.vllm_share(device, torch.nn.Linear(1000, 6_500_000, device="meta"))


def test_an_engine_takes_as_many_sequences_as_a_step_draws(monkeypatch):
    """`max_num_seqs`, of an engine that records its settings and does not start; an evaluation has no steps."""
    asked = []

    def engine(**settings):
        asked.append(settings["max_num_seqs"])
        raise RuntimeError("recorded")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine, SamplingParams=None))
    for processes, prompts, sleeps in ((1, 9, True), (2, 9, True), (4, 1024, True), (2, 9, False)):
        monkeypatch.setattr(oisd, "world", lambda processes=processes: processes)
        config = oisd.Config(prompts_per_step=prompts, mini_batch_prompts=prompts, group_size=8)
        with pytest.raises(UserError, match="recorded"):
            oisd.VllmSampler(config, [0], torch.device("cpu"), sleeps)
    assert asked == [72, 40, 1024, 1024]
