"""All that only the laptop default needs: its model and its sums, and a sampler without vLLM.

`python laptop.py` makes `tiny_model/` in about a minute on two cores, and `--slip` a better or a worse one: an ordinary
Hugging Face folder (Qwen3ForCausalLM, float32, own tokenizer, chat template) with `train.jsonl` and `test.jsonl` beside
the weights. Nothing is downloaded, and the rest of the project treats it like any other model and data set.

    question   47+8+5+9          response   47+8=55,55+5=60,60+9=69 \\boxed{69}

What the model has seen: first demonstrations by careful pupils, then by careless ones. A careless pupil, with
probability `SLIP` in each step, replaces one digit of the result by a random one and carries on from it. Supervised
fine-tuning thus teaches how to add *and* how often to slip, as imitating web text would; sampling at temperature 1
reproduces both. Reinforcement learning with a verifiable reward can keep the one and unlearn the other. The start is
weak on purpose and by a known cause: greedy decoding is nearly always right from the beginning, so what RL gains is
reliability in a skill already present, not a new skill. It tests a program; it says little about real reasoning.

A quarter of the demonstrations show the solution in the prompt, `47+8+5+9=47+8=55,...`, and are always careful: so the
model can make use of a solution that it is given, as `baselines/opsd.py` takes for granted of its teacher.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import trange
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from settings import UserError

if TYPE_CHECKING:
    from oisd import Config

FOLDER = Path("tiny_model")
SEED = 0
SEGMENT = 32  # tokens after which sequences that have ended leave the batch
SUMMANDS = 4
TRAIN, TEST = 4096, 512  # problems
STEPS, CARELESS_STEPS, BATCH, LR = 220, 50, 32, 1e-2  # supervised fine-tuning; the last CARELESS_STEPS see slips
SLIP = 0.35  # share of steps that go wrong in a careless demonstration
SHOWN = 0.25  # share of demonstrations whose prompt shows the solution
VOCABULARY = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *"0123456789+=, }", "\\boxed{"]
# Of a conversation only user and assistant turns are rendered. System messages are ignored: a model this small knows no
# words, and needs no instructions for the one thing it does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}{% endif %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def draw_question(rng):
    return "+".join(str(n) for n in [rng.randint(10, 69), *(rng.randint(1, 9) for _ in range(SUMMANDS - 1))])


def solve(question):
    return str(sum(int(summand) for summand in question.split("+")))


def demonstrate(question, slip, rng):
    """The sum written out step by step; each step goes wrong with probability `slip`."""
    total, *rest = question.split("+")
    steps = []
    for summand in rest:
        result = str(int(total) + int(summand))
        if rng.random() < slip:
            place = rng.randrange(len(result))
            others = set("0123456789" if place else "123456789") - {result[place]}
            result = result[:place] + rng.choice(sorted(others)) + result[place + 1 :]
        steps.append(f"{total}+{summand}={result}")
        total = result
    return ",".join(steps) + f" \\boxed{{{total}}}"


def make_tokenizer():
    """One token per character, and one for `\\boxed{`; decoding joins tokens without spaces."""
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


def prompt_of(question, tokenizer):
    message = {"role": "user", "content": question}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def draw_batch(tokenizer, slip, held_out, rng):
    """Token ids and labels of BATCH demonstrations; the labels cover the response and its <eos> only."""
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
        texts.append(prompt_of(prompt, tokenizer) + answer + tokenizer.eos_token)
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
    starts = (ids == tokenizer.convert_tokens_to_ids("<assistant>")).int().argmax(dim=1, keepdim=True)
    outside = (torch.arange(ids.shape[1]) <= starts) | (ids == tokenizer.pad_token_id)
    return ids, ids.masked_fill(outside, -100)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations: here it learns addition in half of Adam's steps.

    `torch.optim.Muon` does the same in bfloat16, which many laptops only emulate; this one stays in float32 and
    takes all matrices of one shape at once.
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


def fine_tune(model, tokenizer, held_out, rng, slip, careless_steps):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=LR), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    ramps = [lambda step: min((step + 1) / 20, (STEPS - step) / (0.3 * STEPS), 1.0)] * 2
    schedules = [torch.optim.lr_scheduler.LambdaLR(*pair) for pair in zip(optimizers, ramps)]
    for step in (bar := trange(STEPS, desc="making tiny_model")):
        ids, labels = draw_batch(tokenizer, slip if step >= STEPS - careless_steps else 0.0, held_out, rng)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedules:
            part.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(model, tokenizer, questions):
    """Share of right answers, one response per question sampled at temperature 1."""
    prompts = tokenizer([prompt_of(q, tokenizer) for q in questions], return_tensors="pt", padding=True)
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=64)
    texts = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(t.endswith(f"\\boxed{{{solve(q)}}}") for t, q in zip(texts, questions)) / len(questions)


def write_problems(path, questions):
    rows = ({"question": q, "answer": solve(q), "solution": demonstrate(q, 0.0, random.Random(0))} for q in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder=FOLDER, slip=SLIP, careless_steps=CARELESS_STEPS):
    """Make the model folder, or leave it alone if this very file has made it so. Returns its path."""
    folder = Path(folder)
    making = Path(__file__).read_text(encoding="utf-8").partition("\n# -----")[0]  # this part of the file
    made_by = hashlib.sha256(f"{making}{slip} {careless_steps}".encode()).hexdigest()
    if (folder / "made_by").exists() and (folder / "made_by").read_text() == made_by:
        return folder
    if folder.exists() and not (folder / "made_by").exists():
        raise UserError(f"{folder} stands in the way of the laptop's model, which is made there: move or rename it")
    rng = random.Random(SEED)
    problems = {}  # a dict, as a set that remembers its order
    while len(problems) < TRAIN + TEST:
        problems[draw_question(rng)] = None
    problems = list(problems)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        fine_tune(model, tokenizer, set(problems), rng, slip, careless_steps)
    # Built beside its place and renamed at the end: nobody ever sees half a folder.
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-"))
    os.chmod(work, 0o755)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    write_problems(work / "train.jsonl", problems[:TRAIN])
    write_problems(work / "test.jsonl", problems[TRAIN:])
    (work / "made_by").write_text(made_by)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    return folder


# ----------------------------------------------------- Rollouts without vLLM ----------------------------------------


class SeededSampling(LogitsProcessor):
    """Draws each sequence's next token with that sequence's own generator, and records its log-prob.

    Gumbel-max: argmax(log p - log E), with E ~ Exp(1), is a sample from p. So greedy decoding of what this returns
    samples, one sequence's draws depend on its seed alone, and the logits of past steps need not be kept.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, end_ids: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.end_ids = temperature, set(end_ids)
        self.logprobs: list[list[float]] = [[] for _ in seeds]
        self.finished = [False] * len(seeds)
        self.rows = list(range(len(seeds)))  # the sequence of each row of the running batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)  # (b, V)
        noise = torch.ones(scores.shape)
        for row, index in enumerate(self.rows):
            if not self.finished[index]:
                noise[row].exponential_(generator=self.generators[index])
        perturbed = logprobs - noise.to(logprobs.device).log()
        tokens = perturbed.argmax(dim=-1, keepdim=True)
        drawn = zip(self.rows, tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist())
        for index, token, logprob in drawn:
            if not self.finished[index]:
                self.logprobs[index].append(logprob)
                self.finished[index] = token in self.end_ids
        return perturbed


