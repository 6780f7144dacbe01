"""How a script ends: the code, the sentence, and the folder that has them."""

import errno
import io
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, script

from reinforce.errors import ConfigError
from reinforce.run import exits, folder
from reinforce.run.update import Sums


def test_a_full_disk_is_one_sentence_and_an_encoding_that_lacks_a_letter_no_traceback(capsys, monkeypatch):
    code, reason = exits.outcome(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1 and "No space left on device" in reason and "Traceback" not in capsys.readouterr().err
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert exits.run(lambda: print("π · ±", flush=True)) == 0
    assert stream.buffer.getvalue() == rb"\u03c0 \xb7 \xb1" + b"\n"


def test_of_two_log_dirs_the_last_one_is_the_run_s_for_the_lock_too():
    assert str(folder.log_dir_of(["--log-dir", "a", "--log-dir=b"])) == "b" and folder.log_dir_of(["x"]) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device without room")
def test_an_exit_json_that_a_full_disk_does_not_take_is_not_left_empty(tmp_path):
    (tmp_path / "exit.json").symlink_to("/dev/full")
    exits.write_exit(tmp_path, 0, "done")
    assert not list(tmp_path.iterdir())


def test_a_reason_with_bytes_that_are_no_text_is_written_all_the_same(tmp_path):
    exits.write_exit(tmp_path, 2, "--policy /tmp/bad\udcff: π is not there")
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 2, "reason": "--policy /tmp/bad\udcff: π is not there"}


def test_a_signal_after_the_end_of_a_run_changes_neither_code_nor_reason(handlers, tmp_path, monkeypatch):
    """torchrun sends one to the other ranks of a rank that fails."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--log-dir", str(tmp_path / "run")])
    written = exits.write_exit

    def late(folder, code, reason):
        os.kill(os.getpid(), signal.SIGTERM)
        written(folder, code, reason)

    monkeypatch.setattr(exits, "write_exit", late)

    def body(life):
        raise ConfigError("it is wrong")

    assert exits.run_in_folder(body) == 2
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {"code": 2, "reason": "it is wrong"}


def test_losses_of_opposite_infinities_are_no_number_and_no_traceback(monkeypatch):
    """`must_be_finite` then ends the run with a sentence."""
    rollout = SimpleNamespace(logp=torch.zeros(1, 2))
    sums = Sums(SimpleNamespace(advantage=torch.zeros(1), rollout=rollout), 0.2)
    monkeypatch.setattr("reinforce.run.update.distributed.gather", lambda _: [(math.inf, 0.0), (-math.inf, 0.0)])
    assert math.isnan(sums.over_ranks().loss)


@pytest.mark.parametrize(("error", "code"), [
    (dist.DistBackendError("NCCL error: ncclRemoteError: ... network error or a remote process exiting prematurely."), 75),
    (dist.DistBackendError("NCCL communicator was aborted on rank 1."), 75), (dist.DistNetworkError("closed"), 75),
    (RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), 75),
    (dist.DistBackendError("NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), 1),
    (dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1"), 1),
])  # fmt: skip
def test_only_a_rank_that_is_gone_is_told_as_one(error, code, capsys):
    """NCCL has one class for all that it has to say, of a GPU without memory as well: trying again would not cure that."""
    assert exits.outcome(error)[0] == code


def test_running_out_of_gpu_memory_or_of_a_quota_is_one_sentence(capsys):
    code, reason = exits.outcome(torch.OutOfMemoryError("CUDA out of memory"))
    assert code == 1 and "--micro-batch-size" in reason and "--gradient-checkpointing" in reason
    assert exits.outcome(OSError(errno.EDQUOT, "Disk quota exceeded"))[1].endswith("give the same command again")
    assert capsys.readouterr().err == ""


def test_a_line_of_an_unbuffered_stream_goes_out_at_once(tmp_path):
    """With PYTHONUNBUFFERED, as in containers, lines stood in a buffer until the end, and a killed process's were lost."""
    (tmp_path / "one.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom reinforce.run.streams import unheard\n"
        "sys.stdout, sys.stderr = unheard(sys.stdout), unheard(sys.stderr)\nprint('out')\nprint('err', file=sys.stderr)\nos._exit(0)\n"
    )
    out = script(tmp_path / "one.py", PYTHONUNBUFFERED=1)
    assert out.stdout == "out\nerr\n"
