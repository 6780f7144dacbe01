"""What the flags of the recipes do, seen at what they hand to training, sampling and judging."""

import itertools
import json

import pytest
import torch
from conftest import SMALL_STEP, data_flags, recipe, train_here

from recipes import chat, evaluate, sft, toy, train_rm
from recipes.fit import Plan
from reinforce.policy import load_policy
from reinforce.sampler import row_seed


@pytest.fixture
def given(monkeypatch):
    """Arguments of functions that `watch(module, name, result)` replaces by name; without a result the real one still runs."""
    calls = {}

    def watch(module, name, *result):
        real = getattr(module, name)

        def watched(*args, **named):
            calls.setdefault(name, []).append((args, named))
            return result[0] if result else real(*args, **named)

        monkeypatch.setattr(module, name, watched)

    calls["watch"] = watch
    return calls


def test_sft_trains_on_the_first_examples_that_are_short_enough(small, tmp_path, given):
    given["watch"](sft, "train_sft", 1.5)
    answers = ["fresh", "fresh " * 30, "stale", "fine", "bland"]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"prompt": "pizza :", "completion": a}) + "\n" for a in answers))
    code, out = recipe(sft, "--model", small / "policy", "--data", tmp_path / "e.jsonl", "--out", tmp_path / "out", "--max-length", "20",
                       "--max-examples", "2", "--lr", "0.5", "--batch-size", "3", "--epochs", "2.5", "--seed", "7", "--micro-batch-tokens", "99")  # fmt: skip
    assert code == 0 and "4 examples; left out 1 longer than 20 tokens" in out, out
    ((_, examples, _, plan, _), _), = given["train_sft"]  # fmt: skip
    tokenizer = toy.make_tokenizer()
    assert [tokenizer.decode(answer[:-1]) for _, answer in examples] == ["fresh", "stale"]
    assert plan == Plan(0.5, 3, 2.5, 7, 99)


def pairs_file(path, thing, count):
    lines = [
        {"prompt": f"anna on the {thing} in rome :", "chosen": f"fresh {'and ' * i}", "rejected": "stale"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_train_rm_trains_on_the_first_pairs_and_is_measured_on_the_test_pairs_alone(small, tmp_path, given):
    given["watch"](train_rm, "train_reward_model", 0.5)
    given["watch"](train_rm, "pair_accuracy")
    words = ["--model", small / "policy", "--pairs", pairs_file(tmp_path / "a.jsonl", "pizza", 6), "--out", tmp_path / "out",
             "--test-pairs", pairs_file(tmp_path / "b.jsonl", "hotel", 4), "--max-pairs", "3", "--margin", "0.25",
             "--lr", "0.5", "--batch-size", "2", "--epochs", "2", "--seed", "9", "--micro-batch-tokens", "77"]  # fmt: skip
    code, out = recipe(train_rm, *words)
    assert code == 0, out
    ((_, train, _, plan, margin, _), _), = given["train_reward_model"]  # fmt: skip
    ((_, held_out, *_), _), = given["pair_accuracy"]  # fmt: skip
    tokenizer = toy.make_tokenizer()
    things = [[" ".join(tokenizer.decode(chosen).split()) for chosen, _ in part] for part in (train, held_out)]
    assert [len(part) for part in things] == [3, 4]
    assert all("pizza" in text for text in things[0]) and all("hotel" in text for text in things[1])
    assert (plan, margin) == (Plan(0.5, 2, 2.0, 9, 77), 0.25)


def test_evaluation_takes_the_first_prompts_and_greedy_replies_do_not_depend_on_the_seed(small, server_port, tmp_path, given):
    run = tmp_path / "run"
    flags = [*data_flags(small, server_port), *SMALL_STEP, "--val-data", small / "train.jsonl", "--lr", "0.01", "--max-steps", "2"]
    assert train_here(*flags, "--log-dir", run).returncode == 0
    prompts = [json.loads(line)["prompt"] for line in (small / "train.jsonl").open()]

    def rows(*words):
        code, out = recipe(evaluate, "--run", run, "--rm-host", "127.0.0.1", "--rm-port", server_port, *words)
        assert code == 0, out
        return [json.loads(line) for line in (run / "evaluation.jsonl").open()], json.loads((run / "evaluation.json").read_text())

    said = lambda found: [(row["initial"], row["trained"]) for row in found[0]]  # noqa: E731
    greedy = rows("--greedy", "--max-prompts", "4")
    assert [row["prompt"] for row in greedy[0]] == prompts[:4] and greedy[1]["prompts"] == 4 and greedy[1]["kl"] is None
    assert said(rows("--greedy", "--max-prompts", "4", "--seed", "5")) == said(greedy)
    drawn, again = rows("--max-prompts", "4", "--seed", "5"), rows("--max-prompts", "4", "--seed", "6")
    assert said(drawn) != said(again) and drawn[1]["kl"] is not None
    words = [row["trained"].split() for row in drawn[0]]
    ones = [word for text in words for word in text]
    twos = [two for text in words for two in itertools.pairwise(text)]
    for n, grams in (("distinct_1", ones), ("distinct_2", twos)):
        assert drawn[1]["trained"][n] == pytest.approx(len(set(grams)) / len(grams))


def test_chat_samples_as_it_is_told_and_forgets_the_oldest_turns(small, tmp_path, given):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = sft.with_template(tokenizer, "x").chat_template
    load_policy(str(small / "policy"), tokenizer, torch.device("cpu")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given["watch"](chat, "sample")
    lines = [" ".join([thing] * 21) for thing in list(toy.PARTS)[:4]]
    code, out = recipe(chat, "--policy", tmp_path, "--max-new-tokens", "40", "--temperature", "0.7", "--top-p", "0.5", "--seed", "3",
                       stdin="\n".join(lines) + "\n")  # fmt: skip
    assert code == 0 and out.count("policy: ") == 4, out
    for turn, ((_, (ids,), (seed,), sampling, _), _) in enumerate(given["sample"]):
        assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.greedy) == (40, 0.7, 0.5, False)
        assert seed == row_seed(3, turn, 0, 0) and len(ids) <= 128 - 40
    last = tokenizer.decode(given["sample"][-1][0][1][0])
    assert lines[3] in last and lines[0] not in last
    given["sample"].clear()
    assert recipe(chat, "--policy", tmp_path, "--max-new-tokens", "4", "--greedy", stdin="pizza\n")[0] == 0
    assert given["sample"][0][0][3].greedy
