"""The arena that holds all keys and values, and the views through which layers see it.

The whole arena is viewed twice, once as local pages and once as global pages; the page pool decides
which view's page ids are alive where. Inside a page the layers follow each other, then K before V:

    local page    [owning local layer][K, V][16 tokens][G heads][K values]
    global page   [owning global layer][K, V][64 tokens][G heads][K values]
    global page with K = RoPE(w ⊙ V)     [layer][64 tokens][G heads][V | turned part of K]

P pages   B tokens per page   G kv heads   C values per key row   K values per value row
"""

import numpy as np
import torch
from torch import Tensor

from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import AttentionConfig, ModelConfig


class KVCache:
    """Keys and values of every sequence. `caches(layer)` → (k_cache_PBGC, v_cache_PBGK or None)."""

    def __init__(
        self,
        model: ModelConfig,
        layout: KVLayout,
        arena_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_bytes = arena_bytes // layout.sector_bytes * layout.sector_bytes
        self.arena = _allocate(num_bytes, device).view(dtype)
        self._views: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._add_views(model.local_kv_layers, model.local, layout.local_page_size)
        self._add_views(model.global_kv_layers, model.global_, layout.global_page_size)

    def caches(self, kv_layer: int) -> tuple[Tensor, Tensor | None]:
        """Views of a layer that owns KV; None in place of V means it starts each key row."""
        return self._views[kv_layer]

    def _add_views(self, layers: list[int], attention: AttentionConfig, page_size: int) -> None:
        parts = 1 if attention.key_is_value else 2
        width = attention.kv_values_per_token // attention.num_kv_heads // parts
        pages = self.arena.view(-1, len(layers), parts, page_size, attention.num_kv_heads, width)
        for i, layer in enumerate(layers):
            value = None if attention.key_is_value else pages[:, i, 1]
            self._views[layer] = (pages[:, i, 0], value)


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # numpy's zeros are promised by the system, not written: memory is taken page by page as
        # sequences use it, which torch.zeros would do at once.
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
