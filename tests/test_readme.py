import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = [*sorted((ROOT / "smit").glob("*.py")), *sorted(ROOT.glob("*.py"))]
LEAVES = {"swin", "masking", "heads", "losses", "ema", "transforms", "metrics", "sliding"}
ALLOWED = {"torch", "numpy", "nibabel", "tqdm", "smit"}


def defined(path):
    """Names of functions, classes and Class.methods of a file."""
    tree = ast.parse(path.read_text())
    named = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = {f"{c.name}.{m.name}" for c in named if isinstance(c, ast.ClassDef) for m in c.body if hasattr(m, "name")}
    return {node.name for node in named} | methods


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([node.module] if node.module != "smit" else [f"smit.{alias.name}" for alias in node.names])


def test_every_target_of_the_map_exists():
    targets = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
    assert len(targets) > 15
    for file, name in targets:
        assert name in defined(ROOT / file), f"README points to {file}:{name}"


def test_each_difference_is_listed_once_and_tagged_once():
    tagged = sum(path.read_text().count("# differs:") for path in SOURCES)
    section = README.split("## Where this differs")[1].split("\n## ")[0]
    listed = re.findall(r"^(\d+)\. .*`([\w/]+\.py)`", section, flags=re.M)
    assert [int(number) for number, _ in listed] == list(range(1, tagged + 1))
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        assert path.read_text().count("# differs:") == sum(file == name for _, file in listed), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_run_from_scripts_to_users_to_leaves(path):
    for name in imports(path):
        root = name.split(".")[0]
        assert root in ALLOWED or root in __import__("sys").stdlib_module_names, f"{path.name} imports {name}"
        if path.stem in LEAVES:
            assert root != "smit", f"the leaf {path.name} imports {name}"
        assert root != "nibabel" or path.stem in ("data", "phantom")
        assert root != "tqdm" or path.parent == ROOT or path.stem in ("study", "benchmark")
        assert root not in ("train_ssl", "finetune", "evaluate")


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_a_leaf_works_when_its_file_is_copied_alone(leaf, tmp_path):
    import subprocess
    import sys
    (tmp_path / f"{leaf}.py").write_text((ROOT / "smit" / f"{leaf}.py").read_text())
    done = subprocess.run([sys.executable, "-c", f"import {leaf}; print(len(dir({leaf})))"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 10, done.stderr


def test_no_file_is_larger_than_a_room():
    assert all(len(path.read_text().splitlines()) <= 320 for path in SOURCES if path.parent.name == "smit")
