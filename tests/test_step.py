"""recipes/step.py: the printed numbers against a computation with transformers and torch alone, and what may go wrong."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from statistics import mean
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from recipes import step, step_screen
from reinforce.run import exits
from reinforce.run.config import TrainConfig

ROUNDED = 2e-3  # a printed number is off by half of 0.001, a difference of two by 0.001
REWARD = """
import json, pathlib

def length(prompts, completions, labels):
    heard = {"prompts": prompts, "completions": completions, "labels": labels}
    pathlib.Path(__file__).with_name("heard.json").write_text(json.dumps(heard))
    return [float(len(c)) for c in completions]

def short(prompts, completions, labels):
    return [1.0]

def nan(prompts, completions, labels):
    return [float("nan") for _ in completions]

def broken(prompts, completions, labels):
    raise KeyError("label")

same = 1.0
"""


def run_step(*words):
    """The recipe in this process: exit code, the text it printed, and the numbers in it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", ["x", *map(str, words)]):
        code = exits.run(step.main, name="recipes/step.py")
    return SimpleNamespace(code=code, text=out.getvalue(), error=err.getvalue(), **(parsed(out.getvalue()) if code == 0 else {}))


def parsed(text):
    """Rows of the table by their names, the responses' texts, the lines below the table by theirs."""
    rows = {name.strip(): list(map(float, numbers.split()))
            for name, numbers in re.findall(r"^(.{11})((?: +-?\d+\.\d+){4})  ", text, re.MULTILINE)}  # fmt: skip
    shown = re.search(r"\n\n(y1  .*?)\n\n", text, re.DOTALL)[1]
    responses = [one.replace("\n    ", " ") for one in re.split(r"^y\d  ", shown, flags=re.MULTILINE)[1:]]
    notes = dict(re.findall(r"^(gradient|climb|A > 0|A < 0|token) +(.*)$", text, re.MULTILINE))
    return {"rows": rows, "responses": [one.strip() for one in responses], "notes": notes}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with reward functions."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "rewards.py").write_text(REWARD)
    return folder


CASES = {
    "default": (),
    "first": ("--steps", 1),
    "far": ("--steps", 3, "--seed", 5, "--lr", 3e-3),
    "own": ("--reward-fn", "rewards.py:length"),
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
def test_every_printed_number_follows_from_the_printed_numbers_above_it(words, own, toy_folder, monkeypatch):
    monkeypatch.chdir(own)
    out = run_step(*words)
    rows, near = out.rows, lambda values: pytest.approx(list(values), abs=ROUNDED)
    assert list(rows) == ["log π", "log π_ref", "KL", "r", "R", "b", "A", "log π after", "change"]
    assert rows["KL"] == near(p - q for p, q in zip(rows["log π"], rows["log π_ref"], strict=True))
    assert rows["R"] == near(r - 0.05 * kl for r, kl in zip(rows["r"], rows["KL"], strict=True))
    assert rows["b"] == near(mean(rows["R"][:k] + rows["R"][k + 1 :]) for k in range(4))
    assert rows["A"] == near(R - b for R, b in zip(rows["R"], rows["b"], strict=True))
    assert sum(rows["A"]) == pytest.approx(0, abs=ROUNDED) and "in sum 0.000" in out.text
    assert rows["change"] == near(after - p for after, p in zip(rows["log π after"], rows["log π"], strict=True))

    pairs = list(zip(rows["A"], rows["change"], strict=True))
    assert float(out.notes["climb"].split()[0]) == pytest.approx(mean(a * d for a, d in pairs), rel=0.02, abs=ROUNDED)
    rose, better, fell, worse = map(int, re.findall(r"\d+", out.notes["A > 0"] + out.notes["A < 0"]))
    assert (better, worse) == (sum(a > 0 for a, _ in pairs), sum(a < 0 for a, _ in pairs))
    assert (rose, fell) == (sum(a > 0 and d > 0 for a, d in pairs), sum(a < 0 and d < 0 for a, d in pairs))


def test_kl_is_zero_in_the_first_step_and_only_there(toy_folder):
    first, second = run_step("--steps", 1), run_step()
    assert first.rows["KL"] == [0.0] * 4 and "-0.000" not in first.text and "KL is 0" in first.text
    assert any(second.rows["KL"]) and "in step 1 π was π_ref" in second.text


def test_constants_are_the_defaults_of_train_py():
    theirs = TrainConfig()
    assert (theirs.num_rollouts_per_prompt, theirs.initial_policy_kl_penalty) == (step.K, step.BETA)
    assert (theirs.adam_betas, theirs.max_grad_norm) == (step.BETAS, step.MAX_GRAD_NORM)
    assert (theirs.baseline, theirs.weight_decay, theirs.temperature, theirs.loss_norm) == ("rloo", 0.0, 1.0, "sequence")


def test_each_seed_and_each_step_draws_responses_of_its_own_and_again_the_same(toy_folder):
    """The learning rate is too small to change a draw."""
    still = ("--lr", 1e-9)
    drawn = [run_step(*still, "--steps", n, "--seed", seed).responses for n, seed in ((1, 0), (2, 0), (1, 1))]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]
    assert run_step(*still, "--steps", 1).responses == drawn[0]


