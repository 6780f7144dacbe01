"""A response that the reward server refuses: named, kept, or left out within limits; and wrong answers lose no finished step."""

import json

import pytest
import torch
from conftest import metrics, train_here
from test_client import INFO, BadServer, reply

from reinforce.refused import Refusals, RefusedRowError, rewards_but_refused
from reinforce.rm_client import RefusedError, RewardClient
from reinforce.rm_connection import RewardError


def refusing(status=422, indexed=True, word="pizza", after=0):
    """The answer of a server whose reward is a text's length, and that refuses responses (not prompts) with a word in them."""
    seen = []

    def answer(request, connection):
        seen.append(request)
        texts = request["completions"] if "completions" in request else request["query"]
        bad = [i for i, text in enumerate(texts) if word in text]
        if bad and len(seen) > after:
            return reply({"error": "bad_text", "index": bad[0] if indexed else None}, status)
        return reply({"rewards": [float(len(t)) for t in texts], "id": request["id"], "fingerprint": INFO["fingerprint"]})

    return answer


@pytest.fixture
def start(server):
    return lambda *args, **how: server(refusing(*args, **how), info={**INFO, "max_texts": 5})


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("status", [400, 413, 422, 500, 507])
def test_a_refused_text_is_found_by_the_index_or_by_asking_one_at_a_time(start, status, indexed):
    client = RewardClient("127.0.0.1", start(status, indexed).port)
    request = {"query": ["a", "bb", "a pizza", "cccc", "d", "eeeeee", "pizza"], "prompts": [""] * 7}
    rewards, answers = rewards_but_refused(client, request, most=2)
    assert rewards == [1.0, 2.0, None, 4.0, 1.0, 6.0, None] and answers.keys() == {2, 6} and f"HTTP {status}" in answers[6]
    with pytest.raises(RefusedError) as refused:
        rewards_but_refused(client, request, most=1)
    assert refused.value.index == 6


def test_a_request_that_is_refused_whole_though_each_text_is_taken_leaves_nothing_out():
    server = BadServer(
        lambda r, _: (
            reply({}, 422) if len(r["query"]) > 1 else reply({"rewards": [1.0], "id": r["id"], "fingerprint": INFO["fingerprint"]})
        )
    )
    with pytest.raises(RefusedError):
        rewards_but_refused(RewardClient("127.0.0.1", server.port), {"query": ["a", "b"]}, most=2)
    server.close()


def test_other_errors_are_no_refusals():
    for status in (401, 404, 415):
        server = BadServer(reply({}, status))
        with pytest.raises(RewardError) as raised:
            RewardClient("127.0.0.1", server.port).rewards(query=["a"])
        assert not isinstance(raised.value, RefusedError)
        server.close()


def test_the_limit_is_the_whole_runs():
    refusals, row = Refusals(3), {"index": 4, "prompt": "p", "response": "r", "answer": "no", "kind": "response"}
    refusals.take([row] * 2)
    assert refusals.left == 1
    with pytest.raises(RefusedRowError, match="prompt 10, 'p', response 'r': no"):
        refusals.take([row, {**row, "index": 9}])
    assert refusals.total == 2, "what was not left out is not counted"


def run_flags(small, port, *more):
    return ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", port,
            "--num-rollout-samples", "6", "--num-rollouts-per-prompt", "2", "--max-new-tokens", "12", "--lr", "1e-3", "--save-interval", "9",
            "--max-epochs", "9", *more]  # fmt: skip


def test_by_default_it_ends_the_run_which_names_step_prompt_and_response_and_keeps_the_finished_steps(small, start, tmp_path):
    flags = run_flags(small, start(after=8).port, "--max-steps", "30", "--log-dir", tmp_path / "run")
    out = train_here(*flags)
    last = out.stdout.strip().splitlines()[-1]
    (row,) = [json.loads(line) for line in (tmp_path / "run/refused.jsonl").read_text().splitlines()]
    done = len(metrics(tmp_path / "run"))
    assert out.returncode == 1 and done >= 2 and row["step"] == done + 1 and "pizza" in row["response"], out.stdout
    assert last.startswith(f"train.py: step {done + 1}: prompt ") and "--skip-refused N" in last and "refused.jsonl" in last
    assert (tmp_path / f"run/checkpoints/step-{done:06d}/model.safetensors").exists(), "what was finished is saved"
    again = train_here(*flags)
    assert again.returncode == 1 and f"step {done + 1}: " in again.stdout, "the resume draws it again"
    allowed = train_here(*flags[:-4], "--max-steps", done + 2, "--log-dir", tmp_path / "run", "--skip-refused", "99")
    assert allowed.returncode == 0, allowed.stdout
    assert metrics(tmp_path / "run")[-1]["refused"] >= 1


