"""Idle tensors wait in the host's memory: a frozen model, and AdamW's two averages.

    frozen model   stays on the host for good; has a copy on the device from `fetch` to `drop`
    AdamW          one parameter after the other: its averages come, it is updated, they go back

The device computes what it would compute without either, so no bit of a run changes. Host memory is
pinned, and all copies are in the device's current stream: they run in the order of the computation,
without a second stream. Under FSDP PyTorch's CPUOffloadPolicy does both jobs instead
(`distributed.wrap`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reinforce.run import distributed
from reinforce.run.config import TrainConfig

AVERAGES = ("exp_avg", "exp_avg_sq")


class Moves:
    """The copies between the host and a GPU."""

    def __init__(self, device: torch.device) -> None:
        """`device` is the GPU."""
        self.device = device

    def to_device(self, host: Tensor) -> Tensor:
        """A copy on the device."""
        return host.to(self.device, non_blocking=True)

    def new_host(self, like: Tensor) -> Tensor:
        """Pinned memory for a tensor of this shape and type."""
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def to_host(self, tensor: Tensor, host: Tensor) -> None:
        """Copy a tensor of the device to its memory on the host."""
        host.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Return when the host may read what was copied to it."""
        torch.cuda.synchronize(self.device)


class Idle:
    """A frozen model that is on the device from `fetch` to `drop`; without a model both do nothing.

    Nothing is copied on the way back: the host has the same weights all the time.
    """

    def __init__(self, model: nn.Module | None = None, moves: Moves | None = None) -> None:
        """The model leaves the device at once."""
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        self._moves, self._pairs, self._fetched = moves, list[tuple[Tensor, Tensor]](), False
        if moves is not None:
            for tensor in tensors:
                host = moves.new_host(tensor)
                moves.to_host(tensor.data, host)
                self._pairs.append((tensor, host))
        self._point_to_host()

    def fetch(self) -> None:
        """Bring the model to the device, unless it is there."""
        if self._moves is not None and not self._fetched:
            for tensor, host in self._pairs:
                tensor.data = self._moves.to_device(host)
            self._fetched = True

    def drop(self) -> None:
        """Free the model's copy on the device."""
        if self._fetched:
            self._point_to_host()
            self._fetched = False

    def _point_to_host(self) -> None:
        for tensor, host in self._pairs:
            tensor.data = host


class HostAdamW(torch.optim.AdamW):
    """AdamW with the averages of one parameter at a time on the device, bitwise the same."""

    def __init__(self, params: Iterable[Any], moves: Moves, **options: Any) -> None:
        """`options` are those of AdamW."""
        super().__init__(params, **options)
        self._moves = moves
        self._hosts: dict[Tensor, dict[str, Tensor]] = {}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.update({k: self._moves.to_device(state[k]) for k in AVERAGES if k in state})
                self.param_groups = [{**group, "params": [parameter]}]
                super().step()
                self._send_back(parameter)
        self.param_groups = groups
        self._moves.wait()

    def park(self, parameter: Tensor) -> None:
        """Send averages that were restored from a checkpoint to the host."""
        self._send_back(parameter)
        self._moves.wait()

    def _send_back(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if parameter not in self._hosts:
            self._hosts[parameter] = {key: self._moves.new_host(state[key]) for key in AVERAGES}
        for key, host in self._hosts[parameter].items():
            self._moves.to_host(state[key], host)
            state[key] = host


@dataclass(frozen=True)
class Chosen:
    """What waits on the host in this run."""

    reference: bool
    optimizer: bool


def chosen(config: TrainConfig, device: torch.device) -> Chosen:
    """What the flags ask for; nothing on a CPU, where rank 0 says so."""
    given = {"--offload-reference": config.offload_reference}
    given["--offload-optimizer"] = config.offload_optimizer
    flags = " and ".join(flag for flag, is_given in given.items() if is_given)
    if flags and device.type == "cpu":
        if distributed.rank() == 0:
            print(f"{flags}: nothing to move, this run computes on the CPU")
        return Chosen(False, False)
    return Chosen(config.offload_reference, config.offload_optimizer)


def idle(model: nn.Module | None, device: torch.device, wanted: bool) -> Idle:
    """The model as one that waits on the host, if that is wanted."""
    return Idle(model, Moves(device)) if wanted else Idle()


def adamw(device: torch.device, wanted: bool) -> Callable[..., torch.optim.AdamW]:
    """AdamW, with averages that wait on the host if that is wanted."""
    return partial(HostAdamW, moves=Moves(device)) if wanted else torch.optim.AdamW


def park(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Send a parameter's restored averages to the host, if that is where they wait."""
    if isinstance(optimizer, HostAdamW):
        optimizer.park(parameter)
