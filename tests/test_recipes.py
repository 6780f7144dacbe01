"""What comes before and after: SFT, reward-model training, evaluation, comparison, chat, and all of them by launch.sh hh."""

import contextlib
import dataclasses
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from conftest import ROOT, environment, metrics, tiny_llama, train_here
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recipes import chat, compare, evaluate, fit, hh, sft, toy, train_rm
from recipes.fit import Plan
from recipes.intervals import bootstrap, student, wilson
from recipes.pipelines.hh import pipeline as hh_pipeline
from reinforce.baselines import rloo
from reinforce.data.preferences import Preference, split_by_opening
from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.loss import reinforce_loss
from reinforce.policy import load_policy
from reinforce.rm_client import RewardClient
from reinforce.run import exits
from reinforce.run.config import TrainConfig
from reinforce.run.curves import draw_curves
from reinforce.run.loading import set_up
from reinforce.serving.reward_model import load_reward_model
from train import judge


def recipe(module, *words, stdin=""):
    """A recipe's main in this process: exit code and what it printed."""
    text = io.StringIO()
    with (contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), mock.patch.object(sys, "argv", ["x", *map(str, words)]),
          mock.patch.object(sys, "stdin", io.StringIO(stdin))):  # fmt: skip
        code = exits.run(module.main, name=module.__name__)
    return code, text.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """HH-like pairs in the toy's words: the chosen review is the better one."""
    rng, lines = random.Random(0), []
    while len(lines) < 240:
        thing = rng.choice(list(toy.PARTS))
        a, b = toy.make_review(rng, thing), toy.make_review(rng, thing)
        if toy.sentiment(a) <= toy.sentiment(b):
            continue
        prompt = f"\n\nHuman: {toy.make_prompt(rng)[0]} {len(lines)}\n\nAssistant: "
        lines.append(json.dumps({"chosen": prompt + a, "rejected": prompt + b}) + "\n")
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(lines))
    return path


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


def data_flags(small, port):
    return ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", port]


SIZES = ["--num-rollout-samples", "6", "--num-rollouts-per-prompt", "2", "--max-new-tokens", "8"]


