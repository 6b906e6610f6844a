"""Bench's tables of parts at small sizes, and a preflight whose stages fail or hang."""

import csv
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, wait_for

from tools import preflight


def bench(*words):
    process = subprocess.run([sys.executable, str(ROOT / "tools" / "bench.py"), *words], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return {row[0]: row[1:] for row in csv.reader(file)}


def test_a_step_in_parts(tmp_path):
    shown = bench("step", "--shape", "tiny", "--repeats", "1", "--csv", str(tmp_path / "step.csv"))
    rows = rows_of(tmp_path / "step.csv")
    assert "FAILED" not in shown and "Self CPU" in shown
    assert rows["largest log ratio before an update"][-1] == "0"
    assert float(rows["OISD over GRPO"][-1]) > 0 and float(rows["scoring"][1]) > 0
    parts = {name: float(row[0].split()[0]) for name, row in rows.items() if name.startswith("of an OISD update")}
    assert len(parts) == 9 and all(seconds > 0 for seconds in parts.values())
    lens = "of an OISD update: lens pass"
    assert parts[f"{lens}, all of it"] > parts[f"{lens}: rows of logits"] + parts[f"{lens}: the head's gradient"]


def test_a_lens_pass_in_parts(tmp_path):
    sizes = ["--tokens", "300", "--hidden", "32", "--vocabulary", "500", "--repeats", "1"]
    shown = bench("lens", "--parts", *sizes, "--csv", str(tmp_path / "lens.csv"))
    rows = rows_of(tmp_path / "lens.csv")
    assert "FAILED" not in shown and {"256", "300"} == {name.split()[0] for name in rows if "rows" in name.split()[1:2]}
    for name in ("OISD", "GRPO"):
        assert float(rows[f"lens pass, {name}, chunks of 256: over its floor"][-1]) > 0


def test_every_side_computes_the_same_loss():
    """Ours and plain autograd, loss and gradient read after the time is taken."""
    sizes = ["--tokens", "64", "--hidden", "32", "--vocabulary", "500", "--repeats", "1", "--only", "ours,dense"]
    facts = [line.split("|")[-2] for line in bench("lens", *sizes).splitlines() if "loss" in line]
    ours, dense = ([float(word.split()[1]) for word in fact.split(",")] for fact in facts)
    assert ours == pytest.approx(dense, rel=1e-4) and math.isfinite(sum(ours))


HANGS = """
import os, pathlib, sys, time
path = pathlib.Path(sys.argv[4], "pid" + os.environ["RANK"])
path.with_suffix(".part").write_text(str(os.getpid()))
path.with_suffix(".part").rename(path)
time.sleep(1000)
"""


def test_preflight_outlives_a_stage_that_hangs(tmp_path, monkeypatch):
    """Nor are its workers left, each in a session of its own; the limit is reached when both hang."""
    pids = [tmp_path / "pid0", tmp_path / "pid1"]

    class UntilBothHang(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout == "both":
                for pid in pids:
                    wait_for(pid, self)
                raise subprocess.TimeoutExpired("", 0)
            return super().wait(timeout)

    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "hangs.py"))
    monkeypatch.setattr(preflight.subprocess, "Popen", UntilBothHang)
    options = SimpleNamespace(folder=str(tmp_path), ranks=2, words=[], limit="both")
    ((name, passed, said),), _ = preflight.execute("machine", 2, options)
    assert (name, passed) == ("machine", False) and "ran past --limit" in said
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_preflight_goes_on_after_a_stage_that_fails(tmp_path):
    """The run to be resumed fails: one FAIL, one row left out, and the report has both."""
    command = [sys.executable, str(ROOT / "tools" / "preflight.py"), "--only", "resume", "--ranks", "1"]
    words = ["--report", tmp_path / "report.md", "--folder", tmp_path / "folder", "--train_data", "nowhere.jsonl"]
    process = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    report = (tmp_path / "report.md").read_text()
    assert process.returncode == 1 and report.count("FAIL") == 1, process.stdout + process.stderr
    assert "| resume again | left out |" in report and "1 failed: two steps and an export" in report
