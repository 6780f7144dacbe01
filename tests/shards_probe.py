"""One process of a test of shards.py: torchrun --nproc-per-node N shards_probe.py FOLDER. Every rank checks, rank 0 writes FOLDER/ok.

The folder holds models with tied and untied weights. N = 3 divides no dimension of theirs.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinforce.logprobs import Scorer
from reinforce.policy import load_policy
from reinforce.run import distributed, shards

CPU = torch.device("cpu")


class Words(dict):
    """As much of a tokenizer as loading a policy looks at."""

    get_vocab = dict.copy


def main(folder):
    distributed.start(CPU, alone=True)
    row = torch.arange(3, 11)[None]  # (1, 8)
    seen = torch.ones_like(row, dtype=torch.bool)
    for source in sorted(folder.glob("*/config.json")):
        for on_host in (False, True):
            model = shards.build(str(source.parent))
            assert model is not None and all(p.is_meta for p in model.parameters())
            scorer = Scorer(model, plain=True)
            distributed.wrap(scorer, CPU, "fsdp", False, on_host)
            shards.read(scorer, str(source.parent), CPU)
            stored = load_file(source.parent / "model.safetensors")
            for name, parameter in model.named_parameters():
                assert torch.equal(distributed.gather_tensor(parameter.detach()), stored.pop(name)), name
                assert parameter.to_local().numel() < parameter.numel() or distributed.world_size() == 1
            assert not stored
            whole = Scorer(load_policy(str(source.parent), Words(), CPU), plain=True)
            logp = scorer(row, seen, row, seen)
            assert torch.equal(logp, whole(row, seen, row, seen))
            logp.sum().backward()
            assert all(p.grad is not None for p in model.parameters())
    if distributed.rank() == 0:
        (folder / "ok").touch()
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
