"""Runs on the small models, and whether two of them are the same run."""

import time

import torch
from conftest import metrics, train_here
from safetensors.torch import load_file

from reinforce.run import checkpoint


def untimed(run):
    """The lines of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in line.items() if not k.startswith("time_") and k != "tokens_per_s"} for line in metrics(run)]


def assert_same(a, b):
    """Two runs that ended alike: parameters, optimizer, every line of their logs."""
    x, y = (checkpoint.checkpoints_of(run)[-1] for run in (a, b))
    assert x.name == y.name and untimed(a) == untimed(b)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        one, other = load_file(x / name), load_file(y / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for name in ("rollouts.jsonl", "validation.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert checkpoint.state(x) == checkpoint.state(y)


def go(flags, run, steps, *more, code=0):
    """train.py in this process."""
    out = train_here(*flags, "--lr", "0.01", "--max-epochs", "99", "--max-steps", steps, "--log-dir", run, *more)
    assert out.returncode == code, out.stdout
    return out.stdout


def wait_for(happened, process, seconds=90):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
