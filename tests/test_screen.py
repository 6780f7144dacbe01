"""What a person sees: the bar in a real terminal of any width, the lines where there is none, the last screen."""

import codecs
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, environment, script
from test_client import INFO, reply

from reinforce.data.prompts import Data
from reinforce.run.printable import cells, escaped, wrapped
from reinforce.run.screen import bar_line, step_line
from reinforce.run.summary import print_summary
from reinforce.text import Prompt

NUMBERS = {"reward": "-12.34", "KL": "123.45", "length": "1024", "tokens/s": "123456"}
ODD = {
    "newlines": "first\nsecond\r\nthird",
    "escape sequences": "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "control characters": "\x00\x08\x7f\x9b\u202e\u2028",
    "half a character": "\ud800 end",
    "wide": "漢字かな" * 300,
    "combining": "a" + "\u0301" * 10_000,
    "long": "word " * 2_000,
    "one word": "x" * 10_000,
    "empty": "",
}
STEPS = """
import sys, time
from reinforce.run.screen import Progress
progress = Progress(int(sys.argv[1]))
for step in range(1, int(sys.argv[1]) + 1):
    progress.step({"step": step, "reward": -1.234, "kl": 12.345, "response_length": 24.0, "tokens_per_s": 34311.6})
    if step == 2:
        progress.say("validation after step 2: reward 1.486 ± 0.028")
    if len(sys.argv) > 2:
        sys.stdin.readline()
progress.close()
print("the end")
"""


class Terminal:
    """A process on a terminal of its own, and what stands on the screen afterwards."""

    def __init__(self, columns, *words, **extra):
        self.main, side = pty.openpty()
        self.resize(columns)
        env = environment(**{"PYTHONPATH": ROOT, "TERM": "xterm", **extra})
        self.process = subprocess.Popen([sys.executable, *map(str, words)], stdin=side, stdout=side, stderr=side, env=env)
        os.close(side)
        self.text, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def resize(self, columns):
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read_until(self, step=None):
        """Everything that is written until this step's bar stands, or until the end."""
        data = ""
        with contextlib.suppress(OSError):  # EIO: the process has ended
            while step is None or not re.search(rf"step {step}/[^\r]*\x1b\[K", data):
                data += self.decoder.decode(os.read(self.main, 4096))
        self.text += data
        return data

    def finish(self):
        self.read_until()
        os.close(self.main)
        assert self.process.wait(60) == 0, self.text
        return screen_of(self.text)


