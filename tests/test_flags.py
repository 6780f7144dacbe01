"""Each flag of a run does what it says: what reaches sampler, objective, loss and optimizer, seen from outside."""

import json

import pytest
import torch
from conftest import metrics, rows_of, train_here
from safetensors.torch import load_file

import train
from recipes import toy
from reinforce import sampler
from reinforce.logprobs import Scorer
from reinforce.run import loading
from reinforce.run.config import TrainConfig


def test_another_seed_draws_other_responses_to_the_same_prompts(flags, tmp_path):
    said = []
    for seed in "01":
        words = ["--num-rollout-samples", "18", "--seed", seed, "--max-steps", "1", "--log-dir", tmp_path / seed]
        assert train_here(*flags, *words).returncode == 0
        said.append({row["index"]: row["response"] for row in rows_of(tmp_path / seed)})
    assert list(said[0]) != list(said[1]) and said[0].keys() == said[1].keys(), "in another order"
    assert sum(said[0][i] != said[1][i] for i in said[0]) > 9


def test_a_prompt_has_other_responses_in_the_next_epoch(flags, tmp_path):
    words = ["--num-rollout-samples", "18", "--lr", "1e-9", "--max-steps", "2", "--max-epochs", "2", "--log-dir", tmp_path]
    assert train_here(*flags, *words).returncode == 0
    first, second = ({r["index"]: r["response"] for r in rows_of(tmp_path) if r["step"] == step} for step in (1, 2))
    assert sum(first[i] != second[i] for i in first) > 9


def test_a_runs_temperature_and_minimum_length_are_those_of_its_scorer_too(flags, tmp_path):
    words = ["--temperature", "0.5", "--min-new-tokens", "3", "--max-steps", "1", "--log-dir", tmp_path]
    assert train_here(*flags, *words).returncode == 0
    assert metrics(tmp_path)[0]["ratio_distance"] < 1e-9
    assert all(n > 3 for row in rows_of(tmp_path) for n in row["length"])


def test_flags_of_the_optimizer_reach_it(small, flags, tmp_path):
    """One step of AdamW moves each number by about the rate, whatever the gradient."""
    before = load_file(small / "policy/model.safetensors")

    def step(name, *extra):
        assert train_here(*flags, *extra, "--max-steps", "1", "--log-dir", tmp_path / name).returncode == 0
        folder = tmp_path / name / "checkpoints/step-000001"
        after = load_file(folder / "model.safetensors")
        return {n: after[n] - before[n] for n in before}, load_file(folder / "training/optimizer.safetensors"), folder

    name, largest = "model.layers.0.mlp.up_proj.weight", lambda moved: max(x.abs().max() for x in moved.values()).item()
    plain, _, _ = step("plain")
    assert largest(plain) == pytest.approx(7e-4, rel=0.01)
    assert largest(step("warmup", "--warmup-steps", "10")[0]) == pytest.approx(7e-5, rel=0.01)
    assert largest(step("clip", "--max-grad-norm", "1e-9")[0]) < 1e-4
    decayed = step("decay", "--weight-decay", "0.5")[0]
    torch.testing.assert_close(decayed[name], plain[name] - 7e-4 * 0.5 * before[name], rtol=0, atol=1e-7)
    _, moments, folder = step("betas", "--adam-betas", "0.5", "0.9", "--baseline", "ema", "--ema-decay", "0.5")
    m, v = moments[f"{name}.exp_avg"].square(), moments[f"{name}.exp_avg_sq"]
    assert (m.sum() / v.sum()).item() == pytest.approx(0.5**2 / 0.1, rel=1e-3)
    assert json.loads((folder / "state.json").read_text())["baseline"] == pytest.approx(
        0.5 * metrics(tmp_path / "betas")[0]["objective"]
    )


