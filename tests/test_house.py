"""The layout: what each file may import. README.md's tree names the files in this order."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STOREYS = ["formats", "masks backbone", "data", "model", "assign", "losses", "refine", "teacher", "boxteacher", "tools",
           "recipe evaluate", "train predict", "benchmark"]  # each imports from those before it alone
STOREY = {name: number for number, names in enumerate(STOREYS) for name in names.split()}
PATHS = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]
FILES = {".".join(path.with_suffix("").parts): ast.parse((ROOT / path).read_text()) for path in PATHS
         if path.parts[0] not in ("tests", "docs", "runs", "datasets") and not path.parts[0].startswith(".")}
OPTIONAL = ("formats.files", "optional")  # the only function that imports: packages which few people need


def imported(name: str) -> set[str]:
    """The project's files that a file imports, at its top or anywhere else."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys()


def folder(name: str) -> str:
    return name.split(".")[0]


def test_every_file_has_a_storey():
    assert {folder(name) for name in FILES} == STOREY.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    for other in imported(name):
        beside = folder(name) == folder(other) in ("formats", "tools")
        assert beside or STOREY[folder(other)] < STOREY[folder(name)], f"{name} imports {other}"


def test_no_circle():
    left = {name: imported(name) for name in FILES}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


@pytest.mark.parametrize("name", FILES)
def test_no_import_within_a_function(name):
    for function in ast.walk(FILES[name]):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                assert not isinstance(node, (ast.Import, ast.ImportFrom)), f"{name}.{function.name}"
                called = {getattr(node, "attr", ""), getattr(node, "id", "")}
                assert (name, function.name) == OPTIONAL or not called & {"import_module", "__import__"}, (
                    f"{name}.{function.name}")


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(), re.MULTILINE), path.name
