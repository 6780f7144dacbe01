"""The same command goes on where a run was, bitwise, after kills and damage."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics, script, train_here
from safetensors.torch import load_file
from same_run import assert_same, go, untimed

from reinforce.errors import ConfigError, FailedError
from reinforce.run import checkpoint, resume
from reinforce.run.group import recorded


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


def test_logs_that_were_removed_are_no_reason_not_to_go_on(six, tmp_path):
    """A validation that is made up for looks for its step's line."""
    flags, _ = six
    go(flags, tmp_path / "run", 2)
    for log in ("metrics.jsonl", "validation.jsonl"):
        (tmp_path / "run" / log).write_text("")
    assert "going on after step 2" in go(flags, tmp_path / "run", 3)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3]


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


def test_a_damaged_line_of_a_log_costs_itself_alone_and_is_said(tmp_path, capsys):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)]
    for name in resume.LOGS:
        (tmp_path / name).write_text("".join([lines[0], lines[1].replace("s", "\x00"), *lines[2:]]))
    resume.truncate_logs(tmp_path, 3)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"!! {tmp_path / name}: left out 1 damaged lines, first line 2" for name in resume.LOGS]
    for name in resume.LOGS:
        assert (tmp_path / name).read_text() == lines[0] + lines[2]
    assert {path.name for path in tmp_path.iterdir()} == set(resume.LOGS)


def test_a_validation_of_another_shape_is_one_sentence(tmp_path):
    (tmp_path / "validation.jsonl").write_text('{"step": 1, "obbective": [1.0]}\n')
    with pytest.raises(ConfigError, match=r"validation.jsonl: line 1 is damaged"):
        recorded(tmp_path)


def test_a_run_begun_when_prompt_lines_was_named_rows_goes_on(six, tmp_path):
    flags, _ = six
    run = tmp_path / "run"
    go(flags, run, 2)
    identity = json.loads((run / "identity.json").read_text())
    identity["rows"] = identity.pop("prompt_lines")
    (run / "identity.json").write_text(json.dumps(identity))
    assert go(flags, run, 3) and len(metrics(run)) == 3
    identity["rows"] = "0" * 16
    (run / "identity.json").write_text(json.dumps(identity))
    assert "prompt_lines was 0000000000000000" in go(flags, run, 4, code=2)


def test_a_directory_in_the_place_of_a_file_is_one_sentence(six, tmp_path):
    flags, _ = six
    for name in ("identity.json", "validation.jsonl"):
        run = tmp_path / name
        go(flags, run, 2)
        (run / name).unlink()
        (run / name).mkdir()
        out = go(flags, run, 3, code=2)
        assert name in out and "Traceback" not in out, out


def test_nothing_in_a_checkpoint_is_a_pickle(six):
    _, right = six
    folder = checkpoint.checkpoints_of(right)[-1]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja"}, files
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files - {"manifest.json"}
    moments = load_file(folder / checkpoint.OPTIMIZER)
    assert "model.embed_tokens.weight.exp_avg_sq" in moments and not any(name.startswith("lm_head") for name in moments)


def test_a_validation_that_a_kill_has_cut_short_is_made_again(six, tmp_path):
    flags, right = six
    run = tmp_path / "run"
    go(flags, run, 4)
    lines = (run / "validation.jsonl").read_bytes().splitlines(keepends=True)
    (run / "validation.jsonl").write_bytes(b"".join(lines[:-3]))  # of the checkpoint's own step
    go(flags, run, 6)
    assert_same(run, right)


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


def test_logs_and_checkpoint_are_on_the_disk_before_its_name_and_the_name_after(flags, tmp_path, monkeypatch):
    order, sync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), sync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (order.append(Path(b).name), rename(a, b))[1])
    assert train_here(*flags, "--max-steps", "1", "--log-dir", tmp_path / "run").returncode == 0
    at = order.index("step-000001")
    logs = {"metrics.jsonl", "rollouts.jsonl", "validation.jsonl"}
    assert logs | {"model.safetensors", "manifest.json", "training", ".step-000001.partial"} <= set(order[:at])
    assert order[at + 1] == "checkpoints", "and the new name itself"
    assert any(name.startswith(".identity") for name in order[:at])