@pytest.mark.parametrize("norm", ["sequence", "token", "length"])
def test_the_loss_is_divided_as_the_flag_says(norm, flags, tmp_path):
    out = train_here(*flags, "--loss-norm", norm, "--max-new-tokens", "24", "--max-steps", "1", "--log-dir", tmp_path)
    assert out.returncode == 0, out.stdout
    each = [x for r in rows_of(tmp_path) for x in zip(r["advantage"], r["logp"], r["length"], strict=True)]
    assert len({n for _, _, n in each}) > 1
    divisor = sum(n for _, _, n in each) if norm == "token" else len(each)
    want = -sum(a * p / (n if norm == "length" else 1) for a, p, n in each) / divisor
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_kl_reduce_mean_divides_by_the_responses_length(flags, tmp_path):
    """The first step's KL is 0, so both runs draw the same responses in the second one."""
    for how in ("sum", "mean"):
        words = ["--kl-reduce", how, "--lr", "0.003", "--max-new-tokens", "24", "--max-steps", "2", "--log-dir", tmp_path / how]
        assert train_here(*flags, *words).returncode == 0
    pairs = list(zip(rows_of(tmp_path / "sum")[6:], rows_of(tmp_path / "mean")[6:], strict=True))
    assert all(a["response"] == b["response"] for a, b in pairs)
    for a, b in pairs:
        assert [k * n for k, n in zip(b["kl"], b["length"], strict=True)] == pytest.approx(a["kl"], rel=1e-2, abs=1e-4)
    assert max(abs(k) for a, _ in pairs for k in a["kl"]) > 1e-2


def test_the_ratio_is_clipped_where_the_flag_says(flags, tmp_path):
    ends = []
    for clip in ("0.001", "9"):
        words = ["--global-batch-size", "2", "--lr", "0.01", "--ratio-clip", clip, "--max-steps", "1", "--log-dir", tmp_path / clip]
        assert train_here(*flags, *words).returncode == 0
        ends.append(load_file(tmp_path / clip / "checkpoints/step-000001/model.safetensors"))
    assert any(not torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("update", [["--micro-batch-size", "1"], ["--micro-batch-size", "99", "--micro-batch-tokens", "1"]])
def test_no_pass_has_more_rows_than_its_flag_says(update, flags, tmp_path, monkeypatch):
    sampled, scored, updated, loop, draw, forward = [], [], [], train.train, sampler.sample, Scorer.forward

    def watched(*words):  # the guard's own passes come before
        monkeypatch.setattr(sampler, "sample", lambda m, p, s, *r: (sampled.append(len(s)), draw(m, p, s, *r))[1])
        monkeypatch.setattr(Scorer, "forward", lambda self, *rows: (
            (updated if torch.is_grad_enabled() else scored).append(len(rows[0])), forward(self, *rows))[1])  # fmt: skip
        loop(*words)

    monkeypatch.setattr(train, "train", watched)
    sizes = ["--rollout-micro-batch-size", "4", "--forward-micro-batch-size", "3", "--val-rollout-micro-batch-size", "2"]
    assert train_here(*flags, *sizes, *update, "--max-steps", "1", "--log-dir", tmp_path).returncode == 0
    assert sampled == [2] * 9 + [4] * 3 + [2] * 9 and scored == [3] * 4 and updated == [1] * 12


def test_flags_of_sampling_are_those_of_the_sampler_in_training_and_in_validation():
    config = TrainConfig(max_new_tokens=9, temperature=0.7, min_new_tokens=2, end_strings=("x",), val_temperature=0.5, val_greedy=True,
                         val_top_k=3, val_top_p=0.8)  # fmt: skip
    training, validation = loading.samplings(config, toy.make_tokenizer(), (2, 7))
    for one in (training, validation):
        assert (one.max_new_tokens, one.end_ids, one.min_new_tokens, one.end_strings) == (9, (2, 7), 2, ("x",))
    assert (training.temperature, training.greedy, training.top_k, training.top_p) == (0.7, False, 0, 1.0)
    assert (validation.temperature, validation.greedy, validation.top_k, validation.top_p) == (0.5, True, 3, 0.8)
