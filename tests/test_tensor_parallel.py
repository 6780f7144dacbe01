"""A team of two ranks holds one model: sampled tokens and gradients are those of one process."""

import json
import signal
import subprocess
import sys
from unittest import mock

import pytest
import split_probe
import torch
from conftest import ROOT, environment, metrics, script, split_models, torchrun, train_here
from same_run import assert_same, untimed, wait_for
from tensor_probe import VARIANTS
from test_server import serving
from test_split import errors, initial
from transformers import GPT2Config, LlamaConfig

from recipes import smollm2
from reinforce.errors import ConfigError
from reinforce.run import checkpoint, tensor_parallel

pytestmark = split_models


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_team_samples_the_tokens_and_takes_the_gradient_of_one_process(small, tmp_path, ranks):
    """The small model's head is tied. With four ranks two teams share the prompts, under DDP and FSDP2."""
    (tmp_path / "policy").symlink_to(small / "policy")
    split_probe.main(tmp_path, {"ddp": {}})
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, ROOT / "tests/tensor_probe.py", tmp_path,
                 OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode == 0, out.stdout
    right, found = torch.load(tmp_path / "world-1.pt")["ddp"], torch.load(tmp_path / f"world-{ranks}.pt")
    for variant in VARIANTS:
        gradient, moved = errors(found[variant], right, initial(small))
        assert found[variant]["apart"] == 0.0, "scorer and reference of the same policy"
        if "bf16" in variant:
            assert 1e-4 < gradient <= 5e-2
        else:
            assert found[variant]["tokens"] == right["tokens"] and gradient <= 1e-5 and moved <= 1e-3


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_shards_norm_and_clipped_gradient_are_those_of_one_process(tmp_path, ranks):
    """Models with biases, with tied and untied heads, and 51 tokens, of which no rank has as many as another.

    Three ranks are one team of a model with 9 query heads and 3 key heads."""
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, ROOT / "tests/team_probe.py", tmp_path,
                 OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode == 0 and (tmp_path / "ok").exists(), out.stdout
    assert "redistributing" not in out.stdout, "a warning that a user can do nothing about"


SIZE = ("--tensor-model-parallel-size", "2")


def test_a_size_that_the_ranks_or_the_model_cannot_have_is_refused_in_one_sentence(flags):
    for size, told in (
        (2, "does not divide the 1 ranks; start a multiple of 2"),
        (0, "it must be positive"),
        (-2, "it must be positive"),
    ):
        out = train_here(*flags, "--tensor-model-parallel-size", size)
        assert out.returncode == 2 and told in out.stdout and "Traceback" not in out.stdout, out.stdout
    for config, told in (
        (LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3), "--tensor-model-parallel-size 2 does not divide the 9 query heads of --policy X"),
        (LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=1), "does not divide the 1 KV heads"),
        (GPT2Config(), "no tensor parallel plan for a gpt2 model"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            tensor_parallel.refuse_policy(config, 2, "--policy X")
        tensor_parallel.refuse_policy(config, 1, "--policy X")
    tensor_parallel.refuse_policy(LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3), 3, "--policy X")
    with mock.patch("transformers.__version__", "5.22.0"), pytest.raises(ConfigError, match=r"needs transformers 5\.23"):
        tensor_parallel.refuse_ranks(2, 2)


