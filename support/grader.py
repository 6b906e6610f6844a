"""Grading: 1 if the last box of a response is equivalent to the gold answer, else 0.

`answers.py` compares the two. Its libraries can hang, run out of memory or abort in C code, so it
runs in small worker processes that may die.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

_LONGEST_ANSWER = 512  # characters; the longest gold of DeepMath and MATH-500 has 133
# An escaped character is one token, so \{ and \} never count as braces.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# \boxed{ or \fbox{, or a number without braces: \boxed 9
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(-?\d[^\s{}$\\]*)(?=[\s$]|\\[)\]]|$))")


def extract_boxed(response: str) -> str | None:
    r"""Return the content of the last non-empty `\boxed{...}`; None if absent or unfinished."""
    response = re.sub(r"\\boxed\s*\{\s*\}", " ", response)  # "put it within \boxed{}" is no answer
    boxes = list(_BOX.finditer(response))
    if not boxes:
        return None
    if number := boxes[-1][1]:
        return number
    start = boxes[-1].end()
    depth = 1
    for brace in _BRACE.finditer(response, start):  # linear time
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # 0: an escaped character
        if depth == 0:
            return response[start : brace.start()].strip() or None
    return None


def _worker_main(seconds: float, memory_gib: float) -> None:
    """Run as a worker: read lines `[gold, answer]`, reply to each with `1` or `0`, until EOF.

    Without an answer (null), reply whether the gold can be compared at all. A worker gets only this
    source and that of `answers.py`: no torch, no parent module. The kernel's timer kills the
    process when a verdict takes longer than `seconds`. This works in C code too, and after the
    parent has died.
    """
    # Output of libraries goes to /dev/null, so it cannot spoil the replies or fill the pipe.
    replies = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gmpy2 aborts when memory runs out
    if sys.platform == "linux":  # macOS does not enforce it
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    same_answer("x", "2x")  # noqa: F821  loads what the libraries import late
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        gold, answer = json.loads(line)
        verdict = is_comparable(gold) if answer is None else same_answer(gold, answer)  # noqa: F821
        print(int(verdict), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


# Read at import: the files may be edited during a run.
_WORKER_SOURCE = f"""
import json, os, resource, signal, sys

# The parent may ignore or block the signal, and children inherit that. The default is to die.
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
signal.alarm(120)  # for the imports, perhaps from a slow disk

{Path(__file__).with_name("answers.py").read_text(encoding="utf-8")}
{inspect.getsource(_worker_main)}
"""


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
            message = "a grader process did not start; are math-verify and pint installed?"
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
        """Return 1.0 where the last box of a response matches its gold answer, else 0.0."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
        boxes = [extract_boxed(response) or "" for response in responses]
        boxes = [box if len(box) <= _LONGEST_ANSWER else "" for box in boxes]
        pairs = list(zip(answers, boxes))
        new = [pair for pair in dict.fromkeys(pairs) if pair[1] and pair not in self._known]
        self._known |= {pair: True for pair in new if pair[0] == pair[1]}
        verdicts = self._verdicts([pair for pair in new if pair not in self._known])
        # Failures have no verdict and are not remembered, so a repeated pair is tried again.
        self._known |= {pair: verdict for pair, verdict in verdicts.items() if verdict is not None}
        return [float(self._known.get(pair, False)) for pair in pairs]

    def check_golds(self, answers: list[str]) -> list[int]:
        """Return the rows that no response can match: a boxed copy fails, or comparing does."""
        copies = self.grade([rf"\boxed{{{answer}}}" for answer in answers], answers)
        comparable = self._verdicts([(gold, None) for gold in dict.fromkeys(answers)])
        rows = enumerate(answers)
        return [row for row, gold in rows if not (copies[row] and comparable[gold, None])]

    def _verdicts(self, pairs: list[tuple[str, str | None]]) -> dict[tuple, bool | None]:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            return dict(zip(pairs, threads.map(self._verdict, pairs)))

    def _verdict(self, pair: tuple[str, str | None]) -> bool | None:
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
