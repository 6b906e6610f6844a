"""Grading: 1 if the last box of a response equals the gold answer, else 0.

math-verify compares the two. It can hang, run out of memory or abort in C code, so it runs in small
worker processes that may die.
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
# An escaped character is one token, so \{ and \} never count as braces.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# $..$, $$..$$, \(..\), \[..\] or \text{..} around the complete answer
_WRAPPED = re.compile(
    r"(\$\$?)(?P<a>[^$]*[^$\\])\1|\\\((?P<b>(?:(?!\\[()]).)*)\\\)|\\\[(?P<c>(?:(?!\\[][]).)*)\\\]"
    r"|\\(?:text|textbf|mathrm)\s*\{(?P<d>[^{}]*)\}",
    re.DOTALL,
)
# the separators in 1{,}000 and 1\,000 and 1,\!000
_TEX_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]|,\\ )(?=\d{3}(?!\d))")
# A lone 1,000 or 1 000 with sign, currency or unit, but never inside (1,200) or {1,200}.
_GROUPED = re.compile(
    r"([-+]?(?:\\?\$)?)([1-9]\d{0,2}(?=([, ]))(?:\3\d{3})+)"
    r"((?:\.\d+)?(?:\s*\\?%|\s*\^\{?\\circ\}?|\s*\\text\s*\{[^{}]*\})?)"
)


def extract_boxed(response: str) -> str | None:
    r"""Return the content of the last non-empty `\boxed{...}`; None if absent or unfinished."""
    response = re.sub(r"\\boxed\s*\{\s*\}", " ", response)  # "put it within \boxed{}" is no answer
    starts = [box.end() for box in re.finditer(r"\\boxed\s*\{", response)]
    if not starts:
        return None
    depth = 1
    for brace in _BRACE.finditer(response, starts[-1]):  # linear time
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # 0: an escaped character
        if depth == 0:
            return response[starts[-1] : brace.start()].strip() or None
    return None


def clean_answer(text: str) -> str:
    r"""Remove outer `$`, `\(..\)` and `\text{..}`, a final full stop and thousands separators.

    Commas are removed from a lone number only: `1,200` becomes 1200, while `(1,200)`, `\{1,200\}`
    and `2,6` stay as they are.
    """
    before = None
    while text != before:
        before = text
        text = text.strip()
        # math-verify rejects "42." for every integer gold
        if text.endswith(".") and not text.endswith((r"\.", "..")):
            text = text[:-1]
        if match := _WRAPPED.fullmatch(text):
            text = match[match.lastgroup]
    text = _TEX_SEPARATOR.sub("", text)
    if match := _GROUPED.fullmatch(text):
        sign, digits, separator, unit = match.groups()
        text = sign + digits.replace(separator, "") + unit
    return text


def _spelling(answer: str) -> str:
    """Normalize blanks, except between digits, and the case of a word."""
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)
    is_word = len(answer) > 1 and answer.isalpha()
    return answer.lower() if is_word else answer  # math-verify: "true" is not "True"


def _worker_main(seconds: float, memory_gib: float) -> None:
    r"""Run as a worker: read lines `[gold, prediction]`, answer each with `1` or `0`, until EOF.

    A worker gets only this source and `_WORKER_IMPORTS`: no torch, no parent module. The kernel's
    timer kills the process when a verdict takes longer than `seconds`. This works in C code too,
    and after the parent has died.
    """
    # The parent may ignore or block the signal, and children inherit that. The default is to die.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.alarm(120)  # for the imports, perhaps from a slow disk
    import resource

    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    # Output of libraries goes to /dev/null, so it cannot spoil the replies or fill the pipe.
    replies = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gmpy2 aborts when memory runs out
    if sys.platform == "linux":  # macOS does not enforce it
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def read(answer: str, units: bool) -> list:
        # Golds are boxed too: as raw strings, 2,910 of 5,000 DeepMath golds differ from themselves.
        # No timeout here, because the library's own would take over our SIGALRM.
        rules = NormalizationConfig(units=units, malformed_operators=True, nits=True, boxed="all")
        config = LatexExtractionConfig(normalization_config=rules)
        return parse(rf"\boxed{{{answer}}}", [config], parsing_timeout=None)

    @functools.lru_cache(4096)
    def read_gold(gold: str) -> tuple[list, bool, int]:
        # Drop units for numeric golds only. In 2t, a^2 t, n = m or \ln c the library takes the
        # last letter for a unit, so 2 would pass for 2t.
        symbols = re.sub(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+", "", gold)
        units = not re.search(r"[A-Za-z]|\\\{", symbols)
        parsed = read(gold, units)
        # The library rounds to 15 decimals (6 for floats), so 1/2^99 would equal 1/2^98, and
        # 0.0000672 would equal 0.0000673. Add the leading zeros of the gold's smallest number.
        parts = []
        for value in parsed[:1]:
            parts += [value, *getattr(value, "args", ())]
        numbers = [part for part in parts if getattr(part, "is_number", False)]
        sizes = [abs(number.evalf()) for number in numbers]
        sizes = [float(size) for size in sizes if size.is_Float]
        zeros = [int(-math.log10(size)) for size in sizes if 0 < size < 1]
        return parsed, units, max(zeros, default=0)

    def is_correct(gold: str, prediction: str) -> bool:
        parsed, units, zeros = read_gold(gold)
        digits = {"float_rounding": 6 + zeros, "numeric_precision": 15 + zeros}
        return verify(parsed, read(prediction, units), **digits, timeout_seconds=None)

    is_correct("1", "2")  # loads what the libraries import late
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        print(int(is_correct(*json.loads(line))), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


_WORKER_IMPORTS = "import functools, json, math, os, re, signal, sys\n"
# Read at import: the file may be edited during a run.
_WORKER_SOURCE = _WORKER_IMPORTS + inspect.getsource(_worker_main)


def _start_worker(seconds: float, memory_gib: float) -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-c", f"{_WORKER_SOURCE}\n_worker_main({seconds!r}, {memory_gib!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,  # Ctrl-C at the terminal reaches the parent only
        # No modules from the working directory; a fixed hash seed for reproducible verdicts.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"},
    )
    output = b""
    while not output.endswith(b"ready\n"):
        line = worker.stdout.readline()
        if not line:  # the process has ended
            message = "a grader process did not start; is math-verify installed?"
            raise RuntimeError(f"{message}\n{output.decode()}")
        output += line
    return worker


class Grader:
    """Grade in `workers` processes, with limits on each verdict.

    `seconds` limits the wall time of a verdict, `memory_gib` the address space of a process. If a
    process dies, the response scores 0; `timeouts` counts late verdicts, `crashes` all others.
    Processes start when needed and end with `close()` or the `with` block. Threads may share it.
    """

    def __init__(self, workers: int = 4, seconds: float = 5.0, memory_gib: float = 2.0):
        self.workers = workers
        self.limits = seconds, memory_gib
        self.timeouts = 0
        self.crashes = 0
        self._known: dict[tuple[str, str], bool] = {}  # verdicts by (gold, prediction)
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)  # not started yet

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def failures(self) -> int:
        """Return the number of responses that scored 0 because a process died."""
        return self.timeouts + self.crashes

    def close(self) -> None:
        """End the processes after their current verdicts. A later `grade` starts new ones."""
        for worker in [self._idle.get() for _ in range(self.workers)]:
            if worker is not None:
                worker.kill()
                worker.communicate()
            self._idle.put(None)

    def grade(self, responses: list[str], answers: list[str]) -> list[float]:
        """Return 1.0 where the last box of a response equals its gold answer, else 0.0."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
        golds = [clean_answer(answer) for answer in answers]
        boxes = [extract_boxed(response) or "" for response in responses]
        predictions = [clean_answer(box) if len(box) <= _LONGEST_ANSWER else "" for box in boxes]
        pairs = list(zip(golds, predictions))
        new = [pair for pair in dict.fromkeys(pairs) if pair[1] and pair not in self._known]
        # Equal spellings need no parsing.
        self._known |= {pair: True for pair in new if _spelling(pair[0]) == _spelling(pair[1])}
        verdicts = self._verdicts([pair for pair in new if pair not in self._known])
        # Failures have no verdict and are not remembered, so a repeated pair is tried again.
        self._known |= {pair: verdict for pair, verdict in verdicts.items() if verdict is not None}
        return [float(self._known.get(pair, False)) for pair in pairs]

    def check_golds(self, answers: list[str]) -> list[int]:
        """Return the rows that no response can match: a boxed copy fails, or math-verify does."""
        copies = self.grade([rf"\boxed{{{answer}}}" for answer in answers], answers)
        golds = [clean_answer(answer) for answer in answers]
        verdicts = self._verdicts([(gold, gold) for gold in dict.fromkeys(golds)])
        return [row for row, gold in enumerate(golds) if not (copies[row] and verdicts[gold, gold])]

    def _verdicts(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            return dict(zip(pairs, threads.map(self._verdict, pairs)))

    def _verdict(self, pair: tuple[str, str]) -> bool | None:
        """Ask one worker. None if it died."""
        worker = self._idle.get()
        reply = b""
        try:
            # In a forked child poll() returns 0 for the parent's workers, so it starts its own.
            if worker is None or worker.poll() is not None:
                worker = _start_worker(*self.limits)
            try:
                worker.stdin.write(json.dumps(pair).encode() + b"\n")
                poll = select.poll()
                poll.register(worker.stdout)
                if not poll.poll(2000 * self.limits[0]):  # milliseconds: twice the limit
                    worker.kill()  # its own timer failed: stopped, or stuck in the kernel
                reply = worker.stdout.readline()
            except BrokenPipeError:
                pass  # the worker died, so there is no reply
            if not reply:
                worker.communicate()  # waits, closes the pipes
                with self._lock:
                    if worker.returncode == -signal.SIGALRM:
                        self.timeouts += 1
                    else:
                        self.crashes += 1
            return {b"1\n": True, b"0\n": False}.get(reply)
        finally:
            self._idle.put(worker)
