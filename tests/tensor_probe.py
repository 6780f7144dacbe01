"""One process of a tensor parallel test: torchrun --nproc-per-node N tensor_probe.py FOLDER. As split_probe.py.

Rank 0 loads the policy whole once; no other rank does, and none the reference.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import split_probe

from reinforce.run import loading

SIZE = {"tensor_model_parallel_size": 2}
VARIANTS = {
    "ddp": SIZE, "ddp, micro-batch 1": {**SIZE, "micro_batch_size": 1, "rollout_micro_batch_size": 2},
    "ddp, gradient checkpointing": {**SIZE, "gradient_checkpointing": True, "micro_batch_size": 3},
    "ddp, bf16": {**SIZE, "precision": "bf16", "initial_policy_kl_penalty": 0.1},
    "fsdp": {**SIZE, "parallel": "fsdp"},
    "fsdp, gradient checkpointing": {**SIZE, "parallel": "fsdp", "gradient_checkpointing": True, "micro_batch_size": 3},
    "fsdp, bf16": {**SIZE, "parallel": "fsdp", "precision": "bf16", "initial_policy_kl_penalty": 0.1},
}  # fmt: skip


def main(folder):
    loads = []

    def load_policy(*args, of=loading.load_policy, **named):
        loads.append(args)
        return of(*args, **named)

    with mock.patch.object(loading, "load_policy", load_policy):
        split_probe.main(folder, VARIANTS)
    assert len(loads) == (len(VARIANTS) if os.environ["RANK"] == "0" else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
