"""Other people's data, models and checkpoints: what is trained on, and the one line that refuses the rest."""

import functools
import gzip
import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading

import datasets
import evaluate
import oisd
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import problems, run_folder
from transformers import AutoTokenizer, GenerationConfig

from conftest import ROOT, evaluation_arguments, read_lines, read_metrics, toy_arguments, write_lines

# ---- Data ----------------------------------------------------------------------------------------

LINES = b'{"question": "1", "answer": 12345678901234567891}\n\n{"question": "2", "answer": 1e-05}\n'
BLANK = {"role": "system", "content": ""}
PARTS = {"role": "user", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}
MATRIX = "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"
FILES = {  # content, and its gold answers
    "numbers.jsonl": (LINES, ["12345678901234567891", "0.00001"]),
    "list.json": (b'[{"question": "1",\n"answer": 0.50}, {"question": "2", "answer": "1e3"}]', ["0.50", "1000"]),
    "packed.jsonl.gz": (gzip.compress(LINES), ["12345678901234567891", "0.00001"]),
    "upper.JSONL": (b"\xef\xbb\xbf" + LINES, ["12345678901234567891", "0.00001"]),
    "text.csv": (b'question,answer\n1,007\n2,NA\n3,"(1,5)"\n', ["007", "NA", "(1,5)"]),
    "tabs.tsv": (b"question\tanswer\n1\t1e-05\n", ["0.00001"]),
    "parts.jsonl": (json.dumps({"question": [BLANK, PARTS], "answer": "2"}).encode(), ["2"]),
    "matrix.json": (json.dumps({"question": "1", "answer": MATRIX}, indent=1).encode(), [" ".join(MATRIX.split())]),
    "algebra.csv": (b"question,answer\n1,ab+bc+ca+abd+cde+efg\n2,8x\n", ["ab+bc+ca+abd+cde+efg", "8x"]),
    "separators.jsonl": ('{"question": "1\u2028", "answer": "2"}'.encode(), ["2"]),  # not the end of the line
}


@pytest.mark.parametrize("name", FILES)
def test_golds_are_what_the_file_says(toy, tmp_path, monkeypatch, name):
    if not name.endswith(".gz"):
        monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail, and takes a second
    content, golds = FILES[name]
    (tmp_path / name).write_bytes(content)
    tokenizer = problems.load_tokenizer(str(toy), "")
    loaded, _ = problems.load_problems(str(tmp_path / name), tokenizer, "question", "answer", "", False, 100)
    assert [problem.answer for problem in loaded] == golds
    if name == "parts.jsonl":
        assert tokenizer.decode(loaded[0].prompt_ids) == "<user>42<assistant>"


