"""How the endpoint ends, and how a client and a run go on after it: signals, kills, a function that hangs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, small_flags
from live import ask, connect, query, read_reply, rewards, until
from test_server import serving

from reinforce.rm_client import RewardClient


def test_after_sigterm_every_reward_that_was_computed_is_delivered(tmp_path):
    (tmp_path / "f.py").write_text(
        "import time\n"
        "def f(prompts, completions, labels):\n"
        "    time.sleep(0.02)\n"
        f"    open({str(tmp_path / 'scored')!r}, 'a').write('x' * len(prompts))\n"
        "    return [1.0] * len(prompts)\n"
    )
    answers = []

    def one_client(port):
        with contextlib.suppress(ConnectionError), connect(port) as one:
            while True:
                one.sendall(query("a"))
                head, data = read_reply(one)
                if not head:
                    return
                answers.append((head.split(b" ")[1], data))

    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", "--inference-micro-batch-size", 4) as (_, port, started):
        threads = [threading.Thread(target=one_client, args=(port,)) for _ in range(48)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 0
        for thread in threads:
            thread.join(10)
    good = [json.loads(data)["rewards"] for status, data in answers if status == b"200"]
    assert good and all(reward == [1.0] for reward in good)
    assert len(good) == len((tmp_path / "scored").read_text())
    assert {status for status, _ in answers} <= {b"200", b"503"}


FUNCTION = """
import multiprocessing, os, signal, threading, time

def square(n):
    return float(n * n)

def late(number, frame):
    raise TimeoutError

def f(prompts, completions, labels):
    assert threading.current_thread() is threading.main_thread()
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except TimeoutError:
        pass
    with multiprocessing.get_context("fork").Pool(2) as pool:
        values = pool.map(square, [len(c) for c in completions])
    if any("hang" in c for c in completions):
        time.sleep(1000)
    return values
"""


def test_a_reward_function_may_use_a_fork_pool_and_signal_alarm_and_one_that_hangs_ends_the_process(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTION)
    soon = "from reinforce.serving import watch\nwatch.HANG_SECONDS = 2.0"
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", before=soon) as (_, port, started):
        for _ in range(3):
            assert rewards(ask(port, query("abc", "de"))) == [9.0, 4.0]
        assert started.poll() is None, "the end of the pool's processes is not ours"
        with connect(port) as hung:
            hung.sendall(query("hang"))
            assert started.wait(30) == 70, (tmp_path / "server.log").read_text()
    assert "a forward took over 2 s" in (tmp_path / "server.log").read_text()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_a_parent_that_ends_during_the_imports_is_noticed(tmp_path):
    (tmp_path / "f.py").write_text("import time\ntime.sleep(60)\nf = len\n")
    start = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, *sys.argv[1:]]); print(p.pid, flush=True); time.sleep(0.5)"
    words = [str(ROOT / "serve_rm.py"), "--reward-fn", f"{tmp_path}/f.py:f", "--exit-with-parent"]
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.run(
            [sys.executable, "-c", start, *words], env=environment(), text=True, stdout=subprocess.PIPE, stderr=log
        )
    child = int(parent.stdout)

    def gone():
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{child}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"  # where nobody buries orphans

    try:
        until(gone, 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_signal_while_it_loads_ends_it_with_code_0(tmp_path):
    (tmp_path / "f.py").write_text(f"import time\nopen({str(tmp_path / 'loading')!r}, 'w')\ntime.sleep(60)\n")
    started = subprocess.Popen([sys.executable, str(ROOT / "serve_rm.py"), "--reward-fn", f"{tmp_path}/f.py:f"], env=environment())
    until(lambda: (tmp_path / "loading").exists(), 60)
    started.send_signal(signal.SIGTERM)
    assert started.wait(20) == 0


@pytest.mark.slow
def test_a_client_goes_on_within_five_seconds_of_the_return_of_a_killed_server(tmp_path):
    """Killed in the middle of a request; the new one takes three seconds to warm up, in which it answers 503."""
    slow = (
        "import time\n{}def f(prompts, completions, labels):\n    time.sleep({})\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "f.py").write_text(slow.format("", 5))
    got = []
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, started):
        client = RewardClient("127.0.0.1", port)
        client.connect()
        asking = threading.Thread(target=lambda: got.append((client.rewards(query=["abc", "de"]), time.monotonic())))
        asking.start()
        time.sleep(0.5)
        started.kill()
        started.wait()
    (tmp_path / "f.py").write_text(slow.format("", 5).replace("sleep(5)", "sleep(0)"))
    client._fingerprint = client._info = None  # the file is another one, which is not what is tested here
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", "--port", port):
        ready = time.monotonic()
        asking.join(20)
    assert got and got[0][0] == [3.0, 2.0] and got[0][1] - ready < 5.0


@pytest.mark.slow
def test_a_run_whose_server_is_killed_in_a_step_ends_bitwise_as_undisturbed(small, tmp_path):
    """The new server takes six seconds to warm up; in that time it answers 503, and the trainer waits."""
    late = tmp_path / "late"
    (tmp_path / "f.py").write_text(
        f"import os, time\nif os.path.exists({str(late)!r}):\n    time.sleep(6)\n"
        "def f(prompts, completions, labels):\n    time.sleep(0.3)\n    return [len(c) / 10 for c in completions]\n"
    )
    weights = []
    for name in ("undisturbed", "disturbed"):
        flags = [*small_flags(small, "PORT"), "--val-check-interval", "99", "--log-dir", tmp_path / name]
        with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, server):
            words = [str(port) if word == "PORT" else str(word) for word in flags]
            train = subprocess.Popen([sys.executable, ROOT / "train.py", *words], env=environment(OMP_NUM_THREADS=1),
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
            if name == "undisturbed":
                out, _ = train.communicate(timeout=120)
            else:
                log, end = tmp_path / name / "metrics.jsonl", time.monotonic() + 60
                while not log.exists() or not log.read_text():
                    assert train.poll() is None and time.monotonic() < end
                    time.sleep(0.02)
                server.kill()
                server.wait()
        if name == "disturbed":
            late.touch()
            with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", "--port", port):
                ready = time.monotonic()
                out, _ = train.communicate(timeout=120)
                assert time.monotonic() - ready < 30
        assert train.returncode == 0, out
        weights.append((tmp_path / name / "checkpoints/step-000003/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


STRANGE = """
import contextlib, io, os, threading, time