def test_evaluation_compares_on_equal_draws_and_writes_a_page_that_stands_alone(small, server, tmp_path):
    run = tmp_path / "run"
    words = [*data_flags(small, server), *SIZES, "--val-data", small / "train.jsonl", "--log-dir", run, "--lr", "0.01"]
    assert train_here(*words).returncode == 0
    draw_curves(run)
    address = ["--run", run, "--rm-host", "127.0.0.1", "--rm-port", server]
    code, out = recipe(evaluate, *address, "--policy", small / "policy")
    assert code == 0, out
    same = json.loads((run / "evaluation.json").read_text())
    assert same["difference"] == {"mean": 0.0, "interval": [0.0, 0.0]} and same["win_rate"]["mean"] == 0.5
    assert abs(same["kl"]["mean"]) < 1e-4, "the same policy on the same draws"

    other = shutil.copytree(small / "policy", tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["crust"], ids["sauce"] = ids["sauce"], ids["crust"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    code, out = recipe(evaluate, *address, "--policy", other)
    assert code == 2 and "its tokenizer is not that of the initial policy" in out and "Traceback" not in out, out

    code, out = recipe(evaluate, *address)
    assert code == 0, out
    result = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    gaps = [row["trained_reward"] - row["initial_reward"] for row in rows]
    assert len(rows) == result["prompts"] == 18
    assert result["difference"]["mean"] == pytest.approx(sum(gaps) / 18) and result["difference"]["interval"] == list(
        bootstrap(gaps)
    )
    assert result["win_rate"]["mean"] == pytest.approx(sum(1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gaps) / 18)
    page = (run / "report.html").read_text()
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(?!data:)[^"'\s>]|https?://|@import|url\(""", page.replace("src = data.curves", "")
    ), "no resources"
    embedded = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert [s["trained"] for s in embedded["samples"]] == [row["trained"] for row in rows]
    assert embedded["curves"].startswith("data:image/png;base64,")


def test_a_run_is_evaluated_from_another_folder_and_not_against_another_policy(small, server, tmp_path, monkeypatch):
    shutil.copytree(small / "policy", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    words = [
        *data_flags(small, server),
        *SIZES,
        "--policy",
        "base",
        "--val-data",
        small / "train.jsonl",
        "--log-dir",
        "run",
        "--max-steps",
        "1",
    ]
    assert train_here(*words).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    address = ["--run", "../run", "--rm-host", "127.0.0.1", "--rm-port", server, "--max-prompts", "2"]
    assert recipe(evaluate, *address)[0] == 0
    tiny_llama(vocabulary=200).save_pretrained(tmp_path / "base")
    code, out = recipe(evaluate, *address)
    assert code == 2 and f"the policy that it began with, {tmp_path}/base, is not there or is another one now" in out, out
    assert recipe(evaluate, *address, "--initial-policy", small / "policy")[0] == 0


@pytest.mark.parametrize("reward_model", ["the toy's", "another"])
def test_a_run_on_the_toy_s_policy_is_judged_by_the_toy_s_reward_only_if_that_trained_it(
    small, server, tmp_path, monkeypatch, reward_model
):
    client = RewardClient("127.0.0.1", server)
    client.connect()
    given = parse(TrainConfig, "", [*map(str, data_flags(small, server)), "--val-data", "v.jsonl", "--max-new-tokens", "7"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(given)))
    (tmp_path / "identity.json").write_text(
        json.dumps({"reward_model": client.fingerprint if reward_model == "the toy's" else "another"})
    )
    monkeypatch.setattr(toy, "is_toy", lambda policy: policy == str(small / "policy"))
    monkeypatch.setattr(toy, "server", lambda: contextlib.nullcontext(("127.0.0.1", server)))
    config = evaluate.Config(run=str(tmp_path), policy="p")
    with ExitStack() as stack:
        if reward_model == "the toy's":
            assert evaluate.settings_of(config, stack)[0].rm_port == server
        else:
            with pytest.raises(ConfigError, match="--rm-host and --rm-port are missing"):
                evaluate.settings_of(config, stack)


def test_a_win_on_every_prompt_is_no_certainty():
    """A bootstrap of equal values has no width; Wilson's interval has, and ties are half a win."""
    lost, won, other = (evaluate.Group(0, "p", [said], [reward], None, [reward], [True], [3], [True], [0.0])
                        for said, reward in (("a", 0.0), ("b", 1.0), ("c", 0.0)))  # fmt: skip
    assert evaluate.compare([lost] * 16, [won] * 16)["win_rate"]["interval"] == pytest.approx((0.806, 1.0), abs=1e-3)
    assert evaluate.compare([lost] * 16, [other] * 16)["win_rate"]["mean"] == 0.5


def test_the_same_reply_twice_is_a_tie_whatever_the_rounding_of_its_rewards():
    first, again, cut = (evaluate.Group(0, "p", ["r"], [r], None, [r], [True], [3], [f], [0.0])
                         for r, f in ((1.0, True), (1.0 + 1e-7, True), (1.5, False)))  # fmt: skip
    assert evaluate.compare([first], [again])["win_rate"]["mean"] == 0.5
    assert evaluate.compare([first], [cut])["win_rate"]["mean"] == 1.0


@pytest.mark.parametrize(("module", "flags", "said"), [
    (chat, ["--policy", "x", "--top-p", "2"], "--top-p is 2.0; it must be at most 1"),
    (compare, ["--noise-prompts", "1"], "--noise-prompts must be 2 or more"),
    (train_rm, ["--model", "x", "--pairs", "y", "--out", "z", "--margin", "nan"], "--margin is nan"),
    (train_rm, ["--model", "x", "--pairs", "y", "--out", "z", "--margin", "inf"], "--margin is inf"),
])  # fmt: skip
def test_values_that_could_only_train_or_measure_nonsense_are_refused(module, flags, said):
    code, out = recipe(module, *flags)
    assert code == 2 and said in out and "Traceback" not in out


def test_a_page_cannot_be_broken_by_what_a_policy_says(tmp_path):
    group = evaluate.Group(
        0, "</script><b>", ["</script><script>alert(1)</script>"], [1.0], None, [1.0], [True], [3], [True], [0.0]
    )
    evaluate.write_report(tmp_path, "t", evaluate.compare([group], [group]), [group], [group])
    page = (tmp_path / "report.html").read_text()
    assert page.count("</script>") == 2 and "alert(1)\\u003c/script>" in page


def test_gradient_noise_equals_a_loop_over_prompts(small, server):
    config = parse(TrainConfig, "", [str(w) for w in [*data_flags(small, server), *SIZES]])
    actor, data = set_up(config)
    prompts = data.prompts[:5]
    got = compare.gradient_noise(actor, prompts, ["rloo", "none"])
    out = actor.sample(prompts, compare.NOISE_STEP)
    objective = judge(actor, prompts, out).objective.view(5, 2)
    for name, advantage in (("rloo", rloo(objective)), ("none", objective)):
        rows = []
        for p in range(5):
            part = out.take([2 * p, 2 * p + 1])
            logp = actor.scorer(part.prompt, part.prompt_mask, part.response, part.mask)
            loss = reinforce_loss(logp, advantage[p].float(), part.mask, 2)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.model.parameters()))]).double())
        g = torch.stack(rows)
        trace, mean = g.var(0).sum(), g.mean(0).square().sum()
        signal = (mean - trace / 5).item()
        assert got[name] == (pytest.approx((trace / 6).item() / signal, rel=1e-3) if signal > 0 else None)


