"""Verdicts on answers, and worker processes that may hang or die."""

import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PAPER_DATA, ROOT, needs_paper_data

import grader as grading

RIGHT = r"""
0.5                  | \frac12
\dfrac{1}{2}         | \frac{1}{2}
\frac65              | 1\frac15
\frac13              | 0.333333
\frac{\pi}{10}       | 0.1\pi
0.0000672            | 6.72 \times 10^{-5}
42                   | 42.
42                   | 42.0
42                   | $42$.
42                   | \(42\)
42                   | \text{42.}
3                    | x = 3
x=3                  | 3
-\frac{\pi}{4}       | \frac{-\pi}{4}
\frac{1}{\sqrt2}     | \frac{\sqrt{2}}{2}
x^2+2x+1             | (x+1)^2
5x-7y=4              | 10x - 14y = 8
\{1,2\}              | \{2, 1\}
1,2                  | 2 \text{ and } 1
(3,\frac12)          | (3, 0.5)
(-\infty,1)\cup(2,3] | (2,3]\cup(-\infty,1)
x \in [-2,7]         | [-2, 7]
50\%                 | 0.5
50\%                 | 50
\$32,\!348           | 32348
58,500               | 58500
335{,}670            | 335\,670
1234567              | 1 234 567
1,200                | 1{,}200 \text{ cm}
90^\circ             | 90
15\mbox{ cm}^2       | 15
\frac{270}7\text{ degrees} | \frac{270}{7}^\circ
\text{Evelyn}        | Evelyn
Yes                  | \text{yes}.
True                 | true
\text{(C)}           | \textbf{C}
\mathbb{Z}/2\mathbb{Z} | \mathbb{Z} / 2\mathbb{Z}
\begin{pmatrix} 1/5 \\ -3 \end{pmatrix} | \begin{bmatrix} 0.2 \\ -3 \end{bmatrix}
2^{-99}              | \frac{1}{2^{99}}
\frac{\pi}{2^{99}}   | \frac{2\pi}{2^{100}}
"""
WRONG = r"""
\frac12              | \frac13
\frac13              | 0.333
42                   | 42.1
x=3                  | y=3
(1,2)                | (2,1)
(1,2)                | [1,2]
(1,200)              | 1200
\{1,200\}            | 1200
2,6                  | 2.6
3                    | 3, 4
3,4                  | 3
-\infty              | \infty
18 \text{ integers}  | 19
\text{east}          | \text{west}
C                    | D
Yes                  | No
1/2^99               | 1/2^98
\pi e^{-60}          | \pi e^{-61}
0.0000672            | 0.0000673
10^{-7}              | 0.0000002
12                   | 1 2
2t                   | 2
n = m                | n = t
\ln c                | \ln s
f(x) = x + c         | f(x) = x + m
\{\mathbf{0}\}       | \{\mathbf{1}\}
|n|                  | n
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}
"""
HOSTILE = [
    r"9^{9^{9^9}}",
    "100000!!",
    "(10^8)!",
    r"\binom{10^9}{10^8}",
    r"\sqrt[99999]{99999!}",
    r"\sum_{n=1}^{\infty}\frac{\sin(n^2)}{n^{1.5}}",
    "(" * 250 + "1" + ")" * 250,
    "{" * 10**6 + "}" * 10**6,
]


