"""A run that is stopped, by a signal, its time limit or a failure, loses no finished step."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, environment, metrics, torchrun, train_here
from same_run import assert_same, go, untimed, wait_for

from reinforce.errors import ConfigError, RetryError, StoppedError
from reinforce.rm_client import RewardClient
from reinforce.run import checkpoint
from reinforce.run.config import TrainConfig
from reinforce.run.stop import Stop


def test_a_signal_while_a_model_loads_is_code_75_though_libraries_errors_are_caught_there(flags, tmp_path, monkeypatch):
    def slow(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", slow)
    out = train_here(*flags, "--log-dir", tmp_path)
    assert out.returncode == 75 and "train.py: stopped by SIGTERM before the first step" in out.stdout, out.stdout
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 75


def test_a_terminal_that_closes_stops_a_run_unless_nohup_has_it_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason is None
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = Stop()
    stop.note_only()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason == "SIGHUP"


def test_a_second_signal_before_the_first_step_is_not_a_second_end(handlers):
    stop = Stop()
    with pytest.raises(StoppedError, match="SIGTERM before the first step"):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "SIGINT"


def test_the_time_limit_ends_with_75_and_the_run_goes_on(six, tmp_path):
    flags, _ = six
    run = tmp_path / "run"
    out = go(flags, run, 297, "--save-interval", "999", "--max-time-per-run", "00:00:00:02", code=75)
    done = len(metrics(run))
    assert "its time limit of 2 s" in out and f"after step {done} of 297" in out
    assert [f.name for f in checkpoint.checkpoints_of(run)] == [f"step-{done:06d}"]
    assert f"going on after step {done}" in go(flags, run, done + 1)
    for text in ("3:45", "1:2:3:4", "x", "-1:00:00:00"):
        with pytest.raises(ConfigError, match="DD:HH:MM:SS"):
            TrainConfig(max_time_per_run=text).check()


def test_a_server_that_is_gone_costs_no_step(six, tmp_path, monkeypatch):
    """At the fourth request for rewards no usable answer comes any more: three steps are saved, and the run goes on from there."""
    flags, right = six
    ask, count = RewardClient.rewards, []

    def gone(self, **request):
        count.append(1)
        if len(count) > 8:  # of these, one came before the models and four were validation's
            raise RetryError("reward server gave no usable answer")
        return ask(self, **request)

    monkeypatch.setattr(RewardClient, "rewards", gone)
    out = go(flags, tmp_path / "run", 6, "--save-interval", "99", code=75)
    monkeypatch.undo()
    assert "no usable answer" in out and [f.name for f in checkpoint.checkpoints_of(tmp_path / "run")] == ["step-000003"]
    go(flags, tmp_path / "run", 6)
    assert_same(tmp_path / "run", right)


def test_a_server_that_is_gone_in_a_validation_costs_no_step_either(six, tmp_path, monkeypatch):
    flags, right = six
    run = tmp_path / "run"
    ask, count = RewardClient.rewards, []

    def gone(self, **request):
        count.append(1)
        if len(count) == 8:  # step 3's validation
            raise RetryError("reward server gave no usable answer")
        return ask(self, **request)

    monkeypatch.setattr(RewardClient, "rewards", gone)
    go(flags, run, 6, "--save-interval", "99", code=75)
    assert [f.name for f in checkpoint.checkpoints_of(run)] == ["step-000003"] and len(metrics(run)) == 3
    go(flags, run, 6)
    assert (run / "validation.jsonl").read_bytes() == (right / "validation.jsonl").read_bytes(), "made up for at the start"
    assert untimed(run) == untimed(right)


def test_a_run_that_stops_saves_before_it_validates_and_the_validation_is_made_up_for(six, tmp_path):
    """torchrun kills 30 seconds after its signal, and a validation may take longer."""
    flags, right = six
    run = tmp_path / "run"
    go(flags, run, 6, "--max-time-per-run", "00:00:00:00", code=75)
    (folder,) = checkpoint.checkpoints_of(run)
    step = checkpoint.state(folder)["step"]
    validated = {json.loads(line)["step"] for line in (run / "validation.jsonl").open()}
    assert 0 < step < 6 and step not in validated
    go(flags, run, 6)
    assert_same(run, right)


def test_a_baseline_that_fails_leaves_the_state_of_the_last_finished_step(flags, tmp_path):
    (tmp_path / "b.py").write_text(
        "import torch\n"
        "class Counting:\n"
        "    state = 0\n"
        "    def __call__(self, R, valid):\n"
        "        self.state += 1\n"
        f"        if self.state == 3 and not __import__('os').path.exists({str(tmp_path / 'mended')!r}):\n"
        "            raise ValueError('once')\n"
        "        return torch.zeros_like(R)\n"
        "counting = Counting()\n"
    )
    own = [*flags, "--baseline", f"{tmp_path}/b.py:counting", "--val-check-interval", "99"]
    assert "b.py line 7: ValueError: once" in go(own, tmp_path / "run", 4, code=1)
    (folder,) = checkpoint.checkpoints_of(tmp_path / "run")
    assert checkpoint.state(folder)["step"] == checkpoint.state(folder)["baseline"] == 2
    (tmp_path / "mended").touch()
    go(own, tmp_path / "run", 4)


@pytest.mark.parametrize(
    "scripts", [["train.py"], ["-m", "torch.distributed.run", "--standalone", "train.py"]], ids=["alone", "torchrun"]
)
def test_a_run_whose_reader_has_left_saves_when_it_is_stopped(flags, tmp_path, scripts):
    """Ctrl-C in `train.py | tee log` ends tee as well."""
    words = [*scripts, *flags, "--max-epochs", 900, "--log-dir", tmp_path / "run"]
    started = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment(OMP_NUM_THREADS=1), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    for line in started.stdout:
        if b" 2/2700" in line:
            break
    started.stdout.close()
    started.send_signal(signal.SIGINT)
    started.wait(60)
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 75
    assert checkpoint.checkpoints_of(tmp_path / "run")[-1].name == f"step-{len(metrics(tmp_path / 'run')):06d}"


def test_a_stopping_run_does_not_wait_for_a_dead_server():
    client = RewardClient("127.0.0.1", 9, deadline=60)
    client._info = object.__new__(type("Info", (), {"max_texts": 64, "fingerprint": None}))
    client.stopped = lambda: True
    start = time.monotonic()
    with pytest.raises(RetryError, match="stopped while"):
        client.rewards(query=["x"])
    assert time.monotonic() - start < 10


def test_a_full_disk_ends_the_run_with_the_bytes_it_lacks_and_the_last_checkpoint_whole(six, tmp_path):
    """A limit on the size of a file stands for it: the weights of step 4 do not fit under it."""
    flags, right = six
    run = tmp_path / "run"
    go(flags, run, 3)
    limit = (checkpoint.checkpoints_of(run)[-1] / "model.safetensors").stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        out = train_here(*flags, "--lr", "0.01", "--max-epochs", "99", "--max-steps", "6", "--log-dir", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.returncode == 1 and "MiB needed" in out.stdout and "MiB free" in out.stdout and "Traceback" not in out.stdout, (
        out.stdout
    )
    assert "step 4" in json.loads((run / "exit.json").read_text())["reason"]
    assert [f.name for f in (run / "checkpoints").iterdir() if not f.name.startswith("step-00000")] == []
    assert checkpoint.flaw(checkpoint.checkpoints_of(run)[-1]) is None and checkpoint.checkpoints_of(run)[-1].name == "step-000003"
    go(flags, run, 6)
    assert_same(run, right)


SLOW_DISK = """
import os, time
sync = os.fsync
def slow(handle):
    open(os.environ["SYNCING"], "a").write(".")
    time.sleep(0.15)
    return sync(handle)