def log_probabilities(model, prompt, responses):
    """log π of each response, one at a time and without padding."""
    totals = []
    for response in responses:
        logp = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        totals.append(logp[range(len(response)), response].sum())
    return torch.stack(totals)


def test_numbers_of_two_steps_are_those_of_transformers_and_torch_alone(toy_folder):
    """Rewards, KL, gradient, clipping and AdamW are recomputed from the printed responses."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "policy")
    prompt = tokenizer(json.loads((toy_folder / "train.jsonl").read_text().splitlines()[0])["prompt"])["input_ids"]
    reward_model = AutoModelForSequenceClassification.from_pretrained(toy_folder / "reward_model").eval()
    policy, reference = (AutoModelForCausalLM.from_pretrained(toy_folder / "policy").eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=7e-4, betas=(0.9, 0.95), weight_decay=0.0)
    first, second = run_step("--steps", 1), run_step("--steps", 2)
    assert first.responses != second.responses

    for out in (first, second):
        near = lambda values: pytest.approx(values.tolist(), abs=ROUNDED)  # noqa: E731
        responses = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in out.responses]
        assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in responses)
        with torch.no_grad():
            scores = torch.cat([reward_model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0] for ids in responses])
            ref_logp = log_probabilities(reference, prompt, responses)
        logp = log_probabilities(policy, prompt, responses)
        assert (out.rows["log π"], out.rows["log π_ref"]) == (near(logp), near(ref_logp))
        reward = (scores - reward_model.config.reward_mean) / reward_model.config.reward_std
        assert out.rows["r"] == near(reward)

        R = reward - 0.05 * (logp.detach() - ref_logp)
        optimizer.zero_grad()
        (-((R - (R.sum() - R) / 3) * logp).sum() / 4).backward()
        length = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
        assert float(out.notes["gradient"].split()[0]) == pytest.approx(length, rel=1e-3)
        for p in policy.parameters():
            p.grad /= max(1.0, length)
        optimizer.step()
        assert out.rows["log π after"] == near(log_probabilities(policy, prompt, responses))


def test_a_small_first_step_climbs_as_far_as_its_gradient_says(toy_folder):
    """A tenth of the step climbs a tenth as far, up to curvature and rounding, and not down."""
    far, near = (float(run_step("--steps", 1, "--lr", lr).notes["climb"].split()[0]) for lr in (4e-4, 4e-5))
    assert 0 < near < far == pytest.approx(10 * near, rel=0.15)


def test_a_reward_function_hears_prompts_completions_and_labels(own, toy_folder):
    (own / "data.jsonl").write_text(json.dumps({"prompt": "anna on the pizza in rome :", "label": {"is": 1}}) + "\n")
    out = run_step("--train-data", own / "data.jsonl", "--reward-fn", f"{own}/rewards.py:length")
    heard = json.loads((own / "heard.json").read_text())
    assert heard["prompts"] == ["anna on the pizza in rome :"] * 4 and heard["labels"] == [{"is": 1}] * 4
    assert out.rows["r"] == [len(text) for text in heard["completions"]]
    assert [text.removesuffix("</s>").split() for text in out.responses] == [text.split() for text in heard["completions"]]
    assert "by length" in out.text


def test_a_chat_policy_whose_pad_is_its_end_token_makes_the_same_step(own, toy_folder):
    """The toy's own first prompt, as the chat template renders it, has the same tokens: so all numbers are the same."""
    prompt = json.loads((toy_folder / "train.jsonl").read_text().splitlines()[0])["prompt"]
    AutoModelForCausalLM.from_pretrained(toy_folder / "policy").save_pretrained(own / "chat")
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "policy")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }}"
    tokenizer.save_pretrained(own / "chat")
    (own / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": prompt}]}) + "\n")
    reward = ("--reward-fn", f"{own}/rewards.py:length", "--lr", "7e-4")
    plain, chat = run_step(*reward), run_step("--policy", own / "chat", "--train-data", own / "chats.jsonl", *reward)
    assert chat.code == 0, chat.error
    assert chat.text.replace(f"<s> {prompt}", prompt) == plain.text
    assert all(text.count("</s>") == 1 for text in chat.responses)


@pytest.mark.parametrize(("words", "said"), [
    (("--reward-fn", "rewards.py:short"), "rewards.py:short returned 1 scores for 4 completions"),
    (("--reward-fn", "rewards.py:nan"), "nan gives .*must be finite"),
    (("--reward-fn", "rewards.py:broken"), "rewards.py line .*KeyError: 'label'"),
    (("--reward-fn", "rewards.py:same"), "rewards.py:same"),
    (("--reward-fn", "rewards.py:none"), "no function 'none'"),
    (("--reward-fn", "rewards.py"), "which name in it"),
    (("--train-data", "nowhere.jsonl"), "--train-data nowhere.jsonl: no such file"),
    (("--train-data", "bad.jsonl"), "bad.jsonl line 1: not JSON"),
    (("--train-data", "chats.jsonl"), "--policy's tokenizer has no chat template"),
    (("--policy", "anything"), "--policy needs --train-data and --reward-fn"),
    (("--policy", ".", "--train-data", "good.jsonl", "--reward-fn", "rewards.py:length"), "--policy .: no config.json"),
    (("--max-new-tokens", "121"), "8 tokens of the first prompt and --max-new-tokens 121 exceed the 128 positions"),
    (("--steps", "0"), "--steps is 0; it must be positive"),
    (("--lr", "inf"), "--lr is inf; it must be positive and finite"),
    (("--step", "1"), "unrecognized arguments"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(words, said, own, toy_folder, monkeypatch):
    monkeypatch.chdir(own)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (own / "bad.jsonl").write_text('no json\n{"prompt": "anna on the pizza in rome :"}\n')
    (own / "good.jsonl").write_text('{"prompt": "anna on the pizza in rome :"}\n')
    (own / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "anna"}]}\n')
    out = run_step(*words)
    assert (out.code, out.text) == (2, "")
    *bars, sentence = out.error.splitlines()  # a process of its own shows no progress bars
    assert re.fullmatch(f"recipes/step.py: .*{said}.*", sentence), out.error
    assert all("Loading weights" in line or not line for line in bars)


def test_bad_lines_are_left_out_where_that_is_asked_for(own, toy_folder):
    (own / "bad.jsonl").write_text('no json\n{"prompt": "anna on the pizza in rome :"}\n')
    out = run_step("--train-data", own / "bad.jsonl", "--skip-bad-lines", "--steps", 1)
    assert out.code == 0 and "left out 1 malformed lines" in out.text and "anna on the pizza" in out.text


def on_terminal(monkeypatch, no_color):
    """What the recipe, in this process, writes to a terminal; a thread reads, since a terminal holds few bytes."""
    monkeypatch.delenv("NO_COLOR", raising=False) if no_color is None else monkeypatch.setenv("NO_COLOR", no_color)
    master, slave = pty.openpty()
    blocks = []

    def read():
        with contextlib.suppress(OSError):  # Linux's end of file
            while block := os.read(master, 65536):
                blocks.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, contextlib.redirect_stdout(terminal), mock.patch.object(sys, "argv", ["x"]):
        assert exits.run(step.main) == 0
    reader.join(60)
    os.close(master)
    return b"".join(blocks).decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_and_a_pipe_or_no_color_does_not(toy_folder, monkeypatch):
    coloured, plain = on_terminal(monkeypatch, None), on_terminal(monkeypatch, "1")
    assert on_terminal(monkeypatch, "") == coloured, "by the convention, an empty NO_COLOR is none"
    piped = subprocess.run([sys.executable, "recipes/step.py"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert plain == piped.stdout and "\x1b" not in plain
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    legend = re.search(r"^    likelier or less likely after the step; .* changed by (\d+\.\d+) at most\n", bare, re.MULTILINE)
    assert bare.replace(legend[0], "") == plain

    token, change = re.search(r"'(.*)' in y\d, by (-?\d+\.\d+)", plain).groups()
    assert abs(float(change)) == float(legend[1])
    assert f"\x1b[30;48;5;{75 if float(change) > 0 else 208}m {token}\x1b[0m" in coloured, "the deepest shade"


def test_the_depth_of_a_shade_is_a_tokens_share_of_the_largest_change(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    shown = step_screen.responses([["a", " b", " c"], [" d"]], torch.tensor([[0.9, -0.3, 0.1], [-0.6, 0.0, 0.0]]))
    assert shown.splitlines()[:2] == ["y1  \x1b[30;48;5;75ma\x1b[0m\x1b[30;48;5;223m b\x1b[0m c", "y2  \x1b[30;48;5;216md\x1b[0m"]
    assert "changed by 0.900 at most" in shown


def test_lines_of_the_toy_have_80_columns_at_most(toy_folder):
    for words in ((), ("--seed", 3), ("--seed", 4)):
        assert max(map(len, run_step(*words).text.splitlines())) <= 80


def test_long_responses_are_broken_between_tokens_and_no_word_is_lost(capsys):
    words = [f" word{i}" for i in range(40)]
    shown = step_screen.responses([words], torch.zeros(1, 40)).splitlines()
    assert len(shown) > 3 and max(map(len, shown)) <= 80
    assert " ".join(shown).replace("y1", "").split() == "".join(words).split()


def test_pieces_of_a_byte_tokenizer_are_the_whole_text_and_carry_no_control_codes():
    """An emoji is four tokens, none of which is text alone; escape codes and line breaks are written out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    prompt, text = tokenizer("ab")["input_ids"], "c🙂\nd\x1b[31mé"
    ids = tokenizer(text)["input_ids"]
    pieces = step_screen.pieces(tokenizer, prompt, ids)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == "c🙂\\nd\\x1b[31mé"
    assert "".join(step_screen.pieces(tokenizer, prompt, ids[:-1])) == "c🙂\\nd\\x1b[31m\N{REPLACEMENT CHARACTER}"


def form(text):
    """What is the same on every machine: all but numbers, responses and the token that moved most."""
    text = re.sub(r"^(y\d)  .*(?:\n {4}\S.*)*", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"most: .* in y\d", "most: TOKEN", text)
    return re.sub(r" +", " ", re.sub(r"-?\b\d+(\.\d+)?\b", "#", text))


def test_the_documents_block_has_the_form_of_a_run(toy_folder):
    page = (ROOT / "docs/step.md").read_text()
    command, block = re.search(r"```bash\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()
    assert command == "python recipes/step.py\n"
    assert form(block) == form(run_step().text)
    assert form(block).count("#") > 40 and form(block).count("\n") == block.count("\n")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert flags == {"--" + name.replace("_", "-") for name in step.Config.__dataclass_fields__}
