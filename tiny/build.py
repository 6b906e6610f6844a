"""Build what `tiny/` ships: sums, and three small models that add them carelessly.

    python tiny/build.py                                  all of it; 15 minutes on one core
    python tiny/build.py --slip 0.5 --folder runs/half    one more start model

    question   47+8+5+9          response   47+8=55,55+5=60,60+9=69 \\boxed{69}

The models learn from written-out sums: from careful pupils first, then from careless ones. In each
step, a careless pupil replaces one digit of the result with probability `slip` and continues from
there. A model learns how to add *and* how often to slip, as it would from web text. RL with a
verifiable reward can keep the skill and unlearn the slips. Greedy decoding is nearly always
correct, so RL adds reliability, not a skill. It says little about real reasoning.

A quarter of the demonstrations show a solution in the prompt, `47+8+5+9=47+8=55,...`, with slips of
its own, and repeat it. The model thus learns to follow a given solution, which OPSD expects of its
teacher.
"""

import argparse
import copy
import hashlib
import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
SEED = 0
TERMS = {"sums": range(2, 9), "four": [4]}  # data sets, and how many terms their sums may have
TRAIN = 2048  # problems
TEST = 512
BATCH = 64  # demonstrations per step
CAREFUL = {"steps": 800, "learning_rate": 3e-3}
CARELESS = {"steps": 120, "learning_rate": 1e-3}
SHOWN = 0.25  # share of demonstrations whose prompt shows a solution
SHOWN_SLIP = 0.5  # share of its wrong steps; of a correct one, the model would only read the sum
SLIPS = {"weak": 0.65, "middle": 0.35, "strong": 0.16}  # share of a careless pupil's wrong steps
VOCABULARY = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *"0123456789+=, }", "\\boxed{"]
# System messages are not rendered, because this model knows no words.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}{% endif %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


# ---- Problems ----------------------------------------------------------------------------------


def draw_question(terms, rng):
    """Draw a two-digit number and single digits to add to it; no partial sum exceeds 99."""
    count = rng.choice(terms)
    first = rng.randint(10, 99 - 9 * (count - 1))
    return "+".join(map(str, [first, *(rng.randint(1, 9) for _ in range(count - 1))]))


def demonstrate(question, slip, rng):
    """Write the sum out step by step; each step goes wrong with probability `slip`."""
    total, *rest = question.split("+")
    steps = []
    for term in rest:
        result = str(int(total) + int(term))
        if rng.random() < slip:
            place = rng.randrange(len(result))
            digits = "0123456789" if place else "123456789"  # no leading zero
            digit = rng.choice(sorted(set(digits) - {result[place]}))
            result = result[:place] + digit + result[place + 1 :]
        steps.append(f"{total}+{term}={result}")
        total = result
    return ",".join(steps) + f" \\boxed{{{total}}}"


def draw_problems(terms):
    """Draw different questions: -> those to train on, and those held out."""
    rng = random.Random(SEED)
    questions = {}  # the keys are a set that keeps its order
    while len(questions) < TRAIN + TEST:
        questions[draw_question(terms, rng)] = None
    return list(questions)[:TRAIN], list(questions)[TRAIN:]


def write_problems(path, questions):
    """Write a line per question, with its answer and a solution without slips."""
    rows = []
    for question in questions:
        solution = demonstrate(question, 0.0, random.Random(0))
        answer = str(sum(map(int, question.split("+"))))
        rows.append({"question": question, "answer": answer, "solution": solution})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Model -------------------------------------------------------------------------------------


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
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer):
    """Build a Qwen3 with random weights."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def draw_batch(tokenizer, slip, excluded, rng):
    """Draw demonstrations: -> token ids and labels, (BATCH, T); -100 outside the response."""
    texts = []
    while len(texts) < BATCH:
        question = draw_question(TERMS["sums"], rng)
        if question in excluded:
            continue
        shown = len(texts) < SHOWN * BATCH
        answer = demonstrate(question, SHOWN_SLIP if shown else slip, rng)
        prompt = f"{question}={answer}" if shown else question
        texts.append(f"<user>{prompt}<assistant>{answer}<eos>")
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
    is_start = ids == tokenizer.convert_tokens_to_ids("<assistant>")
    starts = is_start.int().argmax(dim=1, keepdim=True)
    outside = (torch.arange(ids.shape[1]) <= starts) | (ids == tokenizer.pad_token_id)
    return ids, ids.masked_fill(outside, -100)


def fine_tune(model, tokenizer, excluded, slip, steps, learning_rate):
    """Train on demonstrations, with warm-up and linear decay."""
    rng = random.Random(f"{SEED}, {slip}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        ramp = min((step + 1) / 20, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * ramp
        ids, labels = draw_batch(tokenizer, slip, excluded, rng)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"slip {slip}, step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


# ---- Everything --------------------------------------------------------------------------------


def build(slips, folder):
    """Train a careful model, then a careless one for each slip, into `folder/NAME`."""
    torch.set_num_threads(1)  # sums of several threads depend on how many there are
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    careful = make_model(tokenizer)
    problems = [questions for terms in TERMS.values() for questions in draw_problems(terms)]
    excluded = {question for questions in problems for question in questions}
    fine_tune(careful, tokenizer, excluded, 0.0, **CAREFUL)
    for name, slip in slips.items():
        model = copy.deepcopy(careful)
        fine_tune(model, tokenizer, excluded, slip, **CARELESS)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def main():
    parser = argparse.ArgumentParser(description="Build the problems and the start models.")
    parser.add_argument("--slip", type=float, help="one model only: share of steps that go wrong")
    parser.add_argument("--folder", type=Path, default=HERE, help="where to write [tiny]")
    options = parser.parse_args()
    if options.slip is not None:
        if not 0 <= options.slip <= 1:
            parser.error(f"--slip {options.slip}: it must be 0 to 1")
        if options.folder == HERE:
            parser.error("--slip needs the --folder of the new model")
        return build({"": options.slip}, options.folder)
    for name, terms in TERMS.items():
        (options.folder / name).mkdir(parents=True, exist_ok=True)
        for file, questions in zip(("train.jsonl", "test.jsonl"), draw_problems(terms)):
            write_problems(options.folder / name / file, questions)
    build(SLIPS, options.folder)
    files = sorted([*options.folder.glob("*/*.jsonl"), *options.folder.glob("*/*.safetensors")])
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(options.folder)}\n"
        for path in files
    ]
    (options.folder / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