os.fsync = slow
"""


def test_signals_while_it_saves_change_nothing(six, tmp_path):
    """On a slow disk a save takes seconds; SIGTERM starts it, and SIGINT, SIGUSR1 and SIGTERM again come while it lasts."""
    flags, _ = six
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    run, syncing = tmp_path / "run", tmp_path / "syncing"
    words = [*flags, "--save-interval", "9999", "--val-check-interval", "9999", "--max-epochs", "9999", "--log-dir", run]
    trainer = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=environment(PYTHONPATH=tmp_path, SYNCING=syncing))  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").exists() and metrics(run), trainer)
    trainer.send_signal(signal.SIGTERM)
    wait_for(syncing.exists, trainer)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        trainer.send_signal(number)
        time.sleep(0.2)
    assert trainer.wait(60) == 75
    assert [checkpoint.flaw(f) for f in checkpoint.checkpoints_of(run)] == [None]
    assert "stopped by SIG" in json.loads((run / "exit.json").read_text())["reason"]


def test_two_sharded_ranks_stop_together_and_one_goes_on(six, tmp_path):
    """Stopped on two ranks under FSDP by a signal to torchrun, and to the end on one, with DDP: one training run.

    18 prompts, 7 a step: the third step of each epoch takes the four that remain, on every number of ranks, each prompt once.
    """
    flags, right = six
    run = tmp_path / "run"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
             ROOT / "train.py", *flags, "--lr", "0.01", "--max-epochs", "99", "--log-dir", run]  # fmt: skip
    job = subprocess.Popen([sys.executable, *map(str, words), "--max-steps", "4000", "--parallel", "fsdp"], env=environment(OMP_NUM_THREADS=1),
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").exists() and metrics(run), job)
    job.send_signal(signal.SIGUSR1)
    job.wait(60)
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    done = len(metrics(run))
    assert (
        checkpoint.checkpoints_of(run)[-1].name == f"step-{done:06d}"
        and checkpoint.flaw(checkpoint.checkpoints_of(run)[-1]) is None
    )

    total = max(6, done + 2)
    go(flags, run, total)
    reference = right if total == 6 else tmp_path / "whole"
    if total > 6:
        go(flags, reference, total)
    for a, b in list(zip(untimed(run), untimed(reference), strict=True))[:4]:  # rounding grows with the steps
        for key in ("reward", "kl", "objective", "response_length", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), (a["step"], key)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for epoch in range(total // 3):
        seen = [row["index"] for row in rows if (row["step"] - 1) // 3 == epoch]
        assert sorted(seen) == list(range(18))
    assert [line["prompts_seen"] for line in metrics(run)][:6] == [7, 14, 18, 25, 32, 36]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_job_without_orphans_and_the_command_goes_on(six, number, tmp_path):
    flags, _ = six
    run = tmp_path / "run"
    (tmp_path / "probe.py").write_text(
        f"import sys, datetime\nsys.path.insert(0, {str(ROOT)!r})\nimport train\ntrain.distributed.TIMEOUT = datetime.timedelta(seconds=8)\n"
        f"import os\nopen({str(tmp_path)!r} + '/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntrain.main()\n"
    )
    words = [*flags, "--lr", "0.01", "--max-epochs", "9999", "--log-dir", run]
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "10",
                            str(tmp_path / "probe.py"), *map(str, words)], env=environment(OMP_NUM_THREADS=1), cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 1, job)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], number)
    assert job.wait(60) != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    done = int(checkpoint.newest(run).name[-6:])
    threading.Event().wait(0.1)
    out = torchrun(2, *words, "--max-steps", done + 1)
    assert out.returncode == 0 and f"going on after step {done}" in out.stdout, out.stdout


def test_a_baseline_that_changes_its_state_in_place_and_fails_leaves_that_of_the_last_finished_step(flags, tmp_path):
    (tmp_path / "b.py").write_text(
        "import torch\n"
        "class Counting:\n"
        "    def __init__(self):\n"
        "        self.state = {'n': 0}\n"
        "    def __call__(self, R, valid):\n"
        "        self.state['n'] += 1\n"
        "        if self.state['n'] == 3:\n"
        "            raise ValueError('once')\n"
        "        return torch.zeros_like(R)\n"
        "counting = Counting()\n"
    )
    seldom = ["--save-interval", "99", "--val-check-interval", "99"]
    out = train_here(*flags, *seldom, "--baseline", f"{tmp_path}/b.py:counting", "--log-dir", tmp_path / "run")
    (folder,) = checkpoint.checkpoints_of(tmp_path / "run")
    assert out.returncode == 1 and checkpoint.state(folder)["baseline"] == {"n": 2}


def test_a_gradient_that_is_not_finite_under_a_finite_loss_makes_no_step(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("train.optim.clip", lambda model, most: math.nan)
    out = train_here(*flags, "--log-dir", tmp_path)
    assert out.returncode == 1 and "no update was made" in json.loads((tmp_path / "exit.json").read_text())["reason"]


def test_a_run_whose_output_is_closed_ends_as_any_other(tmp_path, flags):
    """As under some daemons: sys.stdout is None then."""
    words = " ".join(map(str, [*flags, "--max-steps", "1", "--log-dir", tmp_path / "run"]))
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} {ROOT / 'train.py'} {words} >&- 2>&-"], env=environment(OMP_NUM_THREADS=1)
    )
    assert done.returncode == 0 and json.loads((tmp_path / "run/exit.json").read_text())["code"] == 0
