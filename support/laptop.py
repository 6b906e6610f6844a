"""Build the laptop's model and task: a 1.2 M-parameter model that adds four numbers.

    python -m support.laptop [FOLDER] [--slip S]

builds an ordinary Hugging Face folder (Qwen3ForCausalLM, float32, own tokenizer and chat template)
with `train.jsonl` and `test.jsonl` next to the weights. This takes about a minute on two cores and
downloads nothing. `--slip` gives a better or a worse model.

    question   47+8+5+9          response   47+8=55,55+5=60,60+9=69 \\boxed{69}

The training demonstrations come from careful pupils first, then from careless ones. In each step, a
careless pupil replaces one digit of the result with probability `SLIP` and continues from there.
The model learns how to add *and* how often to slip, as it would from web text. RL with a verifiable
reward can keep the skill and unlearn the slips. The start is weak on purpose: greedy decoding is
nearly always correct, so RL adds reliability, not a skill. It says little about real reasoning.

A quarter of the demonstrations show the solution in the prompt, `47+8+5+9=47+8=55,...`, and are
always careful. The model can thus use a given solution, which OPSD expects of its teacher.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from support.settings import UserError

FOLDER = Path("tiny_model")
SEED = 0
SUMMANDS = 4
TRAIN = 4096  # problems
TEST = 512
STEPS = 220  # of supervised fine-tuning
CARELESS_STEPS = 50  # the last ones, with careless demonstrations
BATCH = 32  # demonstrations per step
LR = 1e-2  # of Muon
SLIP = 0.35  # share of steps that go wrong in a careless demonstration
SHOWN = 0.25  # share of demonstrations whose prompt shows the solution
VOCABULARY = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *"0123456789+=, }", "\\boxed{"]
# System messages are not rendered, because this model knows no words.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}{% endif %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def draw_question(rng):
    summands = [rng.randint(10, 69), *(rng.randint(1, 9) for _ in range(SUMMANDS - 1))]
    return "+".join(map(str, summands))


def demonstrate(question, slip, rng):
    """Write the sum out step by step; each step goes wrong with probability `slip`."""
    total, *rest = question.split("+")
    steps = []
    for summand in rest:
        result = str(int(total) + int(summand))
        if rng.random() < slip:
            place = rng.randrange(len(result))
            digits = "0123456789" if place else "123456789"  # no leading zero
            digit = rng.choice(sorted(set(digits) - {result[place]}))
            result = result[:place] + digit + result[place + 1 :]
        steps.append(f"{total}+{summand}={result}")
        total = result
    return ",".join(steps) + f" \\boxed{{{total}}}"


def make_tokenizer():
    """Give each character a token, and `\\boxed{` one; decoding joins tokens without spaces."""
    words = models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer):
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def draw_batch(tokenizer, slip, held_out, rng):
    """Return token ids and labels of BATCH demonstrations; labels cover the response and <eos>."""
    questions = []
    while len(questions) < BATCH:
        question = draw_question(rng)
        if question not in held_out:
            questions.append(question)
    texts = []
    for place, question in enumerate(questions):
        shown = place < SHOWN * BATCH
        prompt = f"{question}={demonstrate(question, 0.0, rng)}" if shown else question
        answer = demonstrate(question, 0.0 if shown else slip, rng)
        texts.append(f"<user>{prompt}<assistant>{answer}<eos>")
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
    is_start = ids == tokenizer.convert_tokens_to_ids("<assistant>")
    starts = is_start.int().argmax(dim=1, keepdim=True)
    outside = (torch.arange(ids.shape[1]) <= starts) | (ids == tokenizer.pad_token_id)
    return ids, ids.masked_fill(outside, -100)


class Muon(torch.optim.Optimizer):
    """Orthogonalise momentum by Newton-Schulz iterations: learns addition in half of Adam's steps.

    `torch.optim.Muon` does the same in bfloat16, which many laptops only emulate. This one stays in
    float32 and updates all matrices of the same shape at once.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                params = [p for p in group["params"] if p.shape == shape]
                grads = torch.stack([p.grad for p in params])
                average = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
                average.lerp_(grads, 1 - group["momentum"])
                x = grads.lerp(average, group["momentum"])
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if shape[0] > shape[1] else x
                for p, update in zip(params, x):
                    p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def fine_tune(model, tokenizer, held_out, rng, slip):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=LR)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    # warm-up over 20 steps; decay to 0 over the last 30 %
    ramp = [min((step + 1) / 20, (STEPS - step) / (0.3 * STEPS), 1.0) for step in range(STEPS + 1)]
    schedules = [LambdaLR(optimizer, ramp.__getitem__) for optimizer in (muon, adam)]
    for step in (bar := trange(STEPS, desc="building the model")):
        careless = step >= STEPS - CARELESS_STEPS
        ids, labels = draw_batch(tokenizer, slip if careless else 0.0, held_out, rng)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (muon, adam, *schedules):
            part.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def write_problems(path, questions):
    rows = []
    for question in questions:
        solution = demonstrate(question, 0.0, random.Random(0))
        answer = str(sum(map(int, question.split("+"))))
        rows.append({"question": question, "answer": answer, "solution": solution})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder=FOLDER, slip=SLIP):
    """Build the model folder, unless this version of the file has built it. Return its path."""
    folder = Path(folder)
    source = Path(__file__).read_text(encoding="utf-8")
    made_by = hashlib.sha256(f"{source}{slip}".encode()).hexdigest()
    stamp = folder / "made_by"
    if stamp.exists() and stamp.read_text() == made_by:
        return folder
    if folder.exists() and not stamp.exists():
        raise UserError(f"{folder} already exists and was not created by laptop.py; move it")
    rng = random.Random(SEED)
    problems = {}  # the keys are a set that keeps its order
    while len(problems) < TRAIN + TEST:
        problems[draw_question(rng)] = None
    problems = list(problems)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        fine_tune(model, tokenizer, set(problems), rng, slip)
    # Write to a temporary folder and rename it, so that the folder is always complete.
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-"))
    work.chmod(0o755)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    write_problems(work / "train.jsonl", problems[:TRAIN])
    write_problems(work / "test.jsonl", problems[TRAIN:])
    (work / "made_by").write_text(made_by)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description="Build the laptop's model and its sums.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--slip", type=float, default=SLIP, help="share of steps that go wrong")
    options = parser.parse_args()
    if not 0 <= options.slip <= 1:
        parser.error(f"--slip {options.slip}: it must be 0 to 1")
    try:
        folder = make(options.folder, options.slip)
    except UserError as problem:
        parser.error(str(problem))
    print(folder)


if __name__ == "__main__":
    main()
