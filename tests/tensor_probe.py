"""One process of a tensor parallel test: torchrun --nproc-per-node N tensor_probe.py FOLDER. As split_probe.py."""

import sys
from pathlib import Path

import split_probe

SIZE = {"tensor_model_parallel_size": 2}
VARIANTS = {
    "ddp": SIZE, "ddp, micro-batch 1": {**SIZE, "micro_batch_size": 1, "rollout_micro_batch_size": 2},
    "ddp, gradient checkpointing": {**SIZE, "gradient_checkpointing": True, "micro_batch_size": 3},
    "ddp, bf16": {**SIZE, "precision": "bf16", "initial_policy_kl_penalty": 0.1},
    "fsdp": {**SIZE, "parallel": "fsdp"},
    "fsdp, gradient checkpointing": {**SIZE, "parallel": "fsdp", "gradient_checkpointing": True, "micro_batch_size": 3},
    "fsdp, bf16": {**SIZE, "parallel": "fsdp", "precision": "bf16", "initial_policy_kl_penalty": 0.1},
}  # fmt: skip

if __name__ == "__main__":
    split_probe.main(Path(sys.argv[1]), VARIANTS)
