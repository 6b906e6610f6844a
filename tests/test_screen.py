"""What the user sees: lines of at most 80 columns, the same in a file and on a terminal, and no noise."""

import re
import subprocess
import sys

import oisd
import pytest
from support import processes, run_folder

from conftest import ROOT, toy_arguments


def on_screen(text):
    """Return the lines that a terminal shows in the end: a carriage return overwrites."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_terminal_ends_up_with_the_lines_of_a_file(toy, tmp_path, monkeypatch, capsys):
    shown = []
    for columns in (0, 40):
        monkeypatch.setattr(processes, "terminal_width", lambda columns=columns: columns)
        assert oisd.main(toy_arguments(toy, tmp_path / "run", num_steps=2)) == 0
        run_folder.remove_folder(tmp_path / "run")
        shown.append(re.sub(r"  \S+ s(  .* left)?$", "", capsys.readouterr().out, flags=re.MULTILINE))
    file, terminal = shown
    assert "\r" not in file and "step 2/2  reward" in file
    assert on_screen(terminal) == file.split("\n")
    processes.doing("a passing line")
    processes.say("short")
    assert on_screen(capsys.readouterr().out) == ["short", ""]
    passing = re.findall(r"\r([^\r\n]*)\r", terminal)
    assert {len(text) for text in passing} == {40} and "sampling (train): 32 of 32".ljust(40) in passing


def test_the_program_prints_nothing_but_its_lines(toy, tmp_path):
    command = [sys.executable, ROOT / "oisd.py", *toy_arguments(toy, "runs/toy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert sum(line.startswith("step ") for line in done.stdout.splitlines()) == 4
    assert re.search(r"^held-out accuracy: \S+ ± \S+ % before, \S+ ± \S+ % after 4 steps$", done.stdout, re.MULTILINE)
    for path in ("curves.png", "final"):
        assert f"runs/toy/{path}" in done.stdout and (tmp_path / "runs" / "toy" / path).exists()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(9.9, "9.9 s"), (99.4, "99 s"), (99.5, "2 min"), (5969, "99 min"), (5970, "1.7 h"), (3.6e6, "1000.0 h")],
)
def test_a_line_of_a_step_fits_80_columns(seconds, shown):
    metrics = {"step": 9999, "reward": 1.0, "think_js": 0.6931, "seconds": 12345.6}
    line = run_folder.step_line(metrics, 9999, seconds)
    assert len(line) <= 80 and line.endswith(f"  {shown} left")
    assert "|##########|" in line and "think JS" not in run_folder.step_line(metrics | {"think_js": None}, 9999, 0)