def test_refused_rows_are_left_out_as_dropped_ones_are_and_are_counted_over_all_parts_of_a_run(small, start, tmp_path):
    flags = run_flags(small, start(500, indexed=False).port, "--skip-refused", "99", "--save-interval", "1")
    for steps in (2, 4):
        out = train_here(*flags, "--max-steps", steps, "--log-dir", tmp_path / "run")
        assert out.returncode == 0, out.stdout
    assert train_here(*flags, "--max-steps", 4, "--log-dir", tmp_path / "whole").returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    refused = 0
    for row in rows:
        for text, reward, objective, valid, advantage in zip(
            row["response"], row["reward"], row["objective"], row["valid"], row["advantage"], strict=True
        ):
            assert ("pizza" in text) == (reward is None) == (objective is None) == (not valid)
            assert advantage == 0.0 or reward is not None
            refused += reward is None
    lines = metrics(tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert lines[-1]["refused"] == state["refused"] == refused >= 3
    told = [json.loads(line) for line in (tmp_path / "run/refused.jsonl").read_text().splitlines()]
    assert len(told) == refused and all("pizza" in row["response"] and "HTTP 500" in row["answer"] for row in told)
    kept = [r for row in rows if row["step"] == 4 for r in row["reward"] if r is not None]
    assert lines[-1]["reward"] == pytest.approx(sum(kept) / len(kept))
    fields = ("reward", "grad_norm", "refused", "loss")
    assert [[line[f] for f in fields] for line in lines] == [[line[f] for f in fields] for line in metrics(tmp_path / "whole")]


def test_validation_and_greedy_responses_are_never_left_out(small, start, tmp_path):
    flags = run_flags(small, start().port, "--skip-refused", "99", "--val-data", small / "train.jsonl", "--log-dir", tmp_path / "a")
    out = train_here(*flags, "--max-steps", 2)
    last = out.stdout.strip().splitlines()[-1]
    assert out.returncode == 1 and "the validation after step 0: prompt" in last and not metrics(tmp_path / "a")
    assert "validation response '" in last and "cannot be left out" in last and "--skip-refused" not in last

    def refuse_greedy(request, connection):
        texts = request["completions"]
        good = {"rewards": [float(len(t)) for t in texts], "id": request["id"], "fingerprint": INFO["fingerprint"]}
        return reply({"index": 3}, 422) if len(texts) == 6 else reply(good)  # one a prompt

    server = BadServer(refuse_greedy, info={**INFO, "max_texts": 99})
    out = train_here(*run_flags(small, server.port, "--skip-refused", "99", "--baseline", "remax", "--log-dir", tmp_path / "b"))
    server.close()
    last = out.stdout.strip().splitlines()[-1]
    assert out.returncode == 1 and "greedy response '" in last and "cannot be left out" in last


@pytest.mark.parametrize("wrong", [{"rewards": [1.0]}, {"rewards": "many"}, {"rewards": [float("nan")]}])
def test_a_wrong_answer_in_a_later_step_saves_the_finished_ones(small, tmp_path, wrong):
    calls = []

    def answer(request, connection):
        calls.append(1)
        good = {"rewards": [float(len(t)) for t in request["query"]], "id": request["id"], "fingerprint": INFO["fingerprint"]}
        return reply({**good, **wrong} if len(calls) > 6 else good)

    server = BadServer(answer)
    out = train_here(*run_flags(small, server.port, "--log-dir", tmp_path / "run"))
    server.close()
    done = len(metrics(tmp_path / "run"))
    assert out.returncode == 1 and done >= 1, out.stdout
    assert (tmp_path / f"run/checkpoints/step-{done:06d}").exists()


def test_a_nan_reward_is_never_read_by_the_objective_of_others():
    from reinforce.objective import counted, objective

    reward = torch.tensor([1.0, torch.nan, 2.0], dtype=torch.float64)
    finished = torch.tensor([True, True, False])
    assert counted(finished, reward, "keep").tolist() == [True, False, True]
    assert counted(finished, reward, "drop").tolist() == [True, False, False]
    assert objective(reward, None, 0.0, finished).isnan().tolist() == [False, True, False]


def test_refused_rows_of_a_step_whose_greedy_responses_get_no_reward_are_not_counted(small, tmp_path):
    """Its rows are drawn again when the run goes on, and would be counted twice."""
    greedy = []

    def answer(request, connection):
        texts = request["completions"]
        greedy.extend([1] if len(texts) == 6 else [])
        if len(texts) == 12:  # each step's first one
            return reply({"index": 0}, 422)
        return reply(
            {
                "rewards": [float(len(t)) for t in texts] if len(greedy) < 2 else [],
                "id": request["id"],
                "fingerprint": INFO["fingerprint"],
            }
        )

    server = BadServer(answer, info={**INFO, "max_texts": 99})
    out = train_here(*run_flags(small, server.port, "--skip-refused", "99", "--baseline", "remax", "--log-dir", tmp_path / "run"))
    server.close()
    (last,) = (tmp_path / "run/checkpoints").iterdir()
    saved = json.loads((last / "state.json").read_text())["refused"]
    assert out.returncode == 1 and metrics(tmp_path / "run")[-1]["refused"] == saved == 1


def test_exactly_as_many_rows_as_are_allowed_may_be_left_out():
    refusals = Refusals(2)
    refusals.take([{}, {}])
    assert (refusals.total, refusals.left) == (2, 0)
