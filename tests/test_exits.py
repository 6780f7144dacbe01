"""How a script ends: the code, the sentence, and the folder that has them."""

import errno
import io
import sys

from reinforce.run import exits, folder


def test_a_full_disk_is_one_sentence_and_an_encoding_that_lacks_a_letter_no_traceback(capsys, monkeypatch):
    code, reason = exits.outcome(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1 and "No space left on device" in reason and "Traceback" not in capsys.readouterr().err
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert exits.run(lambda: print("π · ±", flush=True)) == 0
    assert stream.buffer.getvalue() == rb"\u03c0 \xb7 \xb1" + b"\n"


def test_of_two_log_dirs_the_last_one_is_the_run_s_for_the_lock_too():
    assert str(folder.log_dir_of(["--log-dir", "a", "--log-dir=b"])) == "b" and folder.log_dir_of(["x"]) is None
