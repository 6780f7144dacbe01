"""One process of a split test with LoRA: torchrun --nproc-per-node N lora_probe.py FOLDER. As split_probe.py.

B is drawn, as after some training: at B = 0 the gradient of A is 0 and nothing of it would be compared.
"""

import sys
from pathlib import Path
from unittest import mock

import split_probe
import torch

from reinforce.run import distributed, loading

LORA = {"lora_rank": 3, "initial_policy_kl_penalty": 0.1}
VARIANTS = {
    "ddp": LORA, "ddp, micro-batch 1": {**LORA, "micro_batch_size": 1, "rollout_micro_batch_size": 2},
    "fsdp": {**LORA, "parallel": "fsdp"}, "fsdp, gradient checkpointing": {**LORA, "parallel": "fsdp", "gradient_checkpointing": True},
    "ddp, bf16": {**LORA, "precision": "bf16"}, "fsdp, bf16": {**LORA, "parallel": "fsdp", "precision": "bf16"},
}  # fmt: skip


def load(inputs):
    actor = loading.load(inputs)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in actor.model.named_parameters():
            if name.endswith("lora.B"):
                p.copy_(distributed.shard_like(p, 0.1 * torch.randn(p.shape, generator=draw)))
    return actor


def stored(tokenizer, of=split_probe.stored):
    """Every row counts, so that each rank has a part in the gradient."""
    rollout, advantage, valid = of(tokenizer)
    return rollout, advantage, torch.ones_like(valid)


def main(folder):
    with mock.patch.object(split_probe, "load", load), mock.patch.object(split_probe, "stored", stored):
        split_probe.main(folder, VARIANTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
