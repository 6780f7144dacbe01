"""Keys and values of past tokens, in memory that has room for the next ones.

transformers' cache copies all past tokens for each new one, into tensors that are longer by one.
Here a layer's tensors are made ROOM tokens longer at a time, and a new token is written in its
place. They have the type that attention computes in: under autocast, keys that come in float32
would be cast again for each token. Left out: layers that keep anything else than all past keys and
values (a window, a state); they stay transformers' own.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens


def give_room(cache: Any) -> None:
    """Let the cache of a transformers model write new tokens in place, without gradient."""
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = RoomyLayer(layer)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: `keys` and `values` (B, H, L, D) are the start of tensors (B, H, L + room, D)."""

    def __init__(self, layer: DynamicLayer) -> None:
        """Takes over what `layer` holds."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._stores: list[Tensor] = []  # of keys and of values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states (B, H, n, D); return all keys and values."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if not self._stores or self._stores[0].shape[2] < end:
            self._stores = [_with_room(x, end + ROOM) for x in (self.keys, self.values)]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` alone."""
        super().batch_select_indices(indices)
        self._stores = []


def _with_room(x: Tensor, length: int) -> Tensor:
    """x (B, H, L, D) at the start of a tensor (B, H, length, D)."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    store = x.new_empty(*x.shape[:2], length, x.shape[3], dtype=dtype)
    store[:, :, : x.shape[2]] = x
    return store
