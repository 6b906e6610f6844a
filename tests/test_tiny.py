"""The start models and sums that ship: what they are, and that they are what their builder writes."""

import hashlib
import random

import pytest
from tiny import build
from transformers import AutoTokenizer

from conftest import ROOT, read_lines

TINY = ROOT / "tiny"
HASHES = dict(reversed(line.split("  ")) for line in (TINY / "SHA256SUMS").read_text().splitlines())
SETS = [(name, file) for name in build.TERMS for file in ("train.jsonl", "test.jsonl")]


@pytest.mark.parametrize("file", HASHES)
def test_a_shipped_file_is_the_one_that_was_built(file):
    assert hashlib.sha256((TINY / file).read_bytes()).hexdigest() == HASHES[file]


@pytest.mark.parametrize("name", build.TERMS)
def test_the_builder_writes_the_shipped_problems(name, tmp_path):
    for file, questions in zip(("train.jsonl", "test.jsonl"), build.draw_problems(build.TERMS[name])):
        build.write_problems(tmp_path / file, questions)
        assert (tmp_path / file).read_bytes() == (TINY / name / file).read_bytes()


@pytest.mark.parametrize(("name", "file"), SETS)
def test_golds_are_the_sums_and_solutions_reach_them(name, file):
    for row in read_lines(TINY / name / file):
        terms = row["question"].split("+")
        *steps, last = row["solution"].split(",")
        last, box = last.split(" ")
        assert len(terms) in build.TERMS[name] and sum(map(int, terms)) == int(row["answer"])
        assert box == rf"\boxed{{{row['answer']}}}" and last.endswith(f"={row['answer']}")
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in [*steps, last]))


def test_no_held_out_sum_of_a_set_is_trained_on():
    questions = [[row["question"] for row in read_lines(TINY / name / file)] for name, file in SETS]
    for train, test in zip(questions[::2], questions[1::2]):
        assert len({*train, *test}) == len(train) + len(test)


@pytest.mark.parametrize("model", build.SLIPS)
def test_the_builder_makes_the_shipped_tokenizer(model):
    shipped, built = AutoTokenizer.from_pretrained(TINY / model), build.make_tokenizer()
    assert shipped.get_vocab() == built.get_vocab() and shipped.chat_template == built.chat_template
    text = "<user>47+8<assistant>47+8=55 \\boxed{55}<eos>"
    assert shipped(text).input_ids == built(text).input_ids and shipped.decode(shipped(text).input_ids) == text


def test_a_careless_pupil_slips_in_each_step_with_the_same_probability():
    rng, wrong = random.Random(0), []
    for _ in range(4000):
        question = build.draw_question([4], rng)
        steps = [step.split(" ")[0].split("=") for step in build.demonstrate(question, 0.35, rng).split(",")]
        wrong.append([eval(left) != int(right) for left, right in steps])
    for place in zip(*wrong):
        assert sum(place) / len(place) == pytest.approx(0.35, abs=0.03)  # four standard errors
