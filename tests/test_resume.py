"""A run that cannot be lost: killed, stopped, damaged or out of disk, the same command goes on, bitwise; another one is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, metrics, script, torchrun, train_here
from safetensors.torch import load_file

import train
from reinforce.errors import ConfigError, FailedError, RetryError, StoppedError
from reinforce.rm_client import RewardClient
from reinforce.run import checkpoint, resume
from reinforce.run import folder as run_folders
from reinforce.run.config import TrainConfig
from reinforce.run.folder import claimed
from reinforce.run.stop import Stop


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


@pytest.fixture(scope="module")
def six(small, server_port, tmp_path_factory):
    """Six steps in one go, two epochs of three, with --baseline ema; and the flags."""
    place = tmp_path_factory.mktemp("six")
    flags = ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--val-data", small / "train.jsonl",
             "--rm-host", "127.0.0.1", "--rm-port", server_port, "--num-rollout-samples", "7", "--num-rollouts-per-prompt", "2",
             "--max-new-tokens", "8", "--val-check-interval", "1", "--save-interval", "1", "--save-top-k", "9", "--baseline", "ema"]  # fmt: skip
    go(flags, place / "run", 6)
    return flags, place / "run"


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_run_in_two_parts_is_the_run_in_one_at_every_step(six, cut, tmp_path):
    """Also at the epoch's edge, 3."""
    flags, right = six
    go(flags, tmp_path / "run", cut)
    out = go(flags, tmp_path / "run", 6)
    assert f"going on after step {cut} of 6" in out and out.count("before  ") >= 5
    assert_same(tmp_path / "run", right)


def test_killed_runs_end_as_undisturbed_ones():
    """Real SIGKILLs at random instants: runs of rloo, ema and remax; one with two ranks, of which one is killed (-m slow: of each)."""
    out = script("bench/kills.py", "--kills", 3, 1, "--ranks", 1, 2)
    assert out.returncode == 0, out.stdout
    for line, ranks in zip([json.loads(x) for x in out.stdout.splitlines() if x.startswith("{")], (1, 2), strict=True):
        assert line["kills"] >= (3 if ranks == 1 else 1) and line["lost"] == line["wrong"] == 0 and line["ranks"] == ranks


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--kills", 200], ["--kills", 50, 12, "--ranks", 2, 4], ["--exact"]])
def test_hundreds_of_kills(how):
    out = script("bench/kills.py", *how, timeout=3000)
    assert out.returncode == 0, out.stdout


def test_a_checkpoint_survives_a_kill_before_and_after_each_fsync_and_rename(tmp_path):
    """Saving step 2 beside step 1, killed at every such call in turn: the newest good one is whole, and 2 once its name is there."""
    code = f"""
import os, shutil, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
os.environ["OMP_NUM_THREADS"] = "1"
from pathlib import Path
from conftest import tiny_llama
from bench.kills import deadly
from recipes import toy
from reinforce.run import checkpoint
model, tokenizer, place = tiny_llama(), toy.make_tokenizer(), Path({str(tmp_path)!r})
def save(run, step):
    checkpoint.save(run, step, model, None, tokenizer, {{}}, 0, {{}})
save(place / "first", 1)
at, seen = 0, []
while True:
    at += 1
    for after in (False, True):
        run = place / f"{{at}}-{{after}}"
        shutil.copytree(place / "first", run)
        pid = os.fork()
        if not pid:
            deadly(at, after)
            save(run, 2)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        good = checkpoint.newest(run)
        assert good.name in ("step-000001", "step-000002"), good
        seen.append(good.name)
        save(run, 2)
        assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-000002"] and checkpoint.flaw(run / "checkpoints/step-000002") is None
    if not killed:
        break
assert seen == sorted(seen) and len(set(seen)) == 2, seen
print("kills:", 2 * (at - 1))
"""
    out = script("-c", code)
    assert out.returncode == 0 and "is damaged" not in out.stdout, out.stdout
    assert int(out.stdout.split("kills:")[1]) >= 20


