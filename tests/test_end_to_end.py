"""The real thing: reward server and trainer as processes, the toy learned, two ranks equal, every stop clean."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, environment, metrics, rows_of, script, small_flags, train_here
from safetensors.torch import load_file
from test_server import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from reinforce.baselines import BASELINES, rloo
from reinforce.data.prompts import step_prompts

KEYS = [
    "step",
    "reward",
    "reward_std",
    "kl",
    "objective",
    "advantage_std",
    "loss",
    "grad_norm",
    "lr",
    "entropy",
    "response_length",
    "finished",
    "zero_signal",
    "logprob_gap",
    "ratio_clipped",
    "tokens_per_s",
    "time_rollout",
    "time_reward",
    "time_reference",
    "time_update",
    "prompts_seen",
    "epoch",
]


def weights(run, step):
    return load_file(run / f"checkpoints/step-{step:06d}/model.safetensors")


def last_weights(run):
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


@pytest.fixture(scope="module")
def toy_run(toy_folder, tmp_path_factory):
    """launch.sh as the README has it, but half as long."""
    run = tmp_path_factory.mktemp("toy") / "run"
    out = subprocess.run(
        [ROOT / "launch.sh", "--log-dir", run, "--max-steps", "40"], env=environment(VIRTUAL_ENV=sys.prefix, PATH=path()), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240, stdin=subprocess.DEVNULL, cwd=run.parent,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout
    return run, out.stdout


def path():
    return f"{sys.prefix}/bin:{os.environ['PATH']}"


def test_launch_trains_the_toy_against_the_served_reward_model_and_the_reward_rises(toy_run):
    run, out = toy_run
    lines = metrics(run)
    reward = [line["reward"] for line in lines]
    assert len(lines) == 40 and abs(reward[0]) < 0.5
    assert sum(reward[-5:]) / 5 >= 1.0 and max(line["kl"] for line in lines) <= 10
    after = next(line for line in out.splitlines() if line.startswith("   after"))
    assert float(after.split()[1]) >= 0.8, "the grammar's own label, which training never saw"
    assert json.loads((run / "exit.json").read_text()) == {"code": 0, "reason": "done"}


def test_the_screen_has_no_warnings_and_ends_with_samples_and_places(toy_run):
    run, out = toy_run
    assert any(re.fullmatch(r"device .* · \d+ threads? · 1 rank", line) for line in out.splitlines()[:5])
    for word in ("warning", "Warning", "deprecated", "Traceback", "OMP_NUM_THREADS"):
        assert word not in out
    assert out.count("before  ") >= 5 and out.count("after   ") >= 5 and f"\ncurves       {run}/curves.png\n" in out


def test_the_run_folder_holds_what_was_promised(toy_run):
    run, _ = toy_run
    assert all(set(KEYS) <= set(line) for line in metrics(run))
    assert [line["step"] for line in metrics(run) if "val_reward" in line] == [25, 40]
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 40 * 16 and all(len(r["response"]) == len(r["reward"]) == len(r["advantage"]) == 4 for r in rows)
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG" and any((run / "tensorboard").iterdir())
    assert json.loads((run / "config.json").read_text())["baseline"] == "rloo"
    first = [r for r in rows if r["step"] == 1]
    line = metrics(run)[0]
    assert line["reward"] == pytest.approx(sum(sum(r["reward"]) for r in first) / 64)
    assert line["kl"] == pytest.approx(sum(sum(r["kl"]) for r in first) / 64) and abs(line["kl"]) < 1e-3
    assert line["response_length"] == pytest.approx(sum(sum(r["length"]) for r in first) / 64)
    assert line["objective"] == pytest.approx(line["reward"] - 0.05 * line["kl"])
    for row in rows[::37]:
        total = [r - 0.05 * kl for r, kl in zip(row["reward"], row["kl"], strict=True)]
        assert row["advantage"] == pytest.approx(rloo(torch.tensor([total], dtype=torch.float64))[0].tolist(), abs=1e-9)


def test_a_checkpoint_opens_in_transformers_with_the_trained_policys_logits(small, flags, tmp_path, monkeypatch):
    """The parameters in memory at the end of training, against the folder that anyone opens."""
    import train

    kept, loop = [], train.train
    monkeypatch.setattr(train, "train", lambda actor, *rest: (kept.append(actor.model), loop(actor, *rest)))
    assert train_here(*flags, "--max-steps", "2", "--lr", "0.01", "--log-dir", tmp_path / "run").returncode == 0
    folder = tmp_path / "run/checkpoints/step-000002"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(folder)("anna on the pizza in rome : the crust was", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, kept[0](ids).logits, rtol=0, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(small / "policy")
    assert (before(ids).logits - model(ids).logits).abs().max() > 0.01


def test_a_signal_before_the_first_step_is_told_apart_from_a_failure(small, tmp_path):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    out = train_here("--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", "9",
                     "--rm-wait", "60", "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 75 and "stopped by SIGTERM before the first step" in out.stdout and "Traceback" not in out.stdout
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 75


PROBE = """
import hashlib, json, os, sys
sys.path.insert(0, {root!r})
import train
from reinforce.errors import RetryError
from reinforce.rm_client import RewardClient
keep, backward, leave, ask = train.train, train.backward, train.distributed.stop, RewardClient.rewards
flags, cases = sys.argv[2:], json.loads(sys.argv[1])
train.distributed.stop = lambda: None  # one process group for all runs
def watched(actor, *rest):
    keep(actor, *rest)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in actor.model.parameters())).hexdigest()
    open(os.path.join({out!r}, name + os.environ["RANK"]), "w").write(digest)
