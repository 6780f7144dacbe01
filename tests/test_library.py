"""The package as a library: its names, its wheel, and the example that uses nothing else."""

import subprocess
import sys

import pytest
from conftest import ROOT, environment

import reinforce
from recipes import toy


def python(code, **how):
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment(), **how)


def test_import_reinforce_alone_loads_no_pytorch():
    out = python("import reinforce, sys; assert 'rloo' in dir(reinforce); print('torch' in sys.modules)", cwd=ROOT)
    assert out.stdout == "False\n", out.stderr


def test_every_export_is_there_and_none_is_a_submodule():
    modules = {path.stem for path in (ROOT / "reinforce").iterdir()}
    for name in reinforce.__all__:
        assert getattr(reinforce, name).__name__ == name and name not in modules
    assert len(reinforce.__all__) >= 12
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reinforce.nothing


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_can_be_imported_from_elsewhere(tmp_path):
    names = subprocess.run(["git", "ls-files", "reinforce", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in [*names.split(), "pyproject.toml", "requirements.txt", "LICENSE", "train.py", "serve_rm.py"]:
        place = tmp_path / "source" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheel", tmp_path / "source"]
    subprocess.run(built, check=True, env=environment(), capture_output=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, capture_output=True)
    assert {str(p.relative_to(tmp_path / "site")) for p in (tmp_path / "site").rglob("*.py")} >= {
        n for n in names.split() if n.endswith(".py")
    }
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from reinforce import sample, rloo, k1, reinforce_loss, Scorer, Ema, RewardClient\n"
        "import reinforce, reinforce.run.run, reinforce.serving.handler, recipes.evaluate, torch\n"
        "assert rloo(torch.tensor([[1.0, 3.0]])).tolist() == [[-2.0, 2.0]]\n"
        "assert recipes.evaluate.Path(recipes.evaluate.__file__).with_name('report.html').exists()\n"
        "print(reinforce.__file__)"
    )
    out = python(code, cwd=tmp_path)
    assert out.stdout.strip() == str(tmp_path / "site/reinforce/__init__.py"), out.stderr


def test_the_library_example_is_26_lines_and_makes_a_step(small):
    lines = (ROOT / "recipes/library.py").read_text().split('"""\n', 2)[1].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 26
    assert {line for line in lines if "import" in line} == {"import sys", "import torch", "import reinforce"}
    prompts = [f"{person} on the pizza in rome :" for person in toy.PEOPLE[:2]]
    out = subprocess.run([sys.executable, "recipes/library.py", str(small / "policy"), *prompts], cwd=ROOT, text=True,
                         capture_output=True, env=environment(PYTHONPATH=ROOT))  # fmt: skip
    assert out.returncode == 0 and "of 8 responses" in out.stdout, out.stderr
