"""A team of two ranks holds one model: sampled tokens and gradients are those of one process."""

import pytest
import split_probe
import torch
from conftest import ROOT, script
from tensor_probe import VARIANTS
from test_split import errors, initial


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