def poisoned(actor, batch, update):
    count.append(1)
    if name in ("nan", "inf") and len(count) == 2 and os.environ["RANK"] == "1":
        batch.advantage[3] = float(name)
    return backward(actor, batch, update)
def unlucky(self, **request):
    asked.append(1)
    if name == "server gone" and len(asked) == 3 and os.environ["RANK"] == "1":
        raise RetryError("no answer")
    return ask(self, **request)
train.train, train.backward, RewardClient.rewards = watched, poisoned, unlucky
for name, extra in cases.items():
    count, asked = [], []
    sys.argv = ["train.py", *flags, *extra, "--log-dir", os.path.join({out!r}, name)]
    try:
        train.main()
    except SystemExit as done:
        assert done.code == {{"nan": 1, "inf": 1, "server gone": 75}}.get(name, 0), (name, done.code)
leave()
"""
CASES = {
    **{baseline: ["--baseline", baseline, "--max-steps", "2"] for baseline in BASELINES},
    "uneven": ["--num-rollout-samples", "5", "--baseline", "remax", "--micro-batch-size", "1", "--max-steps", "1"],
    "no rows": ["--global-batch-size", "2", "--lr", "1e-5", "--max-steps", "1"],
    "server gone": ["--max-steps", "3"],
    **{value: ["--num-rollout-samples", "7", "--save-interval", "1", "--max-steps", "3"] for value in ("nan", "inf")},
}


@pytest.fixture(scope="module")
def two_ranks(small, server_port, tmp_path_factory):
    """Every case on two ranks, one after the other in one process group: the folder of the runs, what was said, the flags."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "probe.py").write_text(PROBE.format(root=str(ROOT), out=str(place)))
    flags = small_flags(small, server_port)
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, place / "probe.py", json.dumps(CASES), *flags,
                 OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode == 0, out.stdout
    return place, out.stdout, flags


def test_two_ranks_end_with_bitwise_equal_parameters_for_every_baseline(small, two_ranks):
    place, _, _ = two_ranks
    before, ends = load_file(small / "policy/model.safetensors"), set()
    for baseline in BASELINES:
        first, second = ((place / f"{baseline}{r}").read_text() for r in (0, 1))
        assert first == second
        ends.add(first)
        after = last_weights(place / baseline)
        assert any(not torch.equal(before[name], after[name]) for name in after)
    assert len(ends) == len(BASELINES)


def test_one_rank_and_two_ranks_take_the_same_first_step(two_ranks, tmp_path):
    """Rollouts, rewards, advantages and the gradient before clipping do not depend on the number of ranks.

    Five prompts, which two ranks cannot halve, and micro-batches of one row: six passes on one rank, four on the other.
    """
    place, _, flags = two_ranks
    assert train_here(*flags, *CASES["uneven"], "--log-dir", tmp_path / "one").returncode == 0
    lines = [metrics(run)[0] for run in (tmp_path / "one", place / "uneven")]
    rollouts = [rows_of(run) for run in (tmp_path / "one", place / "uneven")]
    assert [r["response"] for r in rollouts[0]] == [r["response"] for r in rollouts[1]]
    assert [r["index"] for r in rollouts[0]] == [r["index"] for r in rollouts[1]]
    for a, b in zip(*rollouts, strict=True):
        assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-5)
    for key in ("reward", "kl", "entropy", "loss", "response_length", "val_reward"):
        assert lines[0][key] == pytest.approx(lines[1][key], abs=2e-5), key
    assert lines[1]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_before_the_step(two_ranks, value):
    """An advantage of rank 1 is poisoned in the second step: its second prompt's second response."""
    place, said, _ = two_ranks
    run = place / value
    reason = json.loads((run / "exit.json").read_text())
    assert reason["code"] == 1 and "in step 2: no update was made" in reason["reason"] and "nonfinite.jsonl" in reason["reason"]
    assert said.count("in step 2: no update was made") == 4, "each rank in each of the two cases"
    (row,) = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    prompts = step_prompts(18, 7, 0, 1)
    assert (row["step"], row["index"], row["k"]) == (2, prompts[3], 1)
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-000001"] and len(metrics(run)) == 1


