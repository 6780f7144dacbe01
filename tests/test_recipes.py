"""What comes before and after: SFT, reward-model training, evaluation, comparison, chat, and all of them by launch.sh hh."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, environment, recipe, tiny_llama, train_here
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recipes import chat, compare, evaluate, fit, hh, sft, toy, train_rm
from recipes.fit import Plan
from recipes.intervals import wilson
from recipes.pipelines.hh import pipeline as hh_pipeline
from reinforce.data.preferences import Preference, split_by_opening
from reinforce.policy import load_policy
from reinforce.serving.reward_model import load_reward_model


@pytest.fixture
def server(server_port):
    return server_port


def random_examples(n=12):
    rng = random.Random(0)
    make = lambda low, high: [rng.randrange(3, 50) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [(make(1, 9), [*make(1, 7), 2]) for _ in range(n)]


def test_sft_loss_is_the_cross_entropy_of_the_answers_tokens_and_of_nothing_else():
    model, examples = tiny_llama(), random_examples()
    total = 0.0
    for prompt, answer in examples:
        labels = torch.tensor([[*[-100] * len(prompt), *answer]])
        total += model(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss.item() * len(answer)
    assert sft.mean_loss(model, examples, pad_id=0) == pytest.approx(total / sum(len(a) for _, a in examples), rel=1e-5)


def gradients(model, monkeypatch, train):
    """The gradient of the first optimizer step, before clipping."""
    kept = []
    clip = fit.clip
    monkeypatch.setattr(
        fit, "clip", lambda m, n: (kept.append(torch.cat([p.grad.flatten() for p in m.parameters()])), clip(m, n))[1]
    )
    train(model)
    return kept[0]


@pytest.mark.parametrize("what", ["sft", "reward model"])
def test_gradients_of_the_recipes_do_not_depend_on_the_micro_batch(what, small, monkeypatch):
    def train(model, tokens):
        plan = Plan(lr=1e-3, batch_size=12, micro_batch_tokens=tokens, quiet=True)
        if what == "sft":
            sft.train_sft(model, random_examples(), 0, plan)
        else:
            train_rm.train_reward_model(model, [(p, a) for p, a in random_examples()], 0, plan)

    def fresh():
        return (
            tiny_llama()
            if what == "sft"
            else load_reward_model(str(small / "reward_model"), torch.device("cpu"))[0].requires_grad_()
        )

    one, many = (gradients(fresh(), monkeypatch, lambda m, n=n: train(m, n)) for n in (10**6, 20))
    assert (one - many).norm() <= 1e-5 * one.norm()


def test_sft_of_chats_lowers_the_held_out_loss_and_gives_a_policy_that_train_py_takes(small, pairs, server, tmp_path):
    words = ["--model", small / "policy", "--data", pairs, "--val-data", pairs, "--out", tmp_path / "sft", "--lr", "5e-3"]
    code, out = recipe(sft, *words)
    assert code == 0, out
    before, after = map(float, re.search(r"--val-data: ([\d.]+) before, ([\d.]+) after", out).groups())
    assert after < before - 0.3
    assert "has no chat template; giving it HH-RLHF's" in out
    trained = train_here("--policy", tmp_path / "sft", "--train-data", pairs, "--rm-host", "127.0.0.1", "--rm-port", server, "--rm-format",
                         "query", "--max-steps", "1", "--max-new-tokens", "24", "--num-rollout-samples", "2", "--log-dir", tmp_path / "run")  # fmt: skip
    assert trained.returncode == 0, trained.stdout
    prompt = json.loads((tmp_path / "run/rollouts.jsonl").read_text().splitlines()[0])["prompt"]
    assert prompt.startswith("<s>\n\nHuman: ") and prompt.endswith("\n\nAssistant:")


def test_an_answer_ends_with_exactly_one_end_token_and_the_prompt_is_tokenized_as_it_will_be():
    tokenizer = toy.make_tokenizer()
    end = tokenizer.eos_token_id
    prompt, answer = sft.encode_example(tokenizer, [end], ("anna on the pizza in rome :", "the crust was fresh ."))
    assert answer.count(end) == 1 and answer[-1] == end and prompt == tokenizer("anna on the pizza in rome :")["input_ids"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} </s> on {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    chat = [{"role": "user", "content": "pizza"}, {"role": "assistant", "content": "fresh"}]
    prompt, answer = sft.encode_example(tokenizer, [end], chat)
    assert tokenizer.decode(answer) == "fresh </s>", "what the template puts after the end token is not learned"


def test_an_answer_ends_also_where_only_the_generation_config_has_an_end_token():
    tokenizer = toy.make_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = None
    prompt, answer = sft.encode_example(tokenizer, (end,), ("pizza :", " the crust"))
    assert answer[-1] == end and end not in prompt


def test_an_answer_has_the_tokens_that_follow_the_prompt_s_own():
    """LLaMA-2's kind of tokenizer gives every text alone a space in front: an answer of its own would begin with two."""
    pieces = ["<unk>", "</s>", "▁", "▁is", "▁it", ":", "▁yes", "yes", "[", "]"]
    made = Tokenizer(models.Unigram([(p, -1.0 if len(p) > 1 else -5.0) for p in pieces], 0))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    yes, end = tokenizer.convert_tokens_to_ids(["▁yes", "</s>"])
    assert tokenizer(" yes")["input_ids"] != [yes], "alone it gets another token"
    assert sft.encode_example(tokenizer, [end], ("is it:", " yes")) == (tokenizer("is it:")["input_ids"], [yes, end])
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    chat = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "yes"}]
    assert sft.encode_example(tokenizer, [end], chat)[1] == [yes, end]