@pytest.mark.slow
def test_a_run_of_a_team_has_the_metrics_of_one_process(flags, tmp_path):
    """train.py itself, with a KL penalty, ReMax and a server: rewards are on their way while the team's reference scores."""
    words = [*flags, "--baseline", "remax", "--max-steps", "2", "--log-dir"]
    assert train_here(*words, tmp_path / "one").returncode == 0
    out = torchrun(2, *words, tmp_path / "team", *SIZE, timeout=120)
    assert out.returncode == 0, out.stdout
    for a, b in zip(untimed(tmp_path / "team"), untimed(tmp_path / "one"), strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (a["step"], key)


@pytest.mark.slow
@pytest.mark.skipif(bool(smollm2.missing_packages(model_too=True, reward_too=False)), reason="SmolLM2's packages are not installed")
def test_smollm2_itself_on_a_team_of_three_has_the_responses_and_metrics_of_one_process(tmp_path):
    """Its own weights: 9 query heads, 3 key heads, a tied head of 49,152 tokens. Two steps, the second after an update."""
    folder = smollm2.prepare()
    with serving(tmp_path, "--reward-fn", f"{ROOT}/bench/step.py:variety") as (_, port, _process):
        words = ["--policy", folder / "policy", "--train-data", folder / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", port,
                 "--num-rollout-samples", "3", "--num-rollouts-per-prompt", "2", "--max-new-tokens", "12", "--precision", "fp32",
                 "--max-steps", "2", "--lr", "1e-5", "--save-top-k", "0", "--log-dir"]  # fmt: skip
        for ranks, how in ((1, ()), (3, ("--tensor-model-parallel-size", "3"))):
            out = torchrun(ranks, *words, tmp_path / str(ranks), *how, timeout=600)
            assert out.returncode == 0, out.stdout
    one, team = ([json.loads(line)["response"] for line in (tmp_path / n / "rollouts.jsonl").open()] for n in "13")
    assert one == team and len(one) == 6
    for a, b, error in zip(untimed(tmp_path / "3"), untimed(tmp_path / "1"), (1e-5, 1e-3), strict=True):
        assert a.keys() == b.keys()  # AdamW's first step moves a weight by lr whatever its gradient, be it rounding alone
        for key, value in b.items():
            if key in ("kl", "logprob_gap") and a["step"] == 1:  # rounding alone, of up to 12 log-probs of 1e-6 each, in both
                assert max(abs(a[key]), abs(value)) <= 2.5e-5, (a[key], value)
            else:
                assert a[key] == pytest.approx(value, rel=error, abs=error), (a["step"], key)


DIES = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
finished = train.Run.finished
def dies(run, made):
    finished(run, made)
    if made.number == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
train.Run.finished = dies
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [(2,), (4,), (4, "--parallel", "fsdp")])
def test_a_killed_team_goes_on_bitwise(flags, tmp_path, how):
    """Rank 1 gets SIGKILL after the fourth step; the run goes on from the checkpoint of the third."""
    ranks, *parallel = how
    words = [*flags, *SIZE, *parallel, "--max-steps", "6", "--max-epochs", "9", "--save-interval", "3", "--log-dir"]
    assert torchrun(ranks, *words, tmp_path / "whole").returncode == 0
    (tmp_path / "dies.py").write_text(DIES)
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, tmp_path / "dies.py", *words, tmp_path / "run",
                 OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode != 0 and [f.name for f in checkpoint.checkpoints_of(tmp_path / "run")] == ["step-000003"], out.stdout
    out = torchrun(ranks, *words, tmp_path / "run")
    assert out.returncode == 0 and "going on after step 3 of 6" in out.stdout, out.stdout
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_team_that_is_told_to_end_saves_its_last_step_and_goes_on_bitwise(flags, tmp_path, number):
    """The signal reaches torchrun, as Slurm's or a user's does, in the middle of a step."""
    run, words = tmp_path / "run", [*flags, *SIZE, "--max-epochs", "9999", "--save-interval", "9999", "--log-dir"]
    torchrun_words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py"]
    job = subprocess.Popen([sys.executable, *map(str, [*torchrun_words, *words, run, "--max-steps", "9999"])],
                           env=environment(OMP_NUM_THREADS=1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 1, job)
    job.send_signal(number)
    assert job.wait(60) != 0
    done = len(metrics(run))
    assert [f.name for f in checkpoint.checkpoints_of(run)] == [f"step-{done:06d}"] and checkpoint.flaw(
        checkpoint.newest(run)
    ) is None
    for folder in (run, tmp_path / "whole"):
        out = torchrun(2, *words, folder, "--max-steps", done + 2)
        assert out.returncode == 0 and ("going on" in out.stdout) == (folder == run), out.stdout
    assert_same(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_from_a_team_to_one_process_and_to_fsdp(flags, tmp_path):
    words = [*flags, "--max-epochs", "9", "--save-interval", "2"]
    whole, run = ["--log-dir", tmp_path / "whole"], ["--log-dir", tmp_path / "run"]
    assert train_here(*words, *whole, "--max-steps", "8").returncode == 0
    teams = (4, *SIZE, "--parallel", "fsdp"), (2, *SIZE), (1,), (2, "--parallel", "fsdp")
    for i, (ranks, *how) in enumerate(teams):
        out = torchrun(ranks, *words, *run, *how, "--max-steps", 2 * (i + 1))
        assert out.returncode == 0 and ("going on" in out.stdout) == (i > 0), out.stdout
    for a, b in zip(untimed(tmp_path / "run"), untimed(tmp_path / "whole"), strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (a["step"], key)
