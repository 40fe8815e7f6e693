"""Keys and values in buffers of fixed size: a decode step writes its own rows and moves nothing else."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _HeldLayer(CacheLayerMixin):
    """One layer's buffers [B, Hkv, C, D], of which the first tokens are filled; new ones are written behind.

    Functional, unless `in_place`: `update` gives new tensors, which a runtime may keep in the place of the
    old ones.
    """

    is_compileable = True  # the mask is made for the whole buffer
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, in_place: bool) -> None:
        super().__init__()
        self.keys, self.values, self._positions = keys, values, positions
        self._write = Tensor.index_copy_ if in_place else Tensor.index_copy
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are given."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys = self._write(self.keys, 2, self._positions, key_states)
        self.values = self._write(self.values, 2, self._positions, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> Tensor:  # type: ignore[override]
        return self._positions[0]

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


def held_cache(past: list[Tensor], positions: Tensor, *, in_place: bool = False) -> Cache:
    """The cache over buffers (key and value [B, Hkv, C, D] of each layer); positions: int64 [S], where the
    tokens of this call stand, the first of them after all that is held. in_place: the buffers themselves are
    written."""
    pairs = zip(past[0::2], past[1::2], strict=True)
    return Cache(layers=[_HeldLayer(key, value, positions, in_place) for key, value in pairs])
