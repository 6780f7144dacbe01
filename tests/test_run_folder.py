"""The run folder: which one a command means, which checkpoint in it is the newest, and who leaves it alone."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import metrics, script, train_here
from same_run import go

import train
from reinforce.errors import ConfigError
from reinforce.rm_client import RewardClient
from reinforce.run import folder as run_folders
from reinforce.run import launch


def test_a_run_keeps_to_its_folder_when_the_link_that_named_it_moves(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "latest").symlink_to("a")
    link = str(tmp_path / "latest")
    assert run_folders.log_dir_of(["--log-dir", link]) == run_folders.new_run_folder(link, "x") == (tmp_path / "a").resolve()


def test_a_run_goes_on_where_the_link_led_when_it_began(flags, tmp_path, monkeypatch):
    """Another command may begin, and the link move, while this one waits for its reward server."""
    monkeypatch.chdir(tmp_path)
    go(flags, tmp_path / "runs/a", 1)
    go(flags, tmp_path / "runs/b", 2)
    link = tmp_path / "runs/latest"
    connect = RewardClient.connect

    def move(self, wait):
        link.unlink()
        link.symlink_to("b")
        connect(self, wait)

    link.unlink()
    link.symlink_to("a")
    monkeypatch.setattr(RewardClient, "connect", move)
    assert "going on after step 1" in go(flags, "runs/latest", 3)
    assert [len(metrics(f"runs/{run}")) for run in "ab"] == [3, 2]


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path):
    for step in (999_999, 1_000_001, 1_000_000):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints/step-best").mkdir()
    found = [folder.name for folder in run_folders.checkpoints_of(tmp_path)]
    assert found == ["step-999999", "step-1000000", "step-1000001"]
    assert launch.newest_checkpoint(tmp_path) == "step-1000001"


def test_asking_for_help_touches_no_run(tmp_path):
    (tmp_path / "exit.json").write_text("{}")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "identity.json").write_text("{}")
    assert script("train.py", "--log-dir", tmp_path, "--help").returncode == 0 and (tmp_path / "exit.json").exists()
    assert "--log-dir is empty" in script("train.py", "--log-dir", "").stdout


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


def test_the_same_command_given_twice_at_once_is_refused_and_leaves_the_run_alone(six, tmp_path):
    flags, _ = six
    with run_folders.claimed(tmp_path / "run"):
        assert "a run is going on there right now" in go(flags, tmp_path / "run", 1, code=2)
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    go(flags, tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in go(flags, tmp_path / "file/run", 1, code=2)


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
    (tmp_path / f"runs/.latest-{os.getpid()}").symlink_to("x")  # of a command that was killed under this process id
    go(flags, "runs/d", 1)
    assert (tmp_path / "runs/latest").readlink() == Path("d")
