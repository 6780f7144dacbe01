"""The launcher's functions: exit.json, folders made once, signals, the hh recipe's flags."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, environment, script

from recipes.pipelines import hh
from reinforce.run import children, launch


@pytest.mark.parametrize(("text", "found"), [
    ('{"code": 75, "reason": "r"}', (75, "r")), ('{"code": 0, "rea', None), ("", None), ("[]", None), ('{"code": null, "reason": ""}', None),
])  # fmt: skip
def test_exit_json_is_read_whole_or_not_at_all(tmp_path, text, found):
    (tmp_path / "exit.json").write_text(text)
    assert launch.read_exit(tmp_path) == found


def test_the_last_value_of_a_flag_counts_as_argparse_has_it():
    value = launch.value_of
    assert value("--log-dir", ["--log-dir", "a", "--log-dir=b"]) == "b" and value("--log-dir", ["--log-dir"]) is None
    assert value("--log-dir", ["--log-dirs", "a"]) is None


def test_a_folder_is_made_once_and_only_whole(tmp_path, monkeypatch):
    """`make` of a command that fails leaves nothing that a next run would take for the result."""
    job = launch.Job.__new__(launch.Job)
    results = []

    def run(script, *words):
        Path(words[-1]).mkdir()
        results.append(words)
        if len(results) == 1:
            raise children.EndedError(3)

    job.run = run
    with pytest.raises(children.EndedError):
        job.make(tmp_path / "w/sft", "recipes/sft.py")
    assert not (tmp_path / "w/sft").exists()
    job.make(tmp_path / "w/sft", "recipes/sft.py")
    job.make(tmp_path / "w/sft", "recipes/sft.py")
    assert (tmp_path / "w/sft").is_dir() and len(results) == 2


def test_what_a_killed_launcher_of_the_same_process_id_has_left_is_removed(tmp_path):
    """In a container the launcher may always be process 1."""
    job = launch.Job.__new__(launch.Job)
    left = tmp_path / f".sft-{platform.node()}-{os.getpid()}"
    left.mkdir()
    (left / "half").touch()
    job.run = lambda script, *words: Path(words[-1]).mkdir()
    job.make(tmp_path / "sft", "recipes/sft.py")
    assert [path.name for path in tmp_path.iterdir()] == ["sft"] and not any((tmp_path / "sft").iterdir())


def test_two_launchers_may_make_the_same_folder(tmp_path):
    job = launch.Job.__new__(launch.Job)

    def run(script, *words):
        for folder in (Path(words[-1]), tmp_path / "sft"):  # the other one is faster
            folder.mkdir()
            (folder / "file").touch()

    job.run = run
    other = tmp_path / f".sft-{platform.node()}-b-1"  # of a machine whose name begins alike
    other.mkdir()
    job.make(tmp_path / "sft", "recipes/sft.py")
    assert {path.name for path in tmp_path.iterdir()} == {"sft", other.name}


def test_a_signal_that_comes_while_the_trainer_starts_is_passed_on(tmp_path, monkeypatch):
    """It would otherwise wait for a trainer that nobody has told, and kill it eleven minutes later."""
    job = launch.Job.__new__(launch.Job)
    job.folder, job.hetjob, job.processes, job.address, job.python = tmp_path, None, "1", ("h", "1"), sys.executable
    job.signals = SimpleNamespace(first=None, trainer=None, told=[], raise_if_any=lambda doing: None)
    job.signals.tell_trainer = job.signals.told.append
    job.watch = lambda trainer: None
    job.conclude = lambda code, before: None

    def started(command):
        job.signals.first = "SIGTERM"
        return SimpleNamespace(code=0)

    monkeypatch.setattr(launch, "Child", started)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    job.train()
    assert job.signals.told == ["SIGTERM"]


def test_the_hh_recipe_takes_its_flags_from_anywhere():
    assert hh.taken("--size", ["--lr", "1", "--size", "quick"], "hour") == ("quick", ["--lr", "1"])
    assert hh.taken("--size", ["--size=full"], "hour") == ("full", []) and hh.taken("--size", [], "hour") == ("hour", [])
    with pytest.raises(children.EndedError, match="--base needs a value"):
        hh.taken("--base", ["--base"], "")
    assert hh.key_of("a") != hh.key_of("b")


def test_a_base_that_was_trained_again_in_its_place_is_another_one_to_the_hh_recipe(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = hh.key_of(str(tmp_path))
    assert hh.key_of(str(tmp_path)) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert hh.key_of(str(tmp_path)) != first


def test_a_process_of_another_user_exists():
    code = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom reinforce.run.children import exists\nos.getuid() or os.setuid(65534)\nprint(exists(1))"
    assert script("-c", code).stdout == "True\n"


def test_a_server_that_is_ready_and_not_reached_ends_the_job_with_its_address(tmp_path, monkeypatch):
    """A wrong interface or a firewall: the GPUs of a job would be held to its time limit."""
    monkeypatch.setattr(launch, "UNREACHED", 0.2)
    monkeypatch.setattr(launch.Job, "is_ready", lambda job, ready: setattr(job, "address", ("node1", "5567")))
    monkeypatch.setattr(launch, "Child", lambda *_, **__: mock.MagicMock(code=None))
    monkeypatch.setenv("PYTHON", sys.executable)
    job = launch.Job("run", ["--log-dir", str(tmp_path)], mock.MagicMock())
    with pytest.raises(children.EndedError, match="ready, and nothing answers here at http://node1:5567") as ended:
        job.serve("--reward-fn", "x:y")
    assert ended.value.code == 1


def test_a_reader_that_leaves_early_sees_no_traceback_of_the_help():
    out = subprocess.run(["bash", "-c", f"{ROOT}/launch.sh --help | true"], text=True, capture_output=True, check=True)
    assert out.stderr == ""


@pytest.mark.parametrize(
    "command", ["./launch.sh --help", f"exec {sys.executable} serve_rm.py --reward-fn recipes/rewards.py:length"]
)
def test_where_nobody_can_write_to_nothing_is_lost_but_the_lines(command, tmp_path):
    """A server whose log was on a full disk ended, and could not say why."""
    ready = tmp_path / "ready"
    serves = "serve_rm" in command
    words = f"{command} --port 0 --ready-file {ready}" if serves else command
    with subprocess.Popen(["bash", "-c", f"{words} > /dev/full"], cwd=ROOT, stderr=subprocess.PIPE, env=environment()) as started:
        while serves and not ready.exists() and started.poll() is None:
            time.sleep(0.05)
        if serves:
            started.terminate()
        assert started.wait(30) == 0 and started.stderr.read() == b""