def test_a_rank_whose_server_is_gone_takes_the_other_along_and_the_finished_step_is_saved(two_ranks):
    place, said, _ = two_ranks
    run = place / "server gone"
    assert json.loads((run / "exit.json").read_text()) == {"code": 75, "reason": "no answer"} and said.count("no answer") == 2
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-000001"] and len(metrics(run)) == 1


def test_the_same_command_gives_the_same_run_and_another_seed_another(flags, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = train_here(*flags, "--max-steps", "2", "--seed", seed, "--log-dir", tmp_path / name)
        assert out.returncode == 0, out.stdout
    timed = lambda line: {k: v for k, v in line.items() if not k.startswith("time_") and k != "tokens_per_s"}  # noqa: E731
    a, b, c = ([timed(line) for line in metrics(tmp_path / n)] for n in "abc")
    assert a == b != c
    assert all(
        torch.equal(x, y) for x, y in zip(weights(tmp_path / "a", 2).values(), weights(tmp_path / "b", 2).values(), strict=True)
    )


def test_deterministic_allows_no_other_algorithms_and_changes_nothing_on_a_cpu(flags, tmp_path):
    try:
        for name, extra in (("a", []), ("b", ["--deterministic"])):
            assert not torch.are_deterministic_algorithms_enabled()
            out = train_here(*flags, *extra, "--max-steps", "1", "--log-dir", tmp_path / name)
            assert out.returncode == 0, out.stdout
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 0]]]), 2)
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (last_weights(tmp_path / n) for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_micro_batches_change_nothing_but_memory(flags, tmp_path):
    sizes = {"a": [], "b": ["--micro-batch-size", "1", "--rollout-micro-batch-size", "2", "--forward-micro-batch-size", "3",
                            "--micro-batch-tokens", "1", "--val-rollout-micro-batch-size", "1"]}  # fmt: skip
    for name, extra in sizes.items():
        out = train_here(*flags, *extra, "--max-steps", "1", "--log-dir", tmp_path / name)
        assert out.returncode == 0, out.stdout
    a, b = (metrics(tmp_path / n)[0] for n in "ab")
    for key in ("reward", "kl", "loss", "grad_norm", "entropy", "val_reward"):
        assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-5), key


def test_without_a_kl_penalty_no_reference_is_loaded_and_kl_is_null(flags, tmp_path):
    out = train_here(*flags, "--initial-policy-kl-penalty", "0", "--max-steps", "1", "--log-dir", tmp_path / "run")
    assert out.returncode == 0, out.stdout
    line = metrics(tmp_path / "run")[0]
    assert line["kl"] is None and line["time_reference"] < 0.05 and line["objective"] == line["reward"]


@pytest.fixture(scope="module")
def label_server(tmp_path_factory):
    """A server whose reward is the prompt's own label."""
    folder = tmp_path_factory.mktemp("label")
    (folder / "own.py").write_text("def own(prompts, completions, labels):\n    return [float(label) for label in labels]\n")
    with serving(folder, "--reward-fn", f"{folder}/own.py:own") as (_, port, _p):
        yield port


