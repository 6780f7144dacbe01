"""`--baseline FILE.py:NAME`: what is taken, what is refused, and that its state goes on with the run."""

import json
import re

import pytest
import torch
from conftest import metrics, train_here
from safetensors.torch import load_file

from reinforce import baselines, own_baseline
from reinforce.errors import ConfigError

OWN = '''
import torch

calls = 0


def leave_one_out(R, valid):
    n = valid.sum(1, keepdim=True)
    R = torch.where(valid, R, 0.0)
    R = torch.where(valid, R - R.gather(1, valid.int().argmax(1, keepdim=True)), 0.0)
    others = (R.sum(1, keepdim=True) - R) / (n - 1).clamp(min=1)
    return torch.where(valid & (n > 1), R - others, 0.0)


class Average:
    def __init__(self):
        self.state = {"b": 0.0}

    def __call__(self, R, valid):
        A = torch.where(valid, R - self.state["b"], 0.0)
        if valid.any():
            mean = (torch.where(valid, R, 0.0).sum() / valid.sum()).item()
            self.state = {"b": 0.9 * self.state["b"] + (1 - 0.9) * mean}
        return A


average = Average()
number = 3
def noisy(R, valid): return torch.where(valid, torch.rand_like(R), 0.0)
def transposed(R, valid): return leave_one_out(R, valid).T
def a_list(R, valid): return leave_one_out(R, valid).tolist()
def reads_all(R, valid): return torch.where(valid, R - R.mean(), 0.0)
def reads_others(R, valid): return torch.where(valid, R - R.nan_to_num().mean(), 0.0)
def forgets_valid(R, valid): return R.nan_to_num()
def writes(R, valid):
    R[~valid] = 0.0
    return leave_one_out(R, valid)
def raises(R, valid): return R.reshape(5, 5)
def one_argument(R): return R


class BadState(Average):
    def __init__(self):
        self.state = {"b": torch.zeros(1)}

    __call__ = lambda self, R, valid: leave_one_out(R, valid)


bad_state = BadState()
number_keys, pair = BadState(), BadState()
number_keys.state, pair.state = {0: 1.0}, (1.0, 2.0)


def leaves(R, valid):
    raise SystemExit(3)
'''  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", ["leave_one_out", "average"])
def test_a_function_and_an_object_are_taken_and_checking_leaves_no_trace(file, name):
    own_baseline.check(f"{file}:{name}", 3)
    made = own_baseline.make(f"{file}:{name}", 0.5)
    assert not made.needs_greedy and made.state in (None, {"b": 0.0})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("number", "is a int"),
        ("Average", "is a class"),
        ("noisy", "deterministic"),
        ("transposed", r"must return a float tensor \(4, 3\), and returned torch.float64 \(3, 4\)"),
        ("a_list", "and returned list"),
        ("reads_all", "not finite"),
        ("reads_others", "read no reward where valid is false"),
        ("forgets_valid", "must be 0 where valid is false"),
        ("writes", "writes to its inputs"),
        ("raises", "raises RuntimeError"),
        ("leaves", "raises SystemExit: 3"),
        ("one_argument", "raises TypeError"),
        ("bad_state", "must be a JSON value"),
        ("number_keys", "another one after it was set"),
        ("pair", "another one after it was set"),
        ("nowhere", "no function 'nowhere'"),
    ],
)
def test_what_it_must_not_do_is_refused_in_one_sentence(file, name, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        own_baseline.check(f"{file}:{name}", 3)
    assert str(refused.value).startswith(f"--baseline {file}:{name}: ") and "\n" not in str(refused.value)


def test_a_file_without_a_name_or_that_is_not_there_says_so(file):
    with pytest.raises(ConfigError, match="which name in it"):
        own_baseline.check(str(file), 2)
    with pytest.raises(ConfigError, match="no file"):
        own_baseline.check(f"{file}x.py:a", 2)


def test_a_state_that_stops_being_json_ends_the_run_in_that_step(tmp_path):
    """A checkpoint could not be written any more, and would blame the disk."""
    path = tmp_path / "later.py"
    path.write_text("""import torch


class Later:
    state = 0

    def __call__(self, R, valid):
        self.state = R if torch.where(valid, R, 0.0).max() > 9 else self.state + 1
        return torch.zeros_like(R)


later = Later()
""")
    own_baseline.check(f"{path}:later", 3)
    made = own_baseline.make(f"{path}:later", 0.5)
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert made(torch.ones(1, 2), valid).tolist() == [[0, 0]] and made.state == 1
    with pytest.raises(own_baseline.OwnBaselineError, match=r"later\.py:later: .*not JSON serializable"):
        made(torch.full((1, 2), 10.0), valid)


def test_a_name_that_is_neither_known_nor_a_file_is_refused_before_anything_else():
    out = train_here("--baseline", "rlo")
    assert out.returncode == 2 and "'rlo' is none of none, ema, rloo" in out.stdout and "FILE.py:NAME" in out.stdout


@pytest.mark.parametrize(("own", "built_in"), [("leave_one_out", "rloo"), ("average", "ema")])
def test_a_run_with_it_is_that_of_the_built_in_one_bit_by_bit_also_when_it_goes_on(file, flags, tmp_path, own, built_in):
    ends = {}
    for name, baseline in (("own", f"{file}:{own}"), ("built-in", built_in)):
        words = [*flags, "--baseline", baseline, "--save-interval", "1", "--log-dir", tmp_path / name]
        for steps in (2, 3):
            out = train_here(*words, "--max-steps", steps)
            assert out.returncode == 0, out.stdout
        ends[name] = tmp_path / name / "checkpoints/step-000003"
    weights = [load_file(folder / "model.safetensors") for folder in ends.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    kept = ("reward", "advantage_std", "grad_norm")
    assert [[line[k] for k in kept] for line in metrics(tmp_path / "own")] == [
        [line[k] for k in kept] for line in metrics(tmp_path / "built-in")
    ]
    if own == "average":
        state = json.loads((ends["own"] / "state.json").read_text())["baseline"]
        assert state["b"] == json.loads((ends["built-in"] / "state.json").read_text())["baseline"] != 0.0


def test_one_that_fails_in_a_later_step_loses_no_finished_step(flags, tmp_path):
    (tmp_path / "late.py").write_text(
        "import torch\ncalls = 0\n"
        "def late(R, valid):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 3:\n"
        "        raise KeyError('boom')\n"
        "    return torch.where(valid, R, 0.0)\n"
    )
    out = train_here(*flags, "--baseline", f"{tmp_path}/late.py:late", "--save-interval", "9", "--max-steps", "9",
                     "--max-epochs", "9", "--log-dir", tmp_path / "run")  # fmt: skip
    last = out.stdout.strip().splitlines()[-1]
    assert (
        out.returncode == 1
        and re.search(r"late\.py:late: late\.py line \d+: KeyError: 'boom'$", last)
        and "Traceback" not in out.stdout
    ), out.stdout
    assert (tmp_path / f"run/checkpoints/step-{len(metrics(tmp_path / 'run')):06d}").exists()


def test_its_text_belongs_to_the_run_and_its_path_does_not(file, flags, tmp_path):
    words = [*flags, "--log-dir", tmp_path / "run", "--max-steps", "1"]
    assert train_here(*words, "--baseline", f"{file}:leave_one_out").returncode == 0
    moved = tmp_path / "elsewhere.py"
    moved.write_text(OWN)
    out = train_here(*words, "--baseline", f"{moved}:leave_one_out")
    assert out.returncode == 0 and "has all its" in out.stdout
    moved.write_text(OWN + "\n")
    out = train_here(*words, "--baseline", f"{moved}:leave_one_out")
    assert out.returncode == 2 and "baseline was leave_one_out" in out.stdout


def test_every_name_of_the_table_passes_the_same_check_where_it_needs_no_greedy_response(monkeypatch, tmp_path):
    """The check is no stricter than what the repository's own estimators keep."""
    for name, make in baselines.BASELINES.items():
        if not make(0.9).needs_greedy:
            path = tmp_path / "table.py"
            path.write_text(f"from reinforce.baselines import BASELINES\nit = BASELINES[{name!r}](0.9).function\n")
            own_baseline.check(f"{path}:it", 2)


@pytest.mark.parametrize("bad", ["R / 0", "torch.ones_like(R)", "R[:1]"])
def test_a_baseline_that_goes_wrong_in_a_later_step_ends_the_run_before_its_update(bad, flags, tmp_path):
    (tmp_path / "late.py").write_text(
        "import torch\ncalls = 0\ndef late(R, valid):\n    global calls\n    calls += 1\n"
        f"    return {bad} if calls > 2 else torch.where(valid, R, 0.0)\n")  # fmt: skip
    drop = ["--truncated", "drop", "--max-new-tokens", "24"] if "ones" in bad else []
    out = train_here(*flags, *drop, "--baseline", f"{tmp_path}/late.py:late", "--log-dir", tmp_path / "run")
    assert out.returncode == 1 and "--baseline" in out.stdout.splitlines()[-1] and "Traceback" not in out.stdout, out.stdout
