"""Grading: 1 if the last box of a response equals the gold answer, else 0. Training and evaluation share it.

math-verify compares; it can hang, eat memory or abort in C code, so it runs in small processes that may die.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading

_LONGEST_ANSWER = 512  # characters; the longest gold of DeepMath and MATH-500 has 133
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is one token, so \{ and \} never count
_WRAPPED = re.compile(  # $..$, $$..$$, \(..\), \[..\], \text{..} around the whole answer
    r"(\$\$?)(?P<a>[^$]*[^$\\])\1|\\\((?P<b>(?:(?!\\[()]).)*)\\\)|\\\[(?P<c>(?:(?!\\[][]).)*)\\\]"
    r"|\\(?:text|textbf|mathrm)\s*\{(?P<d>[^{}]*)\}",
    re.DOTALL,
)
_TEX_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]|,\\ )(?=\d{3}(?!\d))")  # 1{,}000 and 1\,000 and 1,\!000
_GROUPED = re.compile(  # a lone 1,000 or 1 000 with sign, currency or unit; never inside (1,200) or {1,200}
    r"([-+]?(?:\\?\$)?)([1-9]\d{0,2}(?=([, ]))(?:\3\d{3})+)"
    r"((?:\.\d+)?(?:\s*\\?%|\s*\^\{?\\circ\}?|\s*\\text\s*\{[^{}]*\})?)"
)


def extract_boxed(response: str) -> str | None:
    r"""The content of the last non-empty `\boxed{...}`; None if there is none, or if the last is unfinished (cut off).

    Linear in the length of the response.
    """
    response = re.sub(r"\\boxed\s*\{\s*\}", " ", response)  # "put it within \boxed{}" is no answer
    start = max((box.end() for box in re.finditer(r"\\boxed\s*\{", response)), default=len(response))
    depth = 1
    for brace in _BRACE.finditer(response, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return response[start : brace.start()].strip() or None
    return None


def clean_answer(text: str) -> str:
    r"""The answer without outer `$`, `\(..\)`, `\text{..}`, trailing full stop, and separators of thousands.

    A comma goes only from a lone number: `1,200` is 1200, while `(1,200)`, `\{1,200\}` and `2,6` stay what they are.
    """
    before = None
    while text != before:
        before, text = text, text.strip()
        if text.endswith(".") and not text.endswith((r"\.", "..")):  # math-verify rejects 42. for every integer gold
            text = text[:-1]
        if match := _WRAPPED.fullmatch(text):
            text = match[match.lastgroup]
    text = _TEX_SEPARATOR.sub("", text)
    if match := _GROUPED.fullmatch(text):
        text = match[1] + match[2].replace(match[3], "") + match[4]
    return text


def _spelling(answer: str) -> str:
    """Equal spellings need no parsing: blanks do not count except between digits, nor does the case of a word."""
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)
    return answer.lower() if len(answer) > 1 and answer.isalpha() else answer  # math-verify: true is not True


def _worker_main(seconds: float, memory_gib: float) -> None:
    r"""The program of a worker: reads lines `[gold, prediction]`, answers each by `1` or `0`, until its input ends.

    This source and `_WORKER_IMPORTS` are all that the worker gets: no torch, no parent module. The kernel's timer ends
    the process when a verdict takes longer than `seconds`, in C code too, and whether or not the parent still lives.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # default action: the kernel kills. Were the signal ignored or
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # blocked in the parent, the child would inherit that.
    signal.alarm(120)  # for the imports, perhaps from a slow disk
    import resource

    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    replies, nothing = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what libraries print can neither spoil the replies nor fill the pipe
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gmpy2 aborts when memory runs out
    if sys.platform == "linux":  # macOS does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_gib * 2**30),) * 2)

    def read(answer: str, units: bool) -> list:
        # In a box, the gold too: as raw strings 2,910 of 5,000 DeepMath golds fail against themselves. No timeout: the
        # library's own would take over our SIGALRM.
        rules = NormalizationConfig(units=units, malformed_operators=True, nits=True, boxed="all")
        config = LatexExtractionConfig(normalization_config=rules)
        return parse(rf"\boxed{{{answer}}}", [config], parsing_timeout=None)

    @functools.lru_cache(4096)
    def read_gold(gold: str) -> tuple[list, bool, int]:
        # Units are dropped for numeric golds only: the library takes the last letter of 2t, a^2 t, n = m or \ln c for
        # a unit, so that 2 would pass for 2t.
        units = not re.search(r"[A-Za-z]|\\\{", re.sub(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+", "", gold))
        parsed = read(gold, units)
        # It compares absolutely, to 15 digits (6 with floats): 1/2^99 would equal 1/2^98, and 0.0000672 0.0000673.
        # So as many more digits as the smallest number of the gold has leading zeros.
        parts = [part for x in parsed[:1] for part in (x, *getattr(x, "args", ())) if getattr(part, "is_number", False)]
        sizes = [float(size) for size in (abs(part.evalf()) for part in parts) if size.is_Float]
        return parsed, units, max((int(-math.log10(size)) for size in sizes if 0 < size < 1), default=0)

    def is_right(gold: str, prediction: str) -> bool:
        parsed, units, zeros = read_gold(gold)
        digits = {"float_rounding": 6 + zeros, "numeric_precision": 15 + zeros}
        return verify(parsed, read(prediction, units), **digits, timeout_seconds=None)

    is_right("1", "2")  # loads what the libraries load late
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        print(int(is_right(*json.loads(line))), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


_WORKER_IMPORTS = "import functools, json, math, os, re, signal, sys\n"
_WORKER_SOURCE = _WORKER_IMPORTS + inspect.getsource(_worker_main)  # now: the file may be edited while a run is on


def _start_worker(seconds: float, memory_gib: float) -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-c", f"{_WORKER_SOURCE}\n_worker_main({seconds!r}, {memory_gib!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,  # Ctrl-C at the terminal is for the parent to handle
        # The working directory is not searched for modules; one seed of hashes makes verdicts reproducible.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"},
    )
    said = b""
    while not said.endswith(b"ready\n"):
        if not (line := worker.stdout.readline()):
            raise RuntimeError(f"a grader process did not start; is math-verify installed?\n{said.decode()}")
        said += line
    return worker


class Grader:
    """Grades in `workers` processes, each verdict within `seconds` of wall time and `memory_gib` of address space.

    A process that dies of either scores 0 and is replaced: `timeouts` counts the late ones, `crashes` all others.
    Processes start when first needed. Usable from any thread; `close()`, or leaving a `with` block, ends them.
    """

    def __init__(self, workers: int = 4, seconds: float = 5.0, memory_gib: float = 2.0):
        self.workers, self.limits = workers, (seconds, memory_gib)
        self.timeouts, self.crashes = 0, 0
        self._known: dict[tuple[str, str], bool] = {}  # verdicts by (gold, answer); rollouts repeat both
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()  # None: to be started
        for _ in range(workers):
            self._idle.put(None)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, after the verdicts under way. A later `grade` starts new ones."""
        for worker in [self._idle.get() for _ in range(self.workers)]:
            if worker is not None:
                worker.kill()
                worker.communicate()
            self._idle.put(None)

    def grade(self, responses: list[str], answers: list[str]) -> list[float]:
        """1.0 where the last box of a response equals its gold answer, else 0.0."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
        boxes = [extract_boxed(response) or "" for response in responses]
        said = [clean_answer(box) if len(box) <= _LONGEST_ANSWER else "" for box in boxes]
        pairs = list(zip(map(clean_answer, answers), said))
        new = dict.fromkeys(pair for pair in pairs if pair not in self._known)
        found = {(a, b): bool(b) and _spelling(a) == _spelling(b) for a, b in new}
        found |= self._verdicts([pair for pair, same in found.items() if pair[1] and not same])
        self._known |= {pair: verdict for pair, verdict in found.items() if verdict is not None}  # not the failures
        return [float(self._known.get(pair, False)) for pair in pairs]

    def check_golds(self, answers: list[str]) -> list[int]:
        """The rows whose gold, parsed and compared like any answer, is not equal to itself: no response could win."""
        golds = [clean_answer(answer) for answer in answers]
        verdicts = self._verdicts([(gold, gold) for gold in dict.fromkeys(golds)])
        return [row for row, gold in enumerate(golds) if not verdicts[gold, gold]]

    def _verdicts(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            return dict(zip(pairs, threads.map(self._verdict, pairs)))

    def _verdict(self, pair: tuple[str, str]) -> bool | None:
        worker, reply = self._idle.get(), b""
        try:
            if worker is None or worker.poll() is not None:  # (in a forked child poll() is 0: it starts its own)
                worker = _start_worker(*self.limits)
            try:
                worker.stdin.write(json.dumps(pair).encode() + b"\n")
                poll = select.poll()
                poll.register(worker.stdout)
                if not poll.poll(2000 * self.limits[0]):  # its own clock failed: stopped, or stuck in the kernel
                    worker.kill()
                reply = worker.stdout.readline()
            except BrokenPipeError:
                pass  # it died: no reply
            if not reply:
                worker.communicate()  # waits, closes the pipes
                late = worker.returncode == -signal.SIGALRM
                with self._lock:
                    self.timeouts, self.crashes = self.timeouts + late, self.crashes + (not late)
            return {b"1\n": True, b"0\n": False}.get(reply)  # None: there is no verdict
        finally:
            self._idle.put(worker)
