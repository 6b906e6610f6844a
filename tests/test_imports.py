"""Imports go one way: tools, study, baselines and evaluate.py import oisd.py, which imports support."""

import ast

import pytest

from conftest import ROOT

ALLOWED = {  # what each folder or program may import of this repository; anything else: all
    "support": {"support"},
    "tiny": set(),
    "oisd.py": {"support"},
    "evaluate.py": {"oisd", "support"},
    "baselines": {"baselines", "oisd", "support"},
    "tools": {"tools", "oisd", "support"},
    "study": {"study", "tools", "baselines", "oisd", "support"},
}
TOP_LEVEL = {"oisd", "evaluate", "test_oisd"}
OURS = TOP_LEVEL | {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
FILES = [path.relative_to(ROOT) for pattern in ("*.py", "*/*.py") for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += ["." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    others = OURS - ALLOWED.get(path.parts[0], OURS)
    assert not {module.split(".")[0] for module in modules} & {"", *others}
    forbidden = {"TYPE_CHECKING"} | (TOP_LEVEL if path.parts[0] == "support" else set())
    assert not {getattr(node, "id", getattr(node, "attr", "")) for node in nodes} & forbidden


def test_three_files_are_at_the_top_level():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP_LEVEL
