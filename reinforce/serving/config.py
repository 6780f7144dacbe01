"""The flags of serve_rm.py."""

import datetime
import math
import re
from dataclasses import dataclass
from pathlib import Path

from reinforce.errors import ConfigError
from reinforce.flags import flag, refuse, spelled

DAY = "2024-07-26"  # the day that a chat template prints: no reward changes at midnight


@dataclass(frozen=True)
class ServeConfig:
    """Every flag of serve_rm.py."""

    reward_model: str | None = flag(
        None, "reward", "sequence classifier with one label: folder or hub id (default: the toy's)"
    )
    reward_fn: str | None = flag(
        None,
        "reward",
        "serve a function instead: FILE.py:NAME, called as f(prompts=, completions=, labels=)",
    )
    reward_mean: float | None = flag(
        None, "reward", "subtracted from the score (default: as stored with the model, else 0)"
    )
    reward_std: float | None = flag(
        None,
        "reward",
        "the score is then divided by it (default: as stored with the model, else 1)",
    )
    reward_clip: float | None = flag(None, "reward", "clip the reward to +- this")
    max_length: int | None = flag(
        None,
        "reward",
        "longest text, tokens; of longer ones the beginning is cut (default: the model's)",
    )
    date: str = flag(
        DAY,
        "reward",
        "the day, YYYY-MM-DD, for chat templates that print one; part of the fingerprint",
    )
    inference_micro_batch_size: int = flag(
        32,
        "reward",
        "texts of one forward pass of a copy of the model; "
        "1: a reward depends on its text alone, bitwise",
    )

    host: str = flag(
        "127.0.0.1",
        "server",
        "address to listen on; any but loopback needs RM_TOKEN or RM_TOKEN_FILE",
    )
    port: int = flag(0, "server", "port; 0: any free one")
    ready_file: str | None = flag(None, "server", "write host and port there once warm")
    exit_with_parent: bool = flag(False, "server", "end when the process that started it has ended")

    data_parallel: bool = flag(
        False,
        "hardware",
        "under torchrun: a copy of the model on each process, which scores its part of a batch",
    )
    tensor_model_parallel_size: int = flag(
        1,
        "hardware",
        "under torchrun: split each copy of the reward model over this many processes",
    )
    device: str = flag(
        "auto",
        "hardware",
        "where to compute: auto, cpu, cuda, or a GPU by its number, cuda:1 say, that the actor on "
        "this machine does not use",
    )
    precision: str = flag(
        "auto", "hardware", "of the reward model", choices=("auto", "fp32", "bf16")
    )

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        if self.reward_model is not None and self.reward_fn is not None:
            raise ConfigError("--reward-model and --reward-fn: give one of them")
        positive = ("reward_std", "reward_clip", "max_length", "inference_micro_batch_size")
        refuse(self, positive=(*positive, "tensor_model_parallel_size"))
        if self.reward_fn is not None:
            self._refuse_of_models()
        if self.ready_file is not None and not Path(self.ready_file).parent.is_dir():
            raise ConfigError(f"--ready-file {self.ready_file}: its folder is not there")
        if self.reward_mean is not None and not math.isfinite(self.reward_mean):
            raise ConfigError(f"--reward-mean is {self.reward_mean}; it must be a finite number")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError as error:
            raise ConfigError(f"--date is {self.date!r}; it must be a day, YYYY-MM-DD") from error
        if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"--device is {self.device!r}; it must be auto, cpu, cuda or cuda:N")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is {self.port}; it must be in 0 to 65535")

    def _refuse_of_models(self) -> None:
        """Raise ConfigError on a flag that a function has no use for."""
        default = ServeConfig()
        for name in ("max_length", "date", "device", "precision"):
            if getattr(self, name) != getattr(default, name):
                raise ConfigError(
                    f"{spelled(name)} is of --reward-model: a function reads whole texts, and "
                    "computes where and how it likes; leave it out"
                )

    def check_processes(self, processes: int) -> None:
        """Raise ConfigError unless the flags say what each process that torchrun starts is for."""
        size = self.tensor_model_parallel_size
        parallel = self.data_parallel or size > 1
        if self.reward_fn is not None and (parallel or processes > 1):
            raise ConfigError(
                "--reward-fn: a function runs in one process; leave out torchrun, --data-parallel "
                "and --tensor-model-parallel-size"
            )
        if processes % size:
            raise ConfigError(
                f"--tensor-model-parallel-size {size} does not divide the number of processes, "
                f"{processes}: start them with torchrun --nproc-per-node {size}, or a multiple"
            )
        if processes > 1 and ":" in self.device:
            raise ConfigError(
                f"--device {self.device}: torchrun started {processes} processes, and each has a "
                "GPU of its own; give --device cuda"
            )
        if processes > size and not self.data_parallel:
            raise ConfigError(
                f"torchrun started {processes} processes: add --data-parallel, or "
                f"--tensor-model-parallel-size {processes}"
            )