def table(text: str) -> list[tuple[str, str]]:
    return [tuple(part.strip() for part in line.split(" | ", 1)) for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def pool():
    with grading.Grader(workers=2, seconds=10.0) as grader:
        yield grader


def test_right_and_wrong_answers(pool):
    for verdict, pairs in ((1.0, table(RIGHT)), (0.0, table(WRONG))):
        golds, answers = zip(*pairs, strict=True)
        got = pool.grade([rf"So the answer is \boxed{{{answer}}}." for answer in answers], list(golds))
        assert [pair for pair, value in zip(pairs, got, strict=True) if value != verdict] == []
    assert (pool.timeouts, pool.crashes) == (0, 0)


@pytest.mark.parametrize(
    ("response", "content"),
    [
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{3} as asked, within \boxed{}.", "3"),
        (r"\boxed{3} and \boxed{ }", "3"),
        (r"\boxed{\frac{1}{2}}}}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}} }", r"\{1,2\}"),
        (r"\boxed{\left\{x}", r"\left\{x"),
        (r"\boxed{1 \boxed{2}}", "2"),
        (r"\boxed {7}", "7"),
        (r"\boxed{1} so \boxed{2", None),
        (r"\boxed{\boxed{}", None),
        (r"the answer is 3", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(response, content):
    assert grading.extract_boxed(response) == content


def test_extraction_is_linear():
    start = time.monotonic()
    for piece in ("{", "}", r"\boxed{", r"\boxed{}", r"\boxed{{", r"\boxed ", r"\boxed{1", "\\", " ", r"\boxed{}}"):
        grading.extract_boxed(piece * (10**6 // len(piece)))
        grading.extract_boxed(r"\boxed{" + piece * (10**6 // len(piece)))
    assert time.monotonic() - start < 20  # 5 seconds alone; hours were it quadratic


def test_clean_answer():
    same = [
        r"(1,200)",
        r"\{1,200\}",
        "2,6",
        "-2,1",
        "0,123",
        "1,2000",
        "[1,200)",
        "0.333...",
        r"x \text{ cm}",
        "$1$, $2$",
    ]
    assert [grading.clean_answer(text) for text in same] == same
    assert grading.clean_answer(r" $$1{,}234{,}567.5$$. ") == "1234567.5"
    assert grading.clean_answer(r"\$1,\!000,\!000") == r"\$1000000"
    assert grading.clean_answer(r"(1{,}200, 3)") == "(1200, 3)"
    assert grading.clean_answer(r"-1,200 \text{ m}") == r"-1200 \text{ m}"


def test_nothing_is_an_answer_only_in_a_box(pool):
    responses = ["42", r"\boxed{}", "", r"\boxed{42", r"\boxed{.}", r"\boxed{" + "0" * 600 + "42}"]
    assert pool.grade(responses, ["42"] * 4 + ["", "42"]) == [0.0] * 6


def test_unequal_lengths_are_refused(pool):
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        pool.grade(["a", "b"], ["a"])
    assert pool.grade([], []) == []


def alive(grader) -> int:
    return sum(worker is not None and worker.poll() is None for worker in grader._idle.queue)


def test_hostile_answers_cost_their_time_and_no_more():
    with grading.Grader(workers=2, seconds=1.0) as grader:
        start = time.monotonic()
        assert grader.grade([rf"\boxed{{{answer}}}" for answer in HOSTILE], ["7"] * len(HOSTILE)) == [0.0] * len(
            HOSTILE
        )
        assert time.monotonic() - start < 30  # 7 verdicts of 1 second by 2 workers, and their replacements
        assert grader.timeouts >= 5 and grader.crashes == 0
        assert (
            grader.grade([r"\boxed{0.5}", r"\boxed{4}", r"\boxed{2.0}"] * 4, [r"\frac24", "5", "2"] * 4)
            == [1, 0, 1] * 4
        )
        time.sleep(1.2)  # the clock does not run while a worker is idle
        assert grader._idle.qsize() == 2 and alive(grader) == 2


def test_a_killed_worker_is_a_crash_and_is_replaced():
    with grading.Grader(workers=1, seconds=60.0) as grader:
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]
        worker = grader._idle.queue[0]
        threading.Timer(0.5, worker.kill).start()
        assert grader.grade([r"\boxed{9^{9^{9^9}}}"], ["7"]) == [0.0]
        assert (grader.timeouts, grader.crashes) == (0, 1)
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]
        grader._idle.queue[0].kill()  # one that dies while idle costs no verdict
        grader._idle.queue[0].wait()
        assert grader.grade([r"\boxed{0.25}"], [r"\frac28"]) == [1.0] and grader.crashes == 1
        worker = grader._idle.queue[0]
        assert worker.poll() is None
    assert worker.poll() is not None and grader._idle.qsize() == 1


def test_a_stopped_worker_does_not_stop_the_program():
    with grading.Grader(workers=1, seconds=1.0) as grader:
        grader.grade([r"\boxed{1}"], ["2"])
        os.kill(grader._idle.queue[0].pid, signal.SIGSTOP)
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [0.0] and grader.crashes == 1
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_workers_are_limited_and_light():
    with grading.Grader(workers=1, memory_gib=1.0) as grader:
        grader.grade([r"\boxed{0.5}"], [r"\frac24"])
        pid = grader._idle.queue[0].pid
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (2**30, 2**30)
        assert os.getsid(pid) == pid  # its own session: no SIGINT from the terminal
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_callers_alarm_survives(pool):
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0)
        assert pool.grade([r"\boxed{0.75}"], [r"\frac34"]) == [1.0]
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100 and rang == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_blocked_or_ignored_alarm_of_the_caller_does_not_disarm_the_workers():
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        with grading.Grader(workers=1, seconds=1.0) as grader:
            grader.grade([r"\boxed{1}"], ["2"])
            rescue = threading.Timer(6, grader._idle.queue[0].kill)  # or a failure would be a hang
            rescue.start()
            assert grader.grade([r"\boxed{9^{9^{9^9}}}"], ["7"]) == [0.0] and grader.timeouts == 1
            rescue.cancel()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, before)


def test_grading_from_a_thread():
    got = []
    with grading.Grader(workers=1) as grader:
        work = [r"\boxed{0.75}", "no"], [r"\frac34", "1"]
        thread = threading.Thread(target=lambda: got.extend(grader.grade(*work)))
        thread.start()
        thread.join()
    assert got == [1.0, 0.0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent():
    program = (
        "import grader as grading\n"
        "g = grading.Grader(2, 2.0)\n"
        "g.grade([r'\\boxed{1}', r'\\boxed{2}'], ['3', '3'])\n"
        "print(*[w.pid for w in g._idle.queue], flush=True)\n"
        "g.grade([r'\\boxed{9^{9^{9^9}}}'], ['3'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    pids = parent.stdout.readline().split()
    time.sleep(0.3)  # one worker is stuck in C code now, the other idle
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while living := [pid for pid in pids if Path(f"/proc/{int(pid)}").exists()]:
        assert time.monotonic() < deadline, living
        time.sleep(0.05)


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    source = grading._WORKER_SOURCE.replace("from math_verify ", "from math_verifyy ")
    monkeypatch.setattr(grading, "_WORKER_SOURCE", source)
    with grading.Grader(workers=2) as grader:
        for _ in range(2):  # and the pool is not exhausted by it
            with pytest.raises(RuntimeError, match="No module named 'math_verifyy'"):
                grader.grade([r"\boxed{1}"], ["2"])


def test_what_libraries_print_does_no_harm(monkeypatch):
    line = "        parsed, units, zeros = read_gold(gold)\n"
    noisy = line + "        print('1\\n' * 10**5); os.write(1, b'1\\n'); os.write(2, b'1\\n' * 10**5)\n"
    assert line in grading._WORKER_SOURCE
    monkeypatch.setattr(grading, "_WORKER_SOURCE", grading._WORKER_SOURCE.replace(line, noisy))
    with grading.Grader(workers=1, seconds=3.0) as grader:
        responses, golds = [rf"\boxed{{{n}.0}}" for n in range(6)], ["0", "2", "2", "9", "4", "7"]
        assert grader.grade(responses, golds) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
        assert (grader.timeouts, grader.crashes) == (0, 0)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is of 3.11")
def test_the_working_directory_cannot_shadow_modules(tmp_path, monkeypatch):
    (tmp_path / "sympy.py").write_text("raise ImportError('the wrong sympy')")
    monkeypatch.chdir(tmp_path)
    with grading.Grader(workers=1) as grader:
        assert grader.grade([r"\boxed{0.5}"], [r"\frac24"]) == [1.0]


def test_golds_are_checked_by_parsing(pool):
    rows = pool.check_golds([r"\frac12", r"\boxed{", "3", "", "3"])
    assert rows == [1, 3]


@needs_paper_data
def test_every_gold_verifies_against_itself(pool):
    pandas = pytest.importorskip("pandas")
    golds = {}
    for name in ("deepmath-5k", "math500", "amc2023", "aime_2024", "aime_2025"):
        rows = pandas.read_parquet(PAPER_DATA / f"{name}.parquet")
        golds[name] = list(
            rows["final_answer"] if name == "deepmath-5k" else [r["ground_truth"] for r in rows["reward_model"]]
        )
    assert [len(column) for column in golds.values()] == [5000, 500, 40, 30, 30]
    every = list(itertools.chain(*golds.values()))
    assert [every[row] for row in pool.check_golds(every)] == []