@pytest.mark.slow
def test_compare_reads_every_run_at_the_same_number_of_tokens(small, server, tmp_path):
    words = [
        "--baselines",
        "rloo",
        "remax",
        "--seeds",
        "2",
        "--max-steps",
        "3",
        "--noise-prompts",
        "3",
        "--jobs",
        "2",
        "--target",
        "-9",
    ]
    code, out = recipe(compare, *data_flags(small, server), *words, "--log-dir", tmp_path / "c", "--", *SIZES)
    assert code == 0, out
    facts = json.loads((tmp_path / "c/compare.json").read_text())
    totals = {}
    for run in sorted((tmp_path / "c").glob("*-*/metrics.jsonl")):
        groups = [json.loads(line) for line in (run.parent / "rollouts.jsonl").read_text().splitlines()]
        sampled = sum(sum(g["length"]) for g in groups)
        totals[run.parent.name] = sum(line["tokens"] for line in metrics(run.parent))
        assert (totals[run.parent.name] > sampled) == run.parent.name.startswith("remax"), "the greedy responses count"
    assert facts["budget"] == min(totals.values()) and {len(v) for v in facts["runs"].values()} == {2}
    assert (tmp_path / "c/compare.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "c/compare.md").read_text()
    assert table.splitlines()[2].startswith("| rloo |") and table in out


def test_a_run_is_read_up_to_the_budget_and_not_beyond():
    lines = [{"step": i + 1, "reward": float(i), "objective": float(i), "kl": None, "tokens_so_far": 10 * (i + 1), "seconds_so_far": i + 1.0}
             for i in range(20)]  # fmt: skip
    got = compare.at_budget(lines, 100, target=5.0)
    assert got["steps"] == 10 and got["reward"] == 9.0 and got["kl"] is None
    assert got["tokens"] == 80, "the first step whose last five rewards, 3 to 7, average 5"
    assert compare.at_budget(lines, 100, target=50.0)["tokens"] is None


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = torch.Generator().manual_seed(0)
    covered = {"wilson": 0, "student": 0, "bootstrap": 0}
    for _ in range(400):
        hits = int((torch.rand(60, generator=draw) < 0.6).sum())
        values = torch.randn(60, generator=draw).add(1).tolist()
        mean, half = student(values[:5])
        low, high = bootstrap(values, draws=1000)
        covered["wilson"] += wilson(hits, 60)[0] <= 0.6 <= wilson(hits, 60)[1]
        covered["student"] += abs(mean - 1) <= half
        covered["bootstrap"] += low <= 1 <= high
    assert all(0.91 <= n / 400 <= 0.985 for n in covered.values()), covered


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


@pytest.mark.parametrize(("words", "most"), [([], 96), (["--max-new-tokens", "128"], 128), (["--max-new-tokens=64"], 96)])
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


def test_a_seed_of_0_is_evaluations_own_and_an_absent_switch_is_not():
    config = evaluate.Config(seed=0, rm_wait=0.0)
    assert evaluate.given(config, "seed") and evaluate.given(config, "rm_wait")
    assert not evaluate.given(config, "skip_bad_lines") and not evaluate.given(config, "temperature")


def test_settings_of_a_run_survive_the_way_through_its_folder(small, server, tmp_path):
    config = evaluate.Config(run=str(tmp_path), test_data="t.jsonl", rm_host="h", rm_port=1, temperature=0.5, policy="p")
    given = parse(
        TrainConfig, "", [str(w) for w in [*data_flags(small, server), "--end-strings", "a", "b", "--max-new-tokens", "7"]]
    )
    (tmp_path / "config.json").write_text(json.dumps({**dataclasses.asdict(given), "torch": "2"}))
    with ExitStack() as stack:
        settings, run, policy = evaluate.settings_of(config, stack)
    assert (settings.end_strings, settings.max_new_tokens, settings.temperature) == (("a", "b"), 7, 0.5)
    assert (run, policy, settings.train_data, settings.rm_host) == (tmp_path, "p", "t.jsonl", "h")