def test_parquet_and_columns_with_a_dot(toy, tmp_path):
    path = str(tmp_path / "data.parquet")
    tokenizer = problems.load_tokenizer(str(toy), "")
    for value, gold in ((2, "2"), (1e-05, "0.00001"), (72.0, "72.0"), (2.0**60, None)):
        datasets.Dataset.from_dict({"q.text": ["1+1"], "a.b": [value]}).to_parquet(path)
        load = functools.partial(problems.load_problems, path, tokenizer, "q.text", "a.b", "", False, 100)
        if gold:
            assert load()[0][0].answer == gold
        else:
            with pytest.raises(problems.UserError, match=r"row 0: answer .* may be rounded"):
                load()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Stay silent."""


def test_files_are_read_over_http(toy, tmp_path):
    """Without vLLM, which brings packages of its own, this needs all that requirements.txt names."""
    datasets.Dataset.from_list(read_lines(toy / "train.jsonl")).to_parquet(tmp_path / "train.parquet")
    shutil.copy(toy / "train.jsonl", tmp_path)
    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/train.{suffix}" for suffix in ("parquet", "jsonl")]
        program = "import sys; from support import problems; print(*map(len, map(problems.read_dataset, sys.argv[1:])))"
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", program, *urls], env=env, cwd=ROOT, capture_output=True, text=True)
        server.shutdown()
    assert done.stdout == "7 7\n", done.stderr


# ---- Models --------------------------------------------------------------------------------------


def weights(change):
    """Return a function that changes the weights of a folder."""

    def apply(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def settings(file, **changes):
    """Return a function that changes a JSON file of a folder."""

    def apply(folder):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return apply


def tokens(words, special, template=""):
    """Return a function that adds tokens which the embedding does not have."""

    def apply(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(words, special_tokens=special)
        tokenizer.chat_template = template + tokenizer.chat_template
        tokenizer.save_pretrained(folder)

    return apply


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def damage(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def into_final(folder):
    """Make it a run whose model is in final/."""
    shutil.copytree(folder, folder / "final")
    (folder / "config.json").unlink()


NORM, UP, EMBEDDING = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
GENERATION = "generation_config.json"
LAYERS = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
CODE = {"model_type": "new", "auto_map": {"AutoConfig": "new.Config"}}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PREFIXED = "missing weights (36, such as lm_head.weight) and unexpected weights (35, such as x.model.embed"
BROKEN = {
    "no weight": (weights(lambda w: {k: v for k, v in w.items() if k != UP}), f"missing weights (1, such as {UP})"),
    "another prefix": (weights(lambda w: {f"x.{k}": v for k, v in w.items()}), PREFIXED),
    "fewer layers": (settings("config.json", **LAYERS), "unexpected weights (11, such as model.layers.2."),
    "a value head": (weights(lambda w: w | {"v_head": torch.ones(3)}), "unexpected weights (1, such as v_head)"),
    "another shape": (weights(lambda w: w | {NORM: torch.ones(5)}), f"mismatched weights (1, such as {NORM})"),
    "another head": (weights(lambda w: w | {"lm_head.weight": w[EMBEDDING] + 1}), "set tie_word_embeddings to false"),
    "not a number": (weights(lambda w: w | {UP: w[UP] * torch.nan}), f"the weight {UP} is not finite"),
    "zeros": (weights(lambda w: w | {UP: w[UP] * 0}), f"the weight {UP} is all zeros"),
    "quantized": (settings("config.json", quantization_config={"quant_method": "awq"}), "is quantized: use the model"),
    "truncated": (damage, "model.safetensors is damaged"),
    "a pointer": (text("model.safetensors", LFS), "model.safetensors is a Git LFS pointer: run git lfs pull"),
    "an adapter": (text("adapter_config.json", "{}"), "is an adapter of PEFT: merge it"),
    "a run": (into_final, "has no config.json, so it is not a model; did you mean "),
    "own code": (settings("config.json", **CODE), "it needs trust_remote_code"),
    "no folder": (shutil.rmtree, "is not a folder (a run that is resumed needs it again)"),
    "no tokenizer": (without_tokenizer, "has no tokenizer: copy tokenizer.json"),
    "more tokens": (tokens(["7+"], False), "1 tokens more than the 21 rows of its embedding"),
    "a token of the template": (tokens(["<bos>"], True, "<bos>"), "row 0: its prompt has token id 21, the embedding"),
    "a word as end token": (settings(GENERATION, eos_token_id="1"), "eos_token_id '1' is not an id below 21"),
    "an unknown end token": (settings(GENERATION, eos_token_id=[1, 21]), "eos_token_id 21 is not an id below 21"),
    "beams": (settings(GENERATION, num_return_sequences=4), "generation_config.json: ValueError: Greedy"),
    "torn": (text(GENERATION, "{"), "generation_config.json: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_gets_one_line_from_both_programs(toy, tmp_path, capsys, name):
    change, message = BROKEN[name]
    model, run = shutil.copytree(toy, tmp_path / "model"), tmp_path / "run"
    change(model)
    data = {"train_data": toy / "train.jsonl", "test_data": ""}
    assert oisd.main(toy_arguments(toy, run, **data, model=model)) == 2
    assert evaluate.main(evaluation_arguments(toy, run, model=model)) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith(("oisd: error: ", "evaluate: error: "))]
    assert len(lines) == 2 and all(message in line for line in lines), lines
    assert not (run / "config.toml").exists()


UNUSED_TOKEN = tokens(["<image>"], True), torch.float32  # as in Gemma 3 1B
NO_GENERATION_CONFIG = lambda folder: (folder / "generation_config.json").unlink(), torch.float32
BASE_MODEL = weights(lambda w: {k.removeprefix("model."): v for k, v in w.items()}), torch.float32
BOTH_TIED = weights(lambda w: w | {"lm_head.weight": w[EMBEDDING].clone()}), torch.float32


def in_bfloat16(folder):
    """Write bfloat16 files under a config that names no dtype."""
    weights(lambda w: {k: v.bfloat16() for k, v in w.items()})(folder)
    settings("config.json", dtype=None)(folder)


UNUSUAL = [UNUSED_TOKEN, NO_GENERATION_CONFIG, BASE_MODEL, BOTH_TIED, (in_bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("change,dtype", UNUSUAL)
def test_an_unusual_model_is_trained_and_exported_as_it_was(toy, tmp_path, change, dtype):
    model = shutil.copytree(toy, tmp_path / "model")
    change(model)
    changes = {"model": model, "num_steps": 1, "learning_rate": 1e-9, "test_data": ""}
    assert oisd.main(toy_arguments(toy, tmp_path / "run", **changes)) == 0
    start, final = (load_file(folder / "model.safetensors") for folder in (toy, tmp_path / "run" / "final"))
    assert {tensor.dtype for tensor in final.values()} == {dtype}
    torch.testing.assert_close({name: final[name].float() for name in start}, start, rtol=0.01, atol=1e-6)


# ---- The export ----------------------------------------------------------------------------------


def test_a_legal_generation_config_never_costs_the_export(toy, tmp_path, capsys):
    """Transformers reads these fields, warns, and refuses to write them."""
    model, run = shutil.copytree(toy, tmp_path / "model"), tmp_path / "run"
    beams = {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}
    settings("generation_config.json", do_sample=False, top_p=0.9, repetition_penalty=1.1, **beams)(model)
    assert oisd.main(toy_arguments(toy, run, model=model, num_steps=1)) == 0
    shown = capsys.readouterr().out
    for name in ("early_stopping", "length_penalty", "top_p"):
        assert f"final/generation_config.json will lack {name}, which has no effect" in shown
    final = GenerationConfig.from_pretrained(run / "final")
    assert (final.eos_token_id, final.repetition_penalty, final.top_p) == (1, 1.1, None)


@pytest.mark.parametrize("call,status", [(1, 2), (2, 1)])
def test_the_export_is_tried_before_the_first_step(toy, tmp_path, monkeypatch, capsys, call, status):
    """Should it fail after the last one nevertheless, the checkpoint has everything, and resuming exports it."""
    run, write, calls = tmp_path / "run", run_folder.write_model, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise ValueError("no such\nthing")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_model", failing)
        assert oisd.main(toy_arguments(toy, run, num_steps=1)) == status
    shown = capsys.readouterr().err
    if call == 1:
        assert "error: final/ could not be written after the training: ValueError: no such thing" in shown
        assert not run.exists()
    else:
        assert f"{run / 'final'} was not written: ValueError: no such thing; step_000001 is complete" in shown
        assert oisd.main(["--resume", str(run)]) == 0 and (run / "final" / "model.safetensors").exists()


def test_an_evaluation_that_fails_costs_no_training(toy, tmp_path, monkeypatch):
    run, score, steps = tmp_path / "run", oisd.report_accuracy, []

    def failing(run):
        steps.append(run.state["step"])
        if steps == [0, 2]:
            raise RuntimeError("the engine died")
        score(run)

    monkeypatch.setattr(oisd, "report_accuracy", failing)
    with pytest.raises(RuntimeError):
        oisd.main(toy_arguments(toy, run, num_steps=2, checkpoint_every=0))
    assert (run / "checkpoints" / "step_000002").exists()
    for steps_in_all in (2, 3):
        assert oisd.main(["--resume", str(run), f"--num_steps={steps_in_all}"]) == 0
    assert list(json.loads((run / "held_out.json").read_text())) == ["0", "2", "3"]


# ---- Resuming ------------------------------------------------------------------------------------

CHANGES = {
    "weights": (weights(lambda w: w | {UP: w[UP] * 2}), "model.safetensors is "),
    "end tokens": (settings("generation_config.json", eos_token_id=[1, 2]), "end_tokens is [1, 2], was [1]"),
    "config": (settings("config.json", rms_norm_eps=1e-3), "config.json is "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_adapters_resume_on_the_same_model_only(toy, tmp_path, capsys, name):
    change, message = CHANGES[name]
    model, run = shutil.copytree(toy, tmp_path / "model"), tmp_path / "run"
    assert oisd.main(toy_arguments(toy, run, model=model, num_steps=1, lora_rank=2)) == 0
    (model / "README.md").write_text("is not read")
    (model / "trainer_state.json").write_text("neither")
    assert oisd.main(["--resume", str(run), "--num_steps=2"]) == 0
    change(model)
    assert oisd.main(["--resume", str(run), "--num_steps=3"]) == 2
    assert f"what {run} started with has changed: {message}" in capsys.readouterr().err


def flip(folder):
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(pattern, size):
    def apply(folder):
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[:size])

    return apply


@pytest.mark.parametrize("change", [flip, cut("*.distcp", 0), cut(".metadata", 9), cut("state.json", 9)])
def test_a_damaged_checkpoint_is_named_with_the_way_around_it(toy, tmp_path, capsys, change):
    run = tmp_path / "my run"
    assert oisd.main(toy_arguments(toy, run, num_steps=3, checkpoint_every=1)) == 0
    before = read_metrics(run)
    change(run / "checkpoints" / "step_000003")
    assert oisd.main(["--resume", str(run)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{run}/checkpoints/step_000003 cannot be read: " in line and "continue from step_000002 with: mv " in line
    move, _, resume = line.partition(" with: ")[2].partition(" && ")
    subprocess.run(move, shell=True, check=True)
    assert oisd.main(shlex.split(resume.removeprefix("python oisd.py "))) == 0
    assert read_metrics(run) == before


def test_vllm_gets_checked_weights_too(toy, tmp_path, monkeypatch, capsys):
    """It would evaluate them without a word."""
    model = shutil.copytree(toy, tmp_path / "model")
    weights(lambda w: w | {UP: w[UP] * torch.nan})(model)
    monkeypatch.setattr(oisd, "VllmSampler", pytest.fail)
    assert evaluate.main(evaluation_arguments(toy, tmp_path / "run", model=model, sampler="vllm")) == 2
    assert f"the weight {UP} is not finite" in capsys.readouterr().err


def test_one_problem_has_no_standard_error(toy, tmp_path):
    """Written as null: NaN is no JSON."""
    data = write_lines(tmp_path / "one.jsonl", [{"question": "1+1", "answer": "2"}])
    assert oisd.main(toy_arguments(toy, tmp_path / "run", num_steps=1, test_data=data)) == 0
    assert json.loads((tmp_path / "run" / "held_out.json").read_text())["0"]["standard_error"] is None
    assert evaluate.main(evaluation_arguments(toy, tmp_path / "eval", benchmarks=f"sums={data}")) == 0
    summary = (tmp_path / "eval" / "summary.json").read_text()
    assert json.loads(summary, parse_constant=pytest.fail)["figures"]["sums"]["Avg@K"][1] is None
    assert "±" not in (tmp_path / "eval" / "table.md").read_text().partition("Problems x")[0]