class HfSampler:
    """Rollouts by Transformers' own `generate`, from the very weights that are trained. Slow for large models.

    `root`: the module to generate within, where weights are sharded: they are whole only there. `device`: of the
    computation; offloaded weights lie elsewhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: list[int],
        config: "Config",
        device: torch.device,
        root: Callable | None = None,
    ):
        # The model's own generation config goes: top-k or a penalty would bias every ratio.
        model.generation_config = GenerationConfig(eos_token_id=end_ids)
        self.model, self.end_ids, self.device, self.root = model, end_ids, device, root
        self.temperature, self.max_response_tokens = config.temperature, config.max_response_tokens
        self.batch, self.bfloat16 = config.sampler_batch, config.dtype == "bfloat16"
        self.ranks = dist.get_world_size() if root is not None and dist.is_initialized() else 1

    def sync(self, model: PreTrainedModel) -> None:
        """Nothing to do: these are the weights."""

    def sleep(self) -> None:
        """Nothing to do: it has no memory of its own."""

    close = sleep

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[tuple[int, list[int], list[float], str]]:
        """A response per prompt and seed, batch by batch: its index, token ids, their log-probs, finish reason."""
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding per batch
        batches = [by_length[start : start + self.batch] for start in range(0, len(prompts), self.batch)]
        if self.ranks > 1:  # weights are gathered layer by layer from all ranks, so all take part to the end
            most = torch.tensor(len(batches), device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            batches += [[]] * (int(most) - len(batches))
        for indices in batches:
            batch = [(prompts[i], seeds[i]) for i in indices] or [([self.end_ids[0]], 0)]
            yield from ((i, *sample) for i, sample in zip(indices, self._generate(*map(list, zip(*batch)))))

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], list[float], str]]:
        """A batch, `SEGMENT` tokens at a time; after each the sequences that have ended leave it.

        Where weights are sharded all ranks make the same calls, so there it is one, to the end.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.end_ids[0]] * (longest - len(ids)) + ids for ids in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        sampling = SeededSampling(seeds, self.temperature, self.end_ids)
        responses: list[list[int]] = [[] for _ in prompts]
        cache, left = None, self.max_response_tokens
        was_training = self.model.training
        self.model.eval()
        while left and sampling.rows:
            generate = functools.partial(
                self.model.generate,
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([sampling]),
                do_sample=False,
                max_new_tokens=left if self.ranks > 1 else min(left, SEGMENT),
                eos_token_id=self.end_ids,
                pad_token_id=self.end_ids[0],
                synced_gpus=self.ranks > 1,
                return_dict_in_generate=True,
            )
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                output = generate() if self.root is None else self.root(generate)
            new, cache = output.sequences[:, ids.shape[1] :], output.past_key_values
            left -= new.shape[1]
            for index, tokens in zip(sampling.rows, new.tolist()):
                responses[index] += tokens
            going = [row for row, index in enumerate(sampling.rows) if not sampling.finished[index]]
            ids, mask = output.sequences[going], torch.cat([mask, torch.ones_like(new)], dim=1)[going]
            if 0 < len(going) < len(sampling.rows):
                cache.batch_select_indices(torch.tensor(going, device=self.device))
            sampling.rows = [sampling.rows[row] for row in going]
        self.model.train(was_training)
        return [
            (response[: len(logprobs)], logprobs, "stop" if finished else "length")
            for response, logprobs, finished in zip(responses, sampling.logprobs, sampling.finished)
        ]


def main():
    parser = argparse.ArgumentParser(description="Make the laptop's model and its sums.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--slip", type=float, default=SLIP, help="share of careless steps that go wrong (%(default)s)")
    parser.add_argument("--careless-steps", type=int, default=CARELESS_STEPS, help=f"of {STEPS} (%(default)s)")
    options = parser.parse_args()
    if not (0 <= options.slip <= 1 and 0 <= options.careless_steps <= STEPS):
        parser.error(f"--slip is a share, 0 to 1, and --careless-steps are of {STEPS}")
    start = time.perf_counter()
    try:
        folder = make(options.folder, options.slip, options.careless_steps)
    except UserError as problem:
        parser.error(str(problem))
    seconds = time.perf_counter() - start
    model = Qwen3ForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    questions = [json.loads(line)["question"] for line in (folder / "test.jsonl").open()][:256]
    torch.manual_seed(SEED)
    share = accuracy(model, tokenizer, questions)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, made in {seconds:.0f} s")
    print(f"{100 * share:.0f} % of {len(questions)} held-out sums right at temperature 1")


if __name__ == "__main__":
    main()
