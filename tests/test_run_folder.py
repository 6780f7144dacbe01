"""The run folder: which one a command means, which checkpoint in it is the newest, and who leaves it alone."""

from conftest import script

from reinforce.run import folder as run_folders
from reinforce.run import launch


def test_a_run_keeps_to_its_folder_when_the_link_that_named_it_moves(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "latest").symlink_to("a")
    link = str(tmp_path / "latest")
    assert run_folders.log_dir_of(["--log-dir", link]) == run_folders.new_run_folder(link, "x") == (tmp_path / "a").resolve()


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