def test_an_answer_behind_a_prompt_that_ends_in_a_space_says_what_the_example_says():
    pieces = ["<unk>", "</s>", "▁", "▁is", "▁it", ":", "▁yes", "yes"]
    made = Tokenizer(models.Unigram([(p, -1.0 if len(p) > 1 else -5.0) for p in pieces], 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    prompt, answer = sft.encode_example(tokenizer, [tokenizer.eos_token_id], ("is it: ", "yes"))
    assert tokenizer.convert_ids_to_tokens(answer) == ["yes", "</s>"] and tokenizer.decode([*prompt, *answer[:-1]]) == "is it: yes"


def test_malformed_examples_that_are_left_out_are_counted(small, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "anna", "completion": "the crust"}\n{"prompt": 3}\nnothing\n')
    words = ["--model", small / "policy", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "o", "--skip-bad-lines"]
    code, out = recipe(sft, *words)
    assert code == 0 and "--data: left out 2 malformed lines (--skip-bad-lines)" in out, out


def test_openings_that_recipes_hh_has_held_out_leave_some_for_the_reward_model_to_hold_out():
    pairs = [Preference([{"role": "user", "content": str(i)}], "a", "b") for i in range(600)]
    train = split_by_opening(pairs, hh.HELD_OUT)[0]
    held_out = split_by_opening(train, 0.2, train_rm.SPLIT)[1]
    assert 0.15 < len(held_out) / len(train) < 0.25


def test_reward_model_training_reports_held_out_accuracy_and_stores_its_scale(small, pairs, tmp_path):
    code, out = recipe(train_rm, "--model", small / "policy", "--pairs", pairs, "--out", tmp_path / "rm", "--lr", "5e-3", "--epochs", "8",
                       "--batch-size", "32")  # fmt: skip
    assert code == 0, out
    accuracy, low, high, count = re.search(r"accuracy ([\d.]+) \(95 % interval ([\d.]+) to ([\d.]+)\) on (\d+) pairs", out).groups()
    assert float(low) <= float(accuracy) <= float(high) and float(low) > 0.5
    assert (float(low), float(high)) == pytest.approx(wilson(float(accuracy) * int(count), int(count)), abs=2e-3)
    model, tokenizer = load_reward_model(str(tmp_path / "rm"), torch.device("cpu"))
    train, held_out = (train_rm.encode_pairs(tokenizer, side, 512)
                       for side in train_rm.split_by_opening(train_rm.read_pairs(str(pairs), "--pairs")[0], 0.2, train_rm.SPLIT))  # fmt: skip
    assert train_rm.pair_accuracy(model, held_out, tokenizer.pad_token_id) == pytest.approx(float(accuracy), abs=1e-3)
    rewards = train_rm.scores(model, [s for pair in train[:256] for s in pair], tokenizer.pad_token_id)
    assert (rewards.mean().item(), rewards.std().item()) == pytest.approx(
        (model.config.reward_mean, model.config.reward_std), rel=1e-4
    )


def test_pairs_that_are_too_long_are_counted_and_scores_without_a_deviation_refused(small, pairs, tmp_path):
    flags = ["--model", small / "policy", "--pairs", pairs, "--device", "cpu"]
    code, out = recipe(train_rm, *flags, "--out", tmp_path / "short", "--max-length", "26", "--epochs", "0.1")
    kept, held, left = map(
        int, re.search(r"(\d+) to train on, (\d+) held out; left out (\d+) of more than 26 tokens", out).groups()
    )
    assert code == 0 and kept + held + left == 240 and left > 0
    code, out = recipe(train_rm, *flags, "--out", tmp_path / "huge", "--lr", "1e30", "--epochs", "0.1")
    assert code == 1 and "Traceback" not in out and not (tmp_path / "huge/config.json").exists()


def test_a_margin_asks_for_a_larger_gap(small, monkeypatch):
    """One pair: the gradient is that of -log sigmoid(gap - margin), so its length grows with the margin as 1 - sigmoid does."""
    pair, norms, gap, plan = [([5, 6, 2], [5, 7, 2])], {}, 0.0, Plan(lr=1e-3, batch_size=1, quiet=True)
    for margin in (0.0, 2.0):
        model = load_reward_model(str(small / "reward_model"), torch.device("cpu"))[0].requires_grad_()
        gap = (train_rm.scores(model, pair[0], 0)[0] - train_rm.scores(model, pair[0], 0)[1]).item()
        norms[margin] = (
            gradients(model, monkeypatch, lambda m, x=margin: train_rm.train_reward_model(m, pair, 0, plan, x)).norm().item()
        )
    slope = lambda margin: 1 / (1 + math.exp(gap - margin))  # noqa: E731
    assert norms[2.0] / norms[0.0] == pytest.approx(slope(2.0) / slope(0.0), rel=1e-3)


@pytest.mark.parametrize(("module", "words", "reason"), [
    (sft, ["--model", "m", "--data", "d"], "--out is missing"),
    (sft, ["--model", "m", "--data", "none.jsonl", "--out", "o"], "--data none.jsonl: no such file"),
    (sft, ["--model", "m", "--data", "d", "--out", "o", "--lr", "0"], "--lr is 0.0; it must be positive"),
    (train_rm, ["--model", "m", "--pairs", "none.jsonl", "--out", "o"], "--pairs none.jsonl: no such file"),
    (train_rm, ["--model", "m", "--pairs", "p", "--out", "o", "--held-out", "1"], "--held-out is 1.0"),
    (evaluate, ["--run", "nowhere"], "--run nowhere is no run folder of train.py"),
    (compare, ["--policy", "p"], "come as a set"), (compare, ["--seeds", "1"], "--seeds must be 2 or more"),
    (compare, ["--", "--num-rollouts-per-prompt", "1"], "--baseline rloo compares"),
    (compare, ["--", "--seed", "3"], "--seed after --"), (compare, ["--", "--loss-norm", "token"], "--loss-norm token: add --noise-prompts 0"),
    (compare, ["--", "--lora-rank", "4"], "--lora-rank: add --noise-prompts 0"), (compare, ["--", "--parallel", "fsdp"], "add --noise-prompts 0"),
    (sft, ["--model", "m", "--data", "d", "--out", "o", "--max-examples", "0"], "--max-examples is 0"), (chat, [], "--policy is missing"),
])  # fmt: skip
def test_a_recipe_refuses_bad_flags_in_one_sentence(module, words, reason):
    code, out = recipe(module, *words)
    assert code == 2 and reason in out and "Traceback" not in out and out.count("\n") <= 2


@pytest.mark.parametrize(("module", "flags", "said"), [
    (chat, ["--policy", "x", "--top-p", "2"], "--top-p is 2.0; it must be at most 1"),
    (compare, ["--noise-prompts", "1"], "--noise-prompts must be 2 or more"),
    (train_rm, ["--model", "x", "--pairs", "y", "--out", "z", "--margin", "nan"], "--margin is nan"),
    (train_rm, ["--model", "x", "--pairs", "y", "--out", "z", "--margin", "inf"], "--margin is inf"),
])  # fmt: skip
def test_values_that_could_only_train_or_measure_nonsense_are_refused(module, flags, said):
    code, out = recipe(module, *flags)
    assert code == 2 and said in out and "Traceback" not in out


def test_chat_replies_to_each_line_and_remembers_the_conversation(small, tmp_path, monkeypatch):
    seen = []
    real = chat.tokenize
    monkeypatch.setattr(
        chat, "tokenize", lambda records, *rest: (seen.append(json.loads(json.dumps(records))), real(records, *rest))[1]
    )
    code, out = recipe(chat, "--policy", small / "policy", "--max-new-tokens", "5", stdin="pizza\n\nhotel\n")
    assert code == 0 and out.count("policy: ") == 2 and [r[0] for r in seen] == [{"prompt": "pizza"}, {"prompt": "hotel"}]
    assert recipe(chat, "--policy", small / "policy", stdin="pizza\n")[0] == 0, "without --max-new-tokens, in a context of 128"
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = sft.with_template(tokenizer, "x").chat_template
    seen.clear()
    load_policy(str(small / "policy"), tokenizer, torch.device("cpu")).save_pretrained(tmp_path / "p")
    tokenizer.save_pretrained(tmp_path / "p")
    seen.clear()
    assert recipe(chat, "--policy", tmp_path / "p", "--max-new-tokens", "5", stdin="pizza\nhotel\n")[0] == 0
    assert [m["role"] for m in seen[1][0]["messages"]] == ["user", "assistant", "user"]


def test_chat_and_sft_refuse_a_token_that_the_model_has_no_embedding_for(tmp_path):
    policy, examples = tmp_path / "policy", tmp_path / "e.jsonl"
    tokenizer = toy.make_tokenizer()
    LlamaForCausalLM(toy.make_config(tokenizer)).save_pretrained(policy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(policy)
    examples.write_text(json.dumps({"prompt": "anna on <image>", "completion": "pizza"}) + "\n")
    for module, flags, stdin in (
        (chat, ["--policy", policy], "anna on <image>\n"),
        (sft, ["--model", policy, "--data", examples, "--out", tmp_path / "out"], ""),
    ):
        code, out = recipe(module, *flags, stdin=stdin)
        assert code == 2 and "a text holds the token" in out, out


@pytest.mark.parametrize(
    ("words", "most"),
    [
        ([], 96),
        (["--max-new-tokens", "128"], 128),
        (["--max-new-tokens=64"], 96),
        (["--max-new-tokens", "32", "--lr", "1", "--max-new-tokens=200"], 200),
    ],
)
def test_launch_hh_evaluates_with_at_least_the_tokens_it_trained_with(tmp_path, words, most):
    job = mock.MagicMock(address=("h", "1"))
    job.output.return_value = str(tmp_path)
    hh_pipeline(job, ["pairs.jsonl", "--base", str(tmp_path), *words])
    flags = list(job.run.call_args.args)
    assert flags[0] == "recipes/evaluate.py" and flags[flags.index("--max-new-tokens") + 1] == most


@pytest.mark.slow
def test_launch_hh_runs_from_pairs_to_report_with_any_base(small, pairs, tmp_path):
    folder = tmp_path / "clone"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    command = ["bash", "launch.sh", "hh", str(pairs), "--size", "quick", "--base", str(small / "policy"), "--max-steps", "2"]
    done = subprocess.run(command, cwd=folder, env=environment(VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:/usr/bin:/bin"), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout
    for stage in ("== sft", "== reward_model", "held-out accuracy", "== reinforce", "== evaluate", "win rate", "report runs/hh-"):
        assert stage in done.stdout
    assert (folder / "runs/latest/report.html").exists()
