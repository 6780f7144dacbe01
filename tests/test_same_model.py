"""Families whose plan, names of weights or masks are odd, cut over two ranks: the model that is trained is that of one process."""

from unittest import mock

import pytest
import torch
from conftest import ROOT, metrics, script, split_models, torchrun, train_here
from safetensors.torch import load_file

from bench import families
from recipes import toy

TEAM = ("--tensor-model-parallel-size", 2)


def policy(folder, family):
    """A tiny random model, all of whose weights count; a Mixtral's experts under the model's own packed names."""
    tokenizer = toy.make_tokenizer()
    with mock.patch.dict(families.SIZES, vocab_size=len(tokenizer)):
        model = families.tiny(family)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder, save_original_format=family != "mixtral")
    tokenizer.save_pretrained(folder)
    return folder


def averages(run):
    """AdamW's first moments after one step, the gradient times a constant, by parameter."""
    found = load_file(run / "checkpoints/step-000001/training/optimizer.safetensors")
    return {key: value for key, value in found.items() if key.endswith(".exp_avg")}


@split_models
@pytest.mark.parametrize("family", ["mixtral", "apertus"])
def test_packed_experts_and_weights_without_a_rule_are_trained_as_in_one_process(family, flags, tmp_path):
    """Slices of a file gave a rank half of the gates twice; an activation's own weights saw a part of the features."""
    policy(tmp_path / "policy", family)
    flags = [*flags, "--policy", tmp_path / "policy", "--max-steps", 1, "--precision", "fp32"]
    flags += ["--temperature", 0.7, "--min-new-tokens", 2]  # which the comparison has to leave out
    for name, run in (("one", train_here), ("two", lambda *words: torchrun(2, *words, *TEAM))):
        out = run(*flags, "--log-dir", tmp_path / name)
        assert out.returncode == 0, out.stdout
    (one,), (two,) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert abs(two["kl"]) < 1e-5 and two["reward"] == pytest.approx(one["reward"], abs=1e-6)
    right, found = averages(tmp_path / "one"), averages(tmp_path / "two")
    for key, value in right.items():
        assert (found[key] - value).norm() <= 1e-3 * value.norm(), key  # one number, a sum that cancels, is 1e-4 off


@split_models
def test_a_model_that_the_ranks_make_another_one_of_is_refused_before_a_step(flags, tmp_path):
    policy(tmp_path / "policy", "mixtral")
    broken = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom reinforce.run import distributed\n"
    (tmp_path / "broken.py").write_text(f"{broken}distributed.is_packed = lambda parameter: False\nimport train\ntrain.main()\n")
    words = [*flags, "--policy", tmp_path / "policy", "--max-steps", 1, "--precision", "fp32", *TEAM, "--log-dir", tmp_path / "run"]
    out = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "broken.py", *words, OMP_NUM_THREADS=1
    )
    assert out.returncode == 1 and "is another model: log pi of a token changes by" in out.stdout, out.stdout
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_masks_of_float32_survive_that_fsdp_casts_a_block(flags, tmp_path):
    """Their least number became -inf in bfloat16, and a padding's row NaN, in Gemma 2 and others."""
    policy(tmp_path / "policy", "gemma2")
    words = [*flags, "--policy", tmp_path / "policy", "--max-steps", 1, "--precision", "bf16", "--parallel", "fsdp"]
    out = torchrun(2, *words, "--log-dir", tmp_path / "run")
    assert out.returncode == 0, out.stdout
    (line,) = metrics(tmp_path / "run")
    assert abs(line["kl"]) < 0.01 and 0.1 < line["grad_norm"] < 10, "sampler and scorer differ by bfloat16's rounding"