class TimedOut(BaseException):
    pass

def f(prompts, completions, labels):
    if "quiet" in completions:
        with contextlib.redirect_stderr(io.StringIO()):
            time.sleep(0.5)
    if "stuck" in completions:
        threading.Thread(target=time.sleep, args=(1000,)).start()
    if "raise" in completions:
        raise TimedOut("too long")
    if "fork" in completions and os.fork() == 0:
        time.sleep(8)
        os._exit(0)
    return [1.0] * len(prompts)
"""


def test_a_function_that_puts_standard_error_aside_or_leaves_a_thread_behind_does_not_keep_the_server_from_ending(tmp_path):
    (tmp_path / "f.py").write_text(STRANGE)
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, started):
        for word in ("quiet", "stuck"):
            assert rewards(ask(port, query(word))) == [1.0]
        started.send_signal(signal.SIGTERM)
        assert started.wait(15) == 0


def test_whatever_a_function_raises_is_its_own_requests_error_alone(tmp_path):
    (tmp_path / "f.py").write_text(STRANGE)
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, started):
        head, body = ask(port, query("raise"))
        assert b" 500 " in head and b"TimedOut: too long" in body
        assert rewards(ask(port, query("a"))) == [1.0] and started.poll() is None


def test_a_connection_that_the_server_closes_is_closed_although_the_function_has_forked(tmp_path):
    (tmp_path / "f.py").write_text(STRANGE)
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, _), connect(port, 5.0) as connection:
        connection.sendall(query("fork"))
        assert rewards(read_reply(connection)) == [1.0]
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert read_reply(connection)[1]
        assert connection.recv(1) == b""  # and not a wait for the child


@pytest.mark.parametrize("asleep", ["idle", "at work"])
def test_a_server_that_was_suspended_goes_on(tmp_path, asleep):
    (tmp_path / "f.py").write_text(
        "import time\ndef f(prompts, completions, labels):\n    time.sleep(2.0 if 'slow' in completions else 0.0)\n    return [1.0] * len(prompts)\n"
    )
    soon = "from reinforce.serving import watch\nwatch.HANG_SECONDS = 3.0"
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", before=soon) as (_, port, started):
        with connect(port) as connection:
            connection.sendall(query("slow" if asleep == "at work" else "fast"))
            time.sleep(0.5)
            started.send_signal(signal.SIGSTOP)
            time.sleep(5.0)
            started.send_signal(signal.SIGCONT)
            assert rewards(read_reply(connection)) == [1.0]
        assert rewards(ask(port, query("fast"))) == [1.0]


def test_a_function_that_keeps_the_interpreter_to_itself_ends_the_process(tmp_path):
    """No thread of Python can see it, so the kernel does; here a regular expression that never ends."""
    (tmp_path / "f.py").write_text(
        "import re\ndef f(prompts, completions, labels):\n    return [float(bool(re.match('(a+)+b', c))) for c in completions]\n"
    )
    soon = "from reinforce.serving import watch\nwatch.LOCKED_SECONDS = 2.0"
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", before=soon) as (_, port, started), connect(port) as connection:
        connection.sendall(query("a" * 40))
        assert started.wait(30) == -signal.SIGPROF
    assert "f.py" in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize(("limit", "code"), [("HANG_SECONDS = 3.0", 70), ("BLOCKED_SECONDS = 3.0", 1)])
def test_a_function_that_keeps_the_interpreter_from_others_is_not_taken_for_a_suspended_server(tmp_path, limit, code):
    """In pieces of two seconds that compute, and in one wait, of which no thread of Python and no processor knows."""
    (tmp_path / "f.py").write_text(
        "import ctypes, re\ndef f(prompts, completions, labels):\n"
        "    if completions == ['wait']:\n        ctypes.PyDLL(None).sleep(60)\n"
        "    for _ in range(99):\n        re.match('(a+)+b', 'a' * 26)\n    return [1.0]\n"
    )
    before = f"from reinforce.serving import watch\nwatch.{limit}"
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", before=before) as (_, port, started), connect(port) as connection:
        connection.sendall(query("compute" if code == 70 else "wait"))
        start = time.monotonic()
        assert started.wait(30) == code
        assert time.monotonic() - start < 15
    assert "f.py" in (tmp_path / "server.log").read_text()
