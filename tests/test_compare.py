"""The comparison of baselines: gradient noise, runs read at one number of tokens, intervals."""

import json

import pytest
import torch
from conftest import SMALL_STEP, data_flags, metrics, recipe

from recipes import compare
from recipes.intervals import bootstrap, mean_interval, student, wilson
from reinforce.baselines import rloo
from reinforce.flags import parse
from reinforce.loss import reinforce_loss
from reinforce.run.config import TrainConfig
from reinforce.run.loading import set_up
from train import judge


@pytest.fixture
def server(server_port):
    return server_port


def test_gradient_noise_equals_a_loop_over_prompts(small, server):
    config = parse(TrainConfig, "", [str(w) for w in [*data_flags(small, server), *SMALL_STEP]])
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
    code, out = recipe(compare, *data_flags(small, server), *words, "--log-dir", tmp_path / "c", "--", *SMALL_STEP)
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
    covered = {"wilson": 0, "student": 0, "bootstrap": 0, "mean of 8": 0}
    for _ in range(400):
        hits = int((torch.rand(60, generator=draw) < 0.6).sum())
        values = torch.randn(60, generator=draw).add(1).tolist()
        mean, half = student(values[:5])
        low, high = bootstrap(values, draws=1000)
        covered["wilson"] += wilson(hits, 60)[0] <= 0.6 <= wilson(hits, 60)[1]
        covered["student"] += abs(mean - 1) <= half
        covered["bootstrap"] += low <= 1 <= high
        low, high = mean_interval(values[:8])
        covered["mean of 8"] += low <= 1 <= high
    assert all(0.91 <= n / 400 <= 0.985 for n in covered.values()), covered
