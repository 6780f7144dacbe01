"""Where things live: imports point one way, and a line that breaks this is found here and not by a reader.

reinforce/          the update             itself
reinforce/data/     lines in, prompts out  the update
reinforce/serving/  the reward endpoint    the update
reinforce/run/      what makes a run safe  all of these
scripts, recipes/                          everything
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MAY_IMPORT = {"update": {"update"}, "data": {"data", "update"}, "serving": {"serving", "update"},
              "run": {"run", "data", "serving", "update"}}  # fmt: skip
FILES = sorted((ROOT / "reinforce").rglob("*.py"))
MATHS = ("baselines", "kl", "objective", "loss")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path):
    """Names of all modules that a file imports, wherever in it; `from package import module` counts as the module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in whole}
    return names


def shelf(module):
    """ "update", "data", "serving" or "run"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or module in ("reinforce.data", "reinforce.serving", "reinforce.run") else "update"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    """Nothing in the package imports a script or a recipe, and no shelf one that stands above it."""
    own = shelf(module_name(path))
    for name in imports(path):
        assert name.split(".")[0] not in ("train", "serve_rm", "recipes", "bench", "tests"), name
        if name in MODULES:
            assert shelf(name) in MAY_IMPORT[own], f"{own} imports {name}"


def test_there_is_no_circle():
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    while leaves := {module for module, wants in graph.items() if not wants}:
        graph = {module: wants - leaves for module, wants in graph.items() if module not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_imports_torch_alone(name):
    allowed = {"torch", "collections.abc", "dataclasses", "typing"}
    assert imports(MODULES[f"reinforce.{name}"]) <= allowed


def test_only_the_modules_about_ranks_import_torch_distributed():
    for path in [*FILES, ROOT / "train.py", ROOT / "serve_rm.py", *(ROOT / "recipes").glob("*.py")]:
        if path.name not in ("distributed.py", "tensor_parallel.py", "torchrun.py"):
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path


def test_train_py_knows_neither_rank_nor_world():
    tree = ast.parse((ROOT / "train.py").read_text())
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
    assert not named & {"rank", "world_size", "is_initialized", "recorder"}


def branches(function):
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try)
    return sum(isinstance(node, kinds) for node in ast.walk(function))


def test_the_loop_stays_short_enough_to_hold_in_the_head():
    """`train` in 60 lines with 8 branches, and with `judge` and `backward` in 110."""
    functions = {node.name: node for node in ast.parse((ROOT / "train.py").read_text()).body if isinstance(node, ast.FunctionDef)}
    lines = {name: functions[name].end_lineno - functions[name].lineno + 1 for name in ("train", "judge", "backward")}
    assert lines["train"] <= 60 and sum(lines.values()) <= 110, lines
    assert branches(functions["train"]) <= 8


def test_every_module_can_be_imported_first():
    """In a process of its own each: none relies on what another has imported before it."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n    [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('reinforce')]\n"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, *MODULES], cwd=ROOT, check=True)
