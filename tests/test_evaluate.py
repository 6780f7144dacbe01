"""The evaluation of a run: on equal draws, with intervals that cover, on a page that stands alone."""

import contextlib
import dataclasses
import json
import re
import shutil
from contextlib import ExitStack

import pytest
from conftest import SMALL_STEP, data_flags, recipe, tiny_llama, train_here

from recipes import evaluate, toy
from recipes.intervals import mean_interval
from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.rm_client import RewardClient
from reinforce.run.config import TrainConfig
from reinforce.run.curves import draw_curves


@pytest.fixture
def server(server_port):
    return server_port


def test_evaluation_compares_on_equal_draws_and_writes_a_page_that_stands_alone(small, server, tmp_path):
    run = tmp_path / "run"
    words = [*data_flags(small, server), *SMALL_STEP, "--val-data", small / "train.jsonl", "--log-dir", run, "--lr", "0.01"]
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
        mean_interval(gaps)
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
        *SMALL_STEP,
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
    assert evaluate.compare([first], [again])["difference"]["interval"] is None, "one prompt has no interval"
    assert evaluate.compare([first], [cut])["win_rate"]["mean"] == 1.0


def test_a_page_cannot_be_broken_by_what_a_policy_says(tmp_path):
    group = evaluate.Group(
        0, "</script><b>", ["</script><script>alert(1)</script>"], [1.0], None, [1.0], [True], [3], [True], [0.0]
    )
    evaluate.write_report(tmp_path, "t", evaluate.compare([group], [group]), [group], [group])
    page = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "evaluation.jsonl").read_text())["win"] == 0.5
    assert page.count("</script>") == 2 and "alert(1)\\u003c/script>" in page


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