def screen_of(text):
    """The lines that remain: a carriage return goes back, and a text drawn over another one ends with an erasure."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [re.sub(r"\x1b\[K", "", line.split("\r")[-1]) for line in lines]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "steps.py"
    path.write_text(STEPS)
    return path


@pytest.mark.parametrize("columns", [0, 40, 80, 200])
def test_a_terminal_shows_one_line_that_fits_with_whole_numbers_and_a_bar_where_there_is_room(columns, program):
    lines = Terminal(columns, program, 3).finish()
    assert lines[:-3] == ["validation after step 2: reward 1.486 ± 0.028"], "one line for the whole run, below what was said"
    bar, end, _ = lines[-3:]
    assert end == "the end" and len(bar) < (columns or 80) and bar.startswith("step 3/3") and "reward -1.23" in bar
    assert all(word in bar for word in ("KL 12.35", "tokens/s 34312", "|██", "  in 0:00:0")) or columns == 40
    assert ("length 24.00" in bar) == (columns == 200)


def test_a_resized_terminal_is_fitted_at_the_next_step(program):
    terminal = Terminal(120, program, 3, "wait")
    assert 80 < len(screen_of(terminal.read_until(1))[-1]) < 120
    terminal.resize(50)
    os.write(terminal.main, b"\n")
    terminal.read_until(2)
    os.write(terminal.main, b"\n\n")
    bar = next(line for line in terminal.finish() if line.startswith("step 3/3"))
    assert len(bar) < 50 and "tokens/s 34312" in bar


@pytest.mark.parametrize("how", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii:replace"}], ids=["dumb", "ascii"])
def test_a_simple_terminal_gets_what_it_can_show(how, program):
    text = "\n".join(Terminal(80, program, 3, **how).finish())
    assert "█" not in text and ("\x1b" not in text)
    assert len(re.findall(r"step \d/3", text)) == 3 if "TERM" in how else "|####" in text


def test_where_there_is_no_terminal_a_step_is_a_line_of_at_most_80_columns(program):
    out = script(program, 3, PYTHONPATH=ROOT).stdout.splitlines()
    assert [line[:8] for line in out] == ["step 1/3", "step 2/3", "validati", "step 3/3", "the end"]
    assert out[0] == "step 1/3  reward  -1.23  KL  12.35  length  24.00  tokens/s  34312"
    assert len(step_line(1_000_000, 1_000_000, {**NUMBERS, "KL": "12.34"})) <= 80


@pytest.mark.parametrize("total", [1, 100, 1_000_000])
def test_a_bar_of_any_width_holds_whole_fields_or_none(total):
    for columns in range(200):
        for numbers in ({}, NUMBERS, {k: v for k, v in NUMBERS.items() if k != "KL"}):
            for clock in ("", "2777:46:40 left"):
                line = bar_line(total, total, numbers, clock, columns)
                assert len(line) <= columns
                rest = re.sub(r"^(step +)?\d*(/\d+|%)?( \|[█ ]*\|)?", "", line)
                for whole in ("2777:46:40 left", *(f"{k} {v:>5}" for k, v in numbers.items())):
                    rest = rest.replace(f"  {whole}", "", 1)
                assert rest == "", line
    assert f"|{'█' * 10}{' ' * 10}|" in bar_line(50, 100, NUMBERS, "", 78)


@pytest.mark.parametrize("text", ODD.values(), ids=list(ODD))
def test_an_odd_text_is_shown_in_a_few_lines_without_a_control_character(text):
    rows = wrapped(escaped(text, "utf-8"), 30, 4)
    assert len(rows) <= 4 and all(cells(row) <= 30 and len(row) <= 63 and row.isprintable() for row in rows)
    assert "".join(rows).startswith(escaped(text, "utf-8").strip()[:10])
    assert (len(text) > 200) == bool(rows and rows[-1].endswith("..."))


def test_a_text_that_the_encoding_lacks_is_escaped():
    assert escaped("漢 ± x", "latin-1") == r"\u6f22 ± x" and escaped("±", "ascii") == r"\xb1"


def one_prompt(i, text="ask"):
    return Prompt(i, f"<user>{text} {i}", (1,), [{"role": "user", "content": f"{text} {i}"}])


def rollout(step, index, responses, rewards):
    return json.dumps({"step": step, "index": index, "prompt": "rendered", "response": responses, "reward": rewards}) + "\n"


def summary(folder, prompts, held_out=0, stream=None, lines=({"optimizer_steps": 1, "refused": 0},)):
    """The last screen, written to a stream that is no terminal unless one is given."""
    stream = stream or io.StringIO()
    many = lambda n: [one_prompt(i) for i in range(n)]  # noqa: E731
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with contextlib.redirect_stdout(stream):
        print_summary(Data(many(prompts), many(held_out), 2, 0), folder)
    return stream.getvalue() if isinstance(stream, io.StringIO) else None


def test_without_validation_two_responses_of_the_first_step_and_of_the_last_are_shown(tmp_path):
    lines = [rollout(s, 10 * s + i - 10, [f"said {s} {i} {k}" for k in "ab"], [s + 0.5, None]) for s in (1, 2, 3) for i in range(3)]
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    out = summary(tmp_path, 23)
    shown = re.findall(r"prompt  ask (\d+)\nstep (\d)  \+\d\.50  said \d (\d) a", out)
    assert shown == [("0", "1", "0"), ("1", "1", "1"), ("21", "3", "1"), ("22", "3", "2")]
    assert out.count("said") == 4


def test_a_step_of_one_prompt_shows_two_of_its_responses_and_a_refused_one_has_no_reward(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("".join(rollout(s, 0, [f"a{s}", f"b{s}", f"c{s}"], [1.0, None, 0.0]) for s in (1, 2)))
    out = summary(tmp_path, 1)
    assert [line for line in out.splitlines() if line.startswith("step")] == [
        "step 1  +1.00  a1", "step 1  refused  b1", "step 2  +1.00  a2", "step 2  refused  b2"]  # fmt: skip


def test_refused_responses_and_steps_without_update_are_counted(tmp_path):
    lines = [{"optimizer_steps": n, "refused": r} for n, r in ((1, 0), (0, 2), (0, 5))]
    (tmp_path / "rollouts.jsonl").write_text(rollout(1, 0, ["a", "b"], [1.0, 2.0]))
    out = summary(tmp_path, 1, lines=lines)
    assert "no update    in 2 steps" in out and "left out     5 responses that the reward server refused" in out
    assert "no update" not in summary(tmp_path, 1) and "left out" not in summary(tmp_path, 1)


def test_a_run_of_one_step_shows_it_once(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text(rollout(1, 0, ["a", "b"], [1.0, 2.0]) + rollout(1, 1, ["c", "d"], [1.0, 2.0]))
    assert [line[-1] for line in summary(tmp_path, 2).splitlines() if line.startswith("step 1")] == ["a", "c"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("text", ODD.values(), ids=list(ODD))
def test_odd_responses_leave_the_last_screen_whole(text, encoding, tmp_path):
    (tmp_path / "rollouts.jsonl").write_text(rollout(1, 0, [text] * 2, [0.0] * 2))
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    summary(tmp_path, 1, stream=stream)
    stream.seek(0)
    lines = stream.read().split("\n")
    assert all(line.isprintable() and cells(line) <= 80 for line in lines if str(tmp_path) not in line)
    assert len(lines) < 22 and sum(line.startswith("step 1  +0.00  ") for line in lines) == 2
    assert ("step 1  +0.00  (empty)" in lines) == (text == "")


def test_the_files_are_one_a_line_and_never_broken(tmp_path):
    folder = tmp_path / ("long-" * 30) / "run"
    (folder / "checkpoints/step-000010").mkdir(parents=True)
    (folder / "rollouts.jsonl").write_text("")
    lines = summary(folder, 1).splitlines()[-5:]
    assert [line.split(maxsplit=1)[1] for line in lines[:4]] == [
        str(folder / name) for name in ("curves.png", "metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000010")]  # fmt: skip
    assert re.fullmatch(r"peak memory  \d+\.\d GiB", lines[4])


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_of_validations_fits_the_terminal(columns, tmp_path):
    fields = {"prompt": "p", "kl": None, "valid": [True], "length": [3], "finished": [True], "logp": [0.0]}
    rows = [
        {"step": s, "index": 0, **fields, "response": ["a b c"], "reward": [r], "objective": [r]} for s, r in ((0, 0.5), (9, 1.5))
    ]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main, side = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(side, "w") as terminal:
        summary(tmp_path, 1, 1, terminal)
        lines = os.read(main, 10_000).decode().split("\r\n")
    os.close(main)
    assert all(len(line) <= columns for line in lines if str(tmp_path) not in line)
    assert ("distinct-2" in lines[1]) == (columns == 80)
    assert "before  +0.50  a b c" in lines and "after   +1.50  a b c" in lines


def test_an_error_message_stands_on_a_line_of_its_own_and_not_behind_the_bar(small, server, tmp_path):
    """The reward server breaks its word in the second step."""
    seen = []

    def answer(request, _):
        seen.extend(request["query"])
        bad = len(seen) > 1 + 4  # the first step's, and one that is asked at the start
        return reply(
            {"rewards": "none" if bad else [0.5] * len(request["query"]), "id": request["id"], "fingerprint": INFO["fingerprint"]}
        )

    port = server(answer).port
    flags = ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", port]
    sizes = ["--num-rollout-samples", 2, "--num-rollouts-per-prompt", 2, "--max-new-tokens", 8, "--log-dir", tmp_path / "run"]
    terminal = Terminal(80, ROOT / "train.py", *flags, *sizes)
    terminal.read_until()
    assert terminal.process.wait(60) == 1
    lines = screen_of(terminal.text)
    (bar,) = [line for line in lines if line.startswith("step")]
    assert bar.startswith("step 1/9 |█") and "reward  0.50" in bar and len(bar) < 80
    assert lines[lines.index(bar) + 1].startswith("train.py: ")