def labelled(small, folder, label):
    """The small prompts, each with this label, as a flag."""
    lines = [json.loads(line) for line in (small / "train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps({**line, "label": label}) + "\n" for line in lines))
    return ["--train-data", folder / "train.jsonl", "--val-data", folder / "train.jsonl"]


def test_equal_rewards_give_no_signal_no_nan_and_unmoved_parameters(small, flags, label_server, tmp_path):
    out = train_here(*flags, *labelled(small, tmp_path, 1.0), "--rm-port", label_server, "--initial-policy-kl-penalty", "0",
                     "--max-steps", "1", "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0, out.stdout
    line = metrics(tmp_path / "run")[0]
    assert line["zero_signal"] == 1.0 and line["grad_norm"] == 0.0 and line["reward_std"] == 0.0
    before, after = load_file(small / "policy/model.safetensors"), weights(tmp_path / "run", 1)
    assert all(torch.equal(before[n], after[n]) for n in after)


def test_several_optimizer_steps_per_rollout_start_from_the_same_rollout_and_clip_ratios(flags, tmp_path):
    """P*K is 12: three optimizer steps of two whole prompts; a --global-batch-size of 12 is the one step of the default, bitwise."""
    for name, extra in {"one": [], "same": ["--global-batch-size", "12"], "three": ["--global-batch-size", "4"]}.items():
        out = train_here(*flags, *extra, "--lr", "0.01", "--ratio-clip", "0.01", "--max-steps", "2", "--log-dir", tmp_path / name)
        assert out.returncode == 0, out.stdout
    one, three = (metrics(tmp_path / n) for n in ("one", "three"))
    assert [line["optimizer_steps"] for line in (*one, *three)] == [1, 1, 3, 3]
    assert one[0]["ratio_clipped"] == 0 < three[0]["ratio_clipped"] <= 1
    assert rows_of(tmp_path / "one")[:6] == rows_of(tmp_path / "three")[:6], "rewards and advantages come before the first step"
    assert one[0]["logprob_gap"] == pytest.approx(three[0]["logprob_gap"], abs=1e-5)
    ends = [last_weights(tmp_path / n) for n in ("one", "same", "three")]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]) and any(
        not torch.equal(ends[0][n], ends[2][n]) for n in ends[0]
    )


def test_a_rank_without_rows_takes_part_in_every_optimizer_step(two_ranks, tmp_path):
    """One prompt an optimizer step: one of two ranks has nothing, six times; the gradients are those of one rank."""
    place, _, flags = two_ranks
    assert train_here(*flags, *CASES["no rows"], "--log-dir", tmp_path / "one").returncode == 0
    one, two = metrics(tmp_path / "one")[0], metrics(place / "no rows")[0]
    assert two["optimizer_steps"] == 6
    for key in ("grad_norm", "loss", "reward", "kl"):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=2e-5), key