def damage(folder, how):
    """Do to a checkpoint what disks and people do."""
    file = folder / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "one bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "missing":
        (folder / checkpoint.OPTIMIZER).unlink()
    elif how == "garbage":
        (folder / "state.json").write_text("{")
    else:
        (folder / "manifest.json").write_text('{"files": 3}')


@pytest.mark.parametrize("how", ["truncated", "one bit", "missing", "garbage", "manifest"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(six, how, tmp_path, capfd):
    flags, right = six
    run = shutil.copytree(right, tmp_path / "run")
    damage(checkpoint.checkpoints_of(run)[-1], how)
    out = go(flags, run, 6)
    assert "step-000006 is damaged" in out and "going on after step 5" in out
    assert_same(run, right)


def test_a_damaged_checkpoint_is_never_kept_in_place_of_a_good_one(six, tmp_path):
    """Step 6 is damaged; the run goes on from 5 and is cut into parts that end before and after it, with nothing but the last kept."""
    flags, right = six
    run = shutil.copytree(right, tmp_path / "run")
    for folder in checkpoint.checkpoints_of(run)[3:]:
        damage(folder, "one bit")
    go([*flags, "--save-interval", "9"], run, 4, "--save-top-k", "0")
    assert [f.name for f in checkpoint.checkpoints_of(run)] == ["step-000004"] and checkpoint.flaw(
        checkpoint.checkpoints_of(run)[0]
    ) is None
    go(flags, run, 6, "--save-top-k", "0")
    assert_same(run, right)
    assert {f.name for f in (run / "checkpoints").iterdir()} == {
        "step-000006",
        "damaged-step-000004",
        "damaged-step-000005",
        "damaged-step-000006",
    }


def test_an_optimizer_state_of_other_parameters_is_refused(six):
    from conftest import tiny_gpt2

    _, right = six
    other = tiny_gpt2()
    with pytest.raises(FailedError, match="names parameters that the model of this checkpoint does not have"):
        checkpoint.restore(checkpoint.checkpoints_of(right)[-1], other, torch.optim.AdamW(other.parameters()))


def test_without_a_good_checkpoint_nothing_starts_from_scratch(six, tmp_path):
    flags, right = six
    run = shutil.copytree(right, tmp_path / "run")
    for folder in checkpoint.checkpoints_of(run):
        damage(folder, "one bit")
    for how in ("auto", "must"):
        out = go(flags, run, 6, "--resume", how, code=2)
        assert "all of its checkpoints (6) are damaged" in out
    assert untimed(run) == untimed(right), "the logs are as they were"


def test_resume_must_and_never_do_what_they_say(six, tmp_path):
    flags, right = six
    assert "no run to go on with" in go(flags, tmp_path / "none", 6, "--resume", "must", code=2)
    assert "--resume is never" in go(flags, right, 6, "--resume", "never", code=2)
    began = tmp_path / "began"
    began.mkdir()
    (began / "identity.json").write_text("{}")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        resume.find_start(began, "must")
    assert resume.find_start(began, "auto") == resume.Start()  # a run of an older version, without a date


@pytest.mark.parametrize(("change", "told"), [
    (["--lr", "0.02"], "lr was 0.01, is 0.02"), (["--seed", "1"], "seed was 0, is 1"), (["--temperature", "0.9"], "temperature was 1.0, is 0.9"),
    (["--baseline", "rloo"], "baseline was ema, is rloo"), (["--num-rollout-samples", "6"], "num_rollout_samples was 7, is 6"),
])  # fmt: skip
def test_another_configuration_is_refused_with_the_difference(six, change, told):
    flags, right = six
    own = ("exit.json", ".lock")  # exit.json tells of the last command
    before = {p: p.stat().st_mtime_ns for p in right.rglob("*") if p.is_file() and p.name not in own}
    out = train_here(*flags, "--lr", "0.01", "--max-epochs", "99", "--max-steps", "6", "--log-dir", right, *change)
    assert out.returncode == 2 and told in out.stdout and "holds another run" in out.stdout, out.stdout
    assert out.stdout.count(" was ") == 1
    assert {p: p.stat().st_mtime_ns for p in right.rglob("*") if p.is_file() and p.name not in own} == before


def test_other_prompts_another_policy_and_another_reward_model_are_another_run(six, small, tmp_path):
    flags, right = six
    own = json.loads((right / "identity.json").read_text())
    fewer = tmp_path / "train.jsonl"
    fewer.write_text("".join((small / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    out = go([*flags, "--train-data", fewer], right, 6, code=2)
    assert "prompts was" in out and "policy was" not in out
    other = shutil.copytree(small / "reward_model", tmp_path / "policy")
    assert resume.weights(str(other)) != own["policy"] == resume.weights(str(small / "policy"))
    assert own["reward_model"] and len(own["reward_model"]) == 64
    moved = shutil.copytree(small / "policy", tmp_path / "moved")
    assert "has all its 6 steps" in go([*flags, "--policy", moved], right, 6), "the same policy in another place is the same"


def test_flags_that_only_cut_the_work_otherwise_may_change(six, tmp_path):
    flags, right = six
    run = tmp_path / "run"
    go(flags, run, 3)
    out = go(flags, run, 6, "--micro-batch-size", "3", "--save-interval", "2", "--gradient-checkpointing", "--parallel", "fsdp")
    assert "going on after step 3" in out
    for a, b in zip(untimed(run), untimed(right), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_finished_run_is_left_as_it_is(six, tmp_path):
    flags, right = six
    run = shutil.copytree(right, tmp_path / "run")
    out = go(flags, run, 6)
    assert "this run has all its 6 steps" in out and json.loads((run / "exit.json").read_text())["code"] == 0
    assert_same(run, right)
    assert go(flags, run, 4) and len(metrics(run)) == 6, "a smaller --max-steps takes nothing back"


def test_logs_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    lines = [json.dumps({"step": step, "text": "a\u2028b"}) + "\n" for step in (0, 1, 1, 2, 2, 3)]
    for name in resume.LOGS:
        (tmp_path / name).write_text("".join(lines) + '{"step": 2, "te')
    resume.truncate_logs(tmp_path, 2)
    for name in resume.LOGS:
        assert (tmp_path / name).read_text() == "".join(lines[:5])
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3].rstrip("\n"))
    resume.truncate_logs(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])
    resume.truncate_logs(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_every_field_of_the_configuration_is_either_part_of_the_run_or_soft():
    import dataclasses

    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert names >= resume.SOFT
    hard = resume.identity(TrainConfig(), policy="x")
    assert set(hard) == (names - resume.SOFT) | {"policy"} and {"lr", "baseline", "seed", "precision"} <= set(hard)


def test_a_decaying_rate_ties_a_run_to_its_end_and_a_younger_flag_counts_as_its_default(six, tmp_path):
    flags, right = six
    go(flags, tmp_path / "run", 2, "--min-lr", "0.001")
    assert "total_steps was 2, is 6" in go(flags, tmp_path / "run", 6, "--min-lr", "0.001", code=2)
    run = shutil.copytree(right, tmp_path / "old")
    there = json.loads((run / "identity.json").read_text())
    del there["ratio_clip"]
    (run / "identity.json").write_text(json.dumps(there))
    go(flags, run, 6)
    assert "ratio_clip was 0.2, is 0.3" in go(flags, run, 6, "--ratio-clip", "0.3", code=2)


def test_a_signal_while_a_model_loads_is_code_75_though_libraries_errors_are_caught_there(flags, tmp_path, monkeypatch):
    def slow(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", slow)
    out = train_here(*flags, "--log-dir", tmp_path)
    assert out.returncode == 75 and "train.py: stopped by SIGTERM before the first step" in out.stdout, out.stdout
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 75


def test_a_new_folder_of_its_own_is_held_like_a_given_one(flags, tmp_path, monkeypatch):
    def elsewhere(self, step):
        with pytest.raises(ConfigError, match="a run is going on there right now"), run_folders.claimed(self._folder):
            pass
        tried.append(step)
        return rate(self, step)

    tried, rate = [], train.Run.learning_rate
    monkeypatch.setattr(train.Run, "learning_rate", elsewhere)
    monkeypatch.chdir(tmp_path)
    out = train_here(*flags, "--max-steps", "1")
    assert out.returncode == 0 and tried, out.stdout
    with run_folders.claimed(tmp_path / "runs/latest"):
        pass


def test_a_second_signal_before_the_first_step_is_not_a_second_end():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = Stop()
        with pytest.raises(StoppedError, match="SIGTERM before the first step"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_nothing_in_a_checkpoint_is_a_pickle(six):
    _, right = six
    folder = checkpoint.checkpoints_of(right)[-1]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja"}, files
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files - {"manifest.json"}
    moments = load_file(folder / checkpoint.OPTIMIZER)
    assert "model.embed_tokens.weight.exp_avg_sq" in moments and not any(name.startswith("lm_head") for name in moments)


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


def test_a_validation_that_a_kill_has_cut_short_is_made_again(six, tmp_path):
    flags, right = six
    run = tmp_path / "run"
    go(flags, run, 4)
    lines = (run / "validation.jsonl").read_bytes().splitlines(keepends=True)
    (run / "validation.jsonl").write_bytes(b"".join(lines[:-3]))  # of the checkpoint's own step
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
    assert "it raises ValueError: once" in go(own, tmp_path / "run", 4, code=1)
    (folder,) = checkpoint.checkpoints_of(tmp_path / "run")
    assert checkpoint.state(folder)["step"] == checkpoint.state(folder)["baseline"] == 2
    (tmp_path / "mended").touch()
    go(own, tmp_path / "run", 4)


def test_checkpoints_that_cannot_be_listed_are_no_reason_to_begin_again(six, tmp_path):
    """Their disk is not mounted, say; the logs of the run would be emptied."""
    flags, _ = six
    run = tmp_path / "run"
    go(flags, run, 2)
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    assert "checkpoints: cannot be listed" in go(flags, run, 3, code=2)
    assert len(metrics(run)) == 2
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert "going on after step 2" in go(flags, run, 3)


def test_prompts_that_draw_other_numbers_or_reach_the_reward_in_another_form_are_another_run(six, small, tmp_path):
    """A line that is too long is left out, but counts; messages are not scored as text."""
    flags, _ = six
    prompts = (small / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "max on the film in paris : " * 40}) + "\n" + prompts)
    own = [*flags, "--train-data", tmp_path / "train.jsonl"]
    go(own, tmp_path / "run", 1)
    (tmp_path / "train.jsonl").write_text(prompts)
    assert "holds another run: prompt_lines was" in go(own, tmp_path / "run", 2, code=2)


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


def test_the_same_command_given_twice_at_once_is_refused_and_leaves_the_run_alone(six, tmp_path):
    flags, _ = six
    with claimed(tmp_path / "run"):
        assert "a run is going on there right now" in go(flags, tmp_path / "run", 1, code=2)
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    go(flags, tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in go(flags, tmp_path / "file/run", 1, code=2)


def wait_for(happened, process, seconds=90):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)


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


def test_flags_that_say_the_same_in_other_words_are_no_other_run(six, tmp_path):
    flags, right = six
    shutil.copytree(right, tmp_path / "run")
    same = ("--min-lr", "0.01", "--global-batch-size", "14")
    assert "has all its 6 steps" in go(flags, tmp_path / "run", 6, *same)
    assert "global_batch_size was None, is 2" in go(flags, tmp_path / "run", 6, "--global-batch-size", "2", code=2)


def test_another_run_is_refused_before_any_model_is_loaded(six, tmp_path, monkeypatch):
    """And the identity of a run that the guard refuses is never written, so its folder is free for the right command."""
    from reinforce.run import loading

    flags, right = six
    shutil.copytree(right, tmp_path / "run")
    monkeypatch.setattr(loading, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "holds another run" in go(flags, tmp_path / "run", 6, "--temperature", "0.7", code=2)


def test_runs_latest_moves_once_the_models_have_passed_and_only_for_folders_in_runs(six, small, tmp_path, monkeypatch):
    flags, _ = six
    flags = [str(Path(word).resolve()) if isinstance(word, Path) else word for word in flags]
    monkeypatch.chdir(tmp_path)
    go(flags, "runs/a", 1)
    assert (tmp_path / "runs/latest").resolve() == (tmp_path / "runs/a").resolve()
    broken = tmp_path / "broken"
    shutil.copytree(small / "policy", broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    go([*flags, "--policy", broken], "runs/b", 1, code=2)
    go(flags, tmp_path / "elsewhere", 1)
    assert (tmp_path / "runs/latest").resolve() == (tmp_path / "runs/a").resolve()
    go(flags, tmp_path / "runs" / "c", 1)
    assert (tmp_path / "runs/latest").readlink() == Path("c")


def test_a_run_that_began_with_other_defaults_goes_on_with_its_own(six, tmp_path):
    """What the toy's defaults were for any policy is a language model's now; the same command is the same run."""
    flags, _ = six
    i = flags.index("--max-new-tokens")
    bare = [*flags[:i], *flags[i + 2 :]]
    go(flags, tmp_path / "run", 2)
    assert "responses of at most 8 tokens" in go(bare, tmp_path / "run", 3)
    assert "max_new_tokens was 8, is 9" in go([*bare, "--max-new-tokens", "9"], tmp_path / "run", 4, code=2)


TODAY = "{% for m in messages %}on {{ strftime_now(format='%d') }} : {{ m.content }} {% endfor %}"


def test_a_chat_template_that_prints_the_day_gives_the_same_prompts_when_the_run_goes_on_tomorrow(
    small, server_port, tmp_path, monkeypatch
):
    import datetime

    policy = tmp_path / "policy"
    shutil.copytree(small / "policy", policy)
    (policy / "chat_template.jinja").write_text(TODAY)
    chats = [{"messages": [{"role": "user", "content": f"anna on the {thing}"}]} for thing in ("pizza", "hotel", "film", "phone")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = ["--policy", policy, "--train-data", tmp_path / "chats.jsonl", "--rm-host", "127.0.0.1", "--rm-port", server_port,
             "--num-rollout-samples", "4", "--max-new-tokens", "6", "--save-interval", "1", "--rm-format", "query"]  # fmt: skip

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2099, 1, 17)

    go(flags, tmp_path / "run", 1)
    go(flags, tmp_path / "whole", 2)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    go(flags, tmp_path / "run", 2)
    assert_same(tmp_path / "run", tmp_path / "whole")
    kept = tmp_path / "run/checkpoints/step-000002/chat_template.jinja"
    assert kept.read_text() == TODAY and json.loads((tmp_path / "run/identity.json").read_text())["date"]
    assert resume.date_of(tmp_path / "run") == datetime.date.today().isoformat() and resume.date_of(tmp_path) is None


def test_auto_precision_goes_on_as_the_run_began_and_is_one_rule_for_all_processors(six, tmp_path, monkeypatch):
    from reinforce import device as devices

    cpu = torch.device("cpu")
    for has, fast in (
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert devices.bf16_is_fast(cpu) == fast
    monkeypatch.setattr(devices, "SMALL", 0)
    flags, right = six
    shutil.copytree(right, tmp_path / "run")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert "fp32" in go(flags, tmp_path / "run", 7), "not bf16, which this processor is faster in"
    assert "precision was auto, is bf16" in go(flags, tmp_path / "run", 8, "--precision", "bf16", code=2)
