"""Verdicts on answers, and worker processes that may hang or die."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import grader as grading
from support import problems
from tools import grading as made

from conftest import PAPER_DATA, ROOT, needs_paper_data

LINES = (ROOT / "tests" / "grading.tsv").read_text(encoding="utf-8").splitlines()
CASES = [line.split("\t") for line in LINES if not line.startswith("#")]
HOSTILE = [r"9^{9^{9^9}}", "100000!!", r"\gcd(9^{9^9}, 6)", "{" * 10**6 + "}" * 10**6]
HALF = [r"\boxed{0.5}"], [r"\frac24"]  # correct, but not spelled alike


def worker_of(grader):
    return grader._idle.queue[-1]


def test_verdicts():
    golds, responses, verdicts = zip(*CASES)
    with grading.Grader(workers=2, seconds=10.0) as grader:
        found = grader.grade(list(responses), list(golds))
        assert grader.failures == 0
        assert grader.grade(["\\boxed{\n9\t}"], ["9.0"]) == [1.0]
        assert grader.check_golds([r"\frac12", r"\boxed{", "3", "", r"\$", r"\,"]) == [1, 3, 4, 5]
    expected = [float(verdict == "right") for verdict in verdicts]
    assert [case for case, one, other in zip(CASES, found, expected) if one != other] == []


@needs_paper_data
def test_answers_made_by_rule():
    rows = problems.read_dataset(str(PAPER_DATA / "math500.parquet"))
    pairs = made.make_pairs([row["reward_model"]["ground_truth"] for row in rows], count=60)
    errors = made.count_errors(pairs, made.ours)
    assert {kind: count for kind, count in errors.items() if count} == {}


def test_boxes_are_found_in_linear_time():
    start = time.monotonic()
    for piece in ("{", "}", r"\boxed{", r"\boxed{}", r"\boxed ", "\\", " "):
        grading.extract_boxed(r"\boxed{" + piece * (10**6 // len(piece)))
    assert time.monotonic() - start < 20  # 3 seconds alone; hours if it were quadratic


def test_hostile_answers_and_a_stopped_worker_cost_their_time_and_no_more():
    with grading.Grader(workers=2, seconds=1.0) as grader:
        start = time.monotonic()
        verdicts = grader.grade([rf"\boxed{{{answer}}}" for answer in HOSTILE], ["7"] * len(HOSTILE))
        assert verdicts == [0.0] * len(HOSTILE)
        assert time.monotonic() - start < 30  # a second each by two workers, and their replacements
        assert grader.timeouts >= 3 and grader.crashes == 0
        assert grader.grade(*HALF) == [1.0]
        time.sleep(1.2)  # the clock does not run while a worker is idle
        assert worker_of(grader).poll() is None
        os.kill(worker_of(grader).pid, signal.SIGSTOP)
        assert grader.grade([r"\boxed{0.25}"], [r"\frac28"]) == [0.0] and grader.crashes == 1
        assert grader.grade([r"\boxed{0.25}"], [r"\frac28"]) == [1.0]


def test_a_worker_that_dies_is_replaced():
    with grading.Grader(workers=1, seconds=60.0) as grader:
        assert grader.grade(*HALF) == [1.0]
        threading.Timer(0.5, worker_of(grader).kill).start()
        assert grader.grade([rf"\boxed{{{HOSTILE[0]}}}"], ["7"]) == [0.0]
        assert grader.grade([r"\boxed{0.75}"], [r"\frac34"]) == [1.0]
        worker_of(grader).kill()  # one that dies while it is idle costs no verdict
        worker_of(grader).wait()
        assert grader.grade([r"\boxed{0.25}"], [r"\frac28"]) == [1.0]
        assert (grader.timeouts, grader.crashes) == (0, 1)
        worker = worker_of(grader)
    assert worker.poll() is not None  # ended with the block


PARENT = r"""
from support.grader import Grader
grader = Grader(2, 2.0)
grader.grade([r"\boxed{1}", r"\boxed{2}"], ["3", "3"])
print(*[worker.pid for worker in grader._idle.queue], flush=True)
grader.grade([r"\boxed{9^{9^{9^9}}}"], ["3"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT)
    pids = parent.stdout.readline().split()
    time.sleep(0.3)  # one worker is stuck in C code now, the other one idle
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{int(pid)}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
