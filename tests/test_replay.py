"""bench/replay.py, which every change of rooms is checked with, finds what differs and nothing else."""

import shutil

import pytest
from conftest import ROOT

from bench.replay import CASES, Runner, differences, replay, with_few


@pytest.mark.slow
def test_a_checkout_repeats_itself_and_a_divisor_that_is_off_by_a_thousandth_is_found(toy_folder, tmp_path):
    """In the loss alone: what is sampled and rewarded in the first step is the same, the length of its gradient is not."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("reinforce", "recipes", "train.py", "serve_rm.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    place = copy / "reinforce/loss.py"
    text = place.read_text()
    place.write_text(text.replace("/ divisor", "/ (divisor + 0.001)"))
    assert place.read_text() != text
    data = with_few(toy_folder, tmp_path / "data")
    runners = {"first": Runner(ROOT), "changed": Runner(copy)}  # both import PyTorch at the same time
    runners["second"] = runners["first"]
    found = {}
    for name, runner in runners.items():
        (tmp_path / name).mkdir()
        found[name] = replay(CASES["server lost"], runner, tmp_path / name, data, None)
    assert found["first"].codes == [75, 0] and len(found["first"].lines["metrics.jsonl"]) == 4
    assert differences(found["first"], found["second"]) == []
    told = differences(found["first"], found["changed"])
    assert any(line.startswith("metrics.jsonl:1: loss") and "grad_norm" in line for line in told)
    assert any(line.startswith("step-000002/model.safetensors") for line in told)
    assert not any(line.startswith(("exit codes", "rollouts.jsonl:1:")) for line in told)