def test_dropped_responses_leave_the_baseline_the_loss_and_its_divisor(flags, tmp_path):
    out = train_here(*flags, "--truncated", "drop", "--num-rollouts-per-prompt", "4", "--max-new-tokens", "24", "--max-steps", "2",
                     "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0, out.stdout
    rows = rows_of(tmp_path / "run")
    assert 0 < sum(sum(r["finished"]) for r in rows) < 4 * len(rows), "the case has both kinds"
    for row in rows:
        assert row["valid"] == row["finished"]
        want = rloo(torch.tensor([row["objective"]], dtype=torch.float64), torch.tensor([row["valid"]]))[0]
        assert row["advantage"] == pytest.approx(want.tolist(), abs=1e-12)
        assert all(a == 0 for a, v in zip(row["advantage"], row["valid"], strict=True) if not v)
    first = [r for r in rows if r["step"] == 1]
    n = sum(sum(r["valid"]) for r in first)
    surrogate = -sum(a * p for r in first for a, p in zip(r["advantage"], r["logp"], strict=True)) / n
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(surrogate, abs=1e-4) and line["valid"] == pytest.approx(n / 24)


def test_a_step_whose_responses_are_all_dropped_changes_nothing_and_is_told(small, flags, tmp_path):
    out = train_here(*flags, "--truncated", "drop", "--max-new-tokens", "1", "--max-steps", "3", "--log-dir", tmp_path / "run")
    assert out.returncode == 0, out.stdout
    lines = metrics(tmp_path / "run")
    assert [line["finished"] for line in lines] == [0, 0, 0], "some response ended at once: take another seed"
    for line in lines:
        assert line["optimizer_steps"] == 0 and line["loss"] is None and line["grad_norm"] is None and line["zero_signal"] == 1
    before, after = load_file(small / "policy/model.safetensors"), last_weights(tmp_path / "run")
    assert all(torch.equal(before[n], after[n]) for n in after)


def test_the_penalty_is_taken_from_unfinished_responses_before_the_baseline(flags, tmp_path):
    out = train_here(*flags, "--truncated", "penalize", "--missing-eos-penalty", "0.7", "--max-new-tokens", "24", "--max-steps", "1",
                     "--num-rollouts-per-prompt", "4", "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0, out.stdout
    rows = rows_of(tmp_path / "run")
    assert 0 < sum(sum(r["finished"]) for r in rows) < 24
    for row in rows:
        want = [r - 0.05 * kl - 0.7 * (not f) for r, kl, f in zip(row["reward"], row["kl"], row["finished"], strict=True)]
        assert row["objective"] == pytest.approx(want, abs=1e-9)
        assert row["advantage"] == pytest.approx(rloo(torch.tensor([want], dtype=torch.float64))[0].tolist(), abs=1e-9)


def test_the_greedy_response_pays_kl_and_penalty_as_the_samples_do(flags, tmp_path):
    """At a temperature of almost 0 every sample is the greedy response, so in later steps, too, each advantage is 0."""
    out = train_here(*flags, "--baseline", "remax", "--temperature", "1e-6", "--truncated", "penalize", "--missing-eos-penalty", "0.7",
                     "--max-steps", "1", "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0, out.stdout
    rows = rows_of(tmp_path / "run")
    assert any(not f for r in rows for f in r["finished"]), "the case has unfinished responses"
    assert all(a == 0 for r in rows for a in r["advantage"])
    assert all(o == pytest.approx(r - 0.05 * kl - 0.7 * (not f)) for row in rows
               for o, r, kl, f in zip(row["objective"], row["reward"], row["kl"], row["finished"], strict=True))  # fmt: skip


def test_the_seeds_own_choices_run_as_one_preset(small, server_port, tmp_path):
    out = train_here("--preset", "nemo-aligner", "--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1",
                     "--rm-port", server_port, "--max-new-tokens", "8", "--max-steps", "1", "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0, out.stdout
    line = metrics(tmp_path / "run")[0]
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 16 and all(len(row["finished"]) == 4 and row["valid"] == row["finished"] for row in rows)
    quarters = [[f for row in rows[i : i + 4] for f in row["finished"]] for i in range(0, 16, 4)]
    assert line["optimizer_steps"] == sum(map(any, quarters)), "one for every four prompts, but where no response has ended"
    assert line["lr"] == 1e-6 and not all(map(all, quarters)), "the case has unfinished responses"
    assert all(a == 0 for row in rows for a, f in zip(row["advantage"], row["finished"], strict=True) if not f)
    assert all(n > 1 for row in rows for n in row["length"]), "the first token is no end token"
    assert all(kl >= 0 for row in rows_of(tmp_path / "run") for kl in row["kl"]), "absolute values"


def test_a_reward_that_is_not_a_number_ends_the_run_before_any_update(small, flags, label_server, tmp_path):
    run, data = tmp_path / "run", labelled(small, tmp_path, "nan")
    text = data[1].read_text()
    data[1].write_text(text.replace('"nan"', "1.0", 1))  # the first prompt's is asked for before the models are loaded
    out = train_here(*flags, *data, "--rm-port", label_server, "--log-dir", run)
    assert out.returncode == 1 and "Traceback" not in out.stdout
    assert json.loads((run / "exit.json").read_text())["code"] == 1 and not (run / "checkpoints").exists()


def test_remax_gives_a_deterministic_policy_exactly_zero_and_keeps_the_greedy_response_out(flags, tmp_path):
    """At a temperature of almost 0 every sample is the greedy response."""
    out = train_here(*flags, "--baseline", "remax", "--temperature", "1e-6", "--initial-policy-kl-penalty", "0", "--max-steps", "1",
                     "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0, out.stdout
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    assert [r["advantage"] for r in rows] == [[0.0, 0.0]] * 6 and all(len(r["response"]) == 2 for r in rows)
    assert metrics(tmp_path / "run")[0]["grad_norm"] == 0.0


def test_responses_of_length_one_and_responses_without_an_end_are_trained_on(small, flags, tmp_path):
    for limit in ("1", "2"):
        out = train_here(*flags, "--max-new-tokens", limit, "--max-steps", "1", "--log-dir", tmp_path / limit)
        assert out.returncode == 0, out.stdout
        line = metrics(tmp_path / limit)[0]
        assert line["grad_norm"] > 0 and line["finished"] < 0.5 and line["response_length"] <= int(limit)


def test_a_loss_that_is_not_finite_after_an_update_of_the_same_step_does_not_say_that_none_was_made(flags, tmp_path):
    out = train_here(*flags, "--global-batch-size", "2", "--lr", "1e30", "--log-dir", tmp_path)
    reason = json.loads((tmp_path / "exit.json").read_text())
    assert out.returncode == 1 and "in step 1: after 1 of its updates" in reason["reason"], reason
