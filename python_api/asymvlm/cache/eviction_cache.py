"""The K/V cache that text eviction works on: allocated once, shared slots, logical and physical length apart."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.cache.anchors import Anchors
from asymvlm.cache.dialogue import Dialogue
from asymvlm.cache.fixed import FixedTable
from asymvlm.cache.growing import GrowingTable
from asymvlm.cache.layers import SlotLayer
from asymvlm.cache.limited import LimitedTable
from asymvlm.cache.table import Table
from asymvlm.hf.caches import Cache, is_full, is_known_layer, is_sliding, stock_layers
from asymvlm.hf.masks import CHUNKED
from asymvlm.hf.windows import sliding_window


@dataclass(frozen=True)
class CacheStats:
    """What an `EvictionCache` holds now. Lists have one entry a row.

    ``logical`` counts the tokens seen, ``physical`` the slots that a step reads; ``capacity`` slots are allocated.
    Where layers or heads hold different numbers of tokens, counts are those of the one with the most.
    ``nbytes`` are the bytes of all tensors the cache keeps alive, ``kv_bytes`` those of K and V in them. Of the
    full-attention layers' K and V, ``used_bytes`` are those of the slots that a step reads, layer by layer, and
    ``token_bytes`` those of the tokens alone, without padding and without slots that only other rows or heads use.
    """

    logical: int
    physical: int
    capacity: int
    held: list[int]  # generated tokens in the cache
    evicted: list[int]
    nbytes: int
    kv_bytes: int
    used_bytes: int
    tokens: list[int]  # in the cache, those of the prompt included, padding not
    token_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class EvictionCache(Cache):
    """A transformers cache for `TextEviction`, `TurnEviction` and `CacheLimit`.

    `asymvlm.patch` makes one where none is given.

    Full-attention layers keep K and V in slots. Layers that hold the same tokens are a group with one table of slots:
    all of them by default, or each layer a group of its own, whose heads may differ too (``scope``). Sliding-window and
    recurrent layers are transformers' own. ``get_seq_length()`` is logical: it counts evicted tokens. Without a patched
    model it is a cache that allocates ahead and never evicts. Beams reorder it; it cannot be cropped, so assisted
    decoding refuses it.

    Args:
        config: the model's configuration, or its decoder's.
        capacity: slots to allocate. None grows in chunks; a static cache needs it.
        static: fixed shapes and no state on the host, for compiled decoding.
        max_length: columns a static cache will ever see, for its sliding-window layers; None means ``capacity``.
        scope: who holds other tokens than the rest: nobody (``"decoder"``), each ``"layer"``, or each K/V ``"head"``.
        sinks: tokens of a prompt that always stay, the first ones; None means all.
        limited: for `CacheLimit`.
    Raises:
        ValueError: if the decoder has no full-attention layer, or a static cache no capacity.
        NotImplementedError: for layers of a kind that eviction does not know, or a static cache of another scope or
            with a limit.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int | None = None,
        static: bool = False,
        max_length: int | None = None,
        scope: str = "decoder",
        sinks: int | None = None,
        limited: bool = False,
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        if static and capacity is None:
            raise ValueError("a static cache needs its capacity, the slots to allocate, got None")
        if static and scope != "decoder":
            raise NotImplementedError(
                f"a static cache holds the same tokens in every layer, got scope {scope!r}: "
                "TextEviction(scope='decoder') and TextEviction.paper make one choice for all layers"
            )
        if static and limited:
            raise NotImplementedError("a limit of the whole cache needs a cache that grows, got a static one")
        groups = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
        heads = groups if scope == "head" else 1
        make = FixedTable if static else LimitedTable if limited else GrowingTable
        stock = stock_layers(text_config, (max_length or capacity) if static else None)
        if CHUNKED in (getattr(text_config, "layer_types", None) or ()):
            raise NotImplementedError(f"text eviction does not know the {CHUNKED!r} of {text_config.model_type!r}")
        bounded = sliding_window(text_config) is not None  # else a "sliding" layer never drops a token
        layers: list[Any] = []
        self.tables: list[Table] = []  # one for each group of layers
        for layer in stock:
            if is_full(layer) or (is_sliding(layer) and not bounded):
                first = not self.tables or scope != "decoder"
                if first:
                    self.tables.append(make(capacity, heads))  # type: ignore[arg-type]
                    self.tables[-1].layer = len(layers)
                layers.append(SlotLayer(self.tables[-1], first))
            elif is_known_layer(layer):
                layers.append(layer)
            else:
                raise NotImplementedError(f"text eviction does not know cache layers like {type(layer).__name__}")
        self.slot_layers: list[SlotLayer] = [layer for layer in layers if isinstance(layer, SlotLayer)]
        if not self.slot_layers:
            raise ValueError(
                f"text eviction needs a full-attention layer, got a {text_config.model_type!r} decoder without one"
            )
        for table in self.tables:
            table.sinks = sinks
            table.storages = functools.partial(self._storages, table)
        self.dialogue = Dialogue()
        self.scope = scope
        self.limited = limited
        self.evicts = True  # False where a call chose not to
        self.room: int | None = None  # most tokens that the call still generates, if it says so
        self.anchors: Anchors | None = None  # of protected tokens that have moved
        self.has_limits = False  # each line was told its limit
        self.in_prompt = False  # a prompt is fed in parts, and more of it is to come
        self.added_up = 0  # columns whose attention was added up
        self.behind_vision: torch.Tensor | None = None  # (B, columns) bool, while a call is in hand that tells
        self.samples: torch.Tensor | None = None  # (B,) int64: a number of each row's prompt, for methods that ask
        super().__init__(layers=layers)

    @property
    def table(self) -> Table:
        """Of the first group of layers, the only one unless layers hold different tokens."""
        return self.tables[0]

    @property
    def is_static(self) -> bool:
        return self.table.static

    @property
    def is_split(self) -> bool:
        """Whether layers or heads hold different tokens, so that each layer needs a mask of its own."""
        return len(self.tables) > 1 or self.table.heads > 1

    def begin(self, rows: int, queries: int, device: torch.device, real: torch.Tensor | None) -> None:
        """Give the tokens of a step their slots in every group of layers; arguments as of `Table.begin`."""
        for table in self.tables:
            table.begin(rows, queries, device, real)

    def hide(self, mask: torch.Tensor) -> None:
        """Tokens that the caller now masks are padding from here on. ``mask`` ``(B, columns)`` bool."""
        for table in self.tables:
            table.hide(mask)

    def evict_columns(self, drop: torch.Tensor) -> None:
        """Free the slots of given columns in every layer, ``drop`` ``(B, columns)`` bool."""
        for table in self.tables:
            table.evict_columns(drop)

    def tell_apart(self, embeds: torch.Tensor, real: torch.Tensor | None) -> None:
        """Mix the merged embeddings of a prompt ``(B, S, D)`` into the rows' numbers: images differ, ids may not.

        What is mixed is rounded far more coarsely than two batches differ.
        """
        sizes = embeds.detach().double().abs().mean(-1)
        weights = torch.ones_like(sizes) if real is None else real.to(sizes)
        level = ((sizes * weights).sum(1) / weights.sum(1).clamp_min(1)).log2().nan_to_num(0, 0, 0) * 1000
        mine = level.round().long().cpu() * 0x27D4EB2F
        self.samples = mine if self.samples is None else self.samples + mine

    def counters(self) -> dict[str, Any]:
        """Lengths, and tokens held and evicted by row, of the layer and head with the most."""
        found = [table.counters() for table in self.tables]
        counts = {name: [max(row) for row in zip(*(one[name] for one in found))] for name in ("held", "evicted")}
        return {**found[0], "physical": max(one["physical"] for one in found), **counts}

    @property
    def full_index(self) -> int:
        """The first full-attention layer, which masks are sized by."""
        return next(index for index, layer in enumerate(self.layers) if isinstance(layer, SlotLayer))

    @property
    def sliding_index(self) -> int | None:
        """The first sliding-window layer."""
        return self.is_sliding.index(True) if True in self.is_sliding else None

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where the step's first token stands for a mask: by slot in full-attention layers, by column elsewhere."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, SlotLayer):
            return super().get_query_offset(layer_idx)
        return layer.table.offset

    def end_call(self) -> None:
        """Forget what only the call of `generate` that is over had said about its prompt."""
        for table in self.tables:
            table.forget_call()
        self.dialogue.vision = self.dialogue.merged = None
        self.in_prompt = False

    def reset(self) -> None:
        for table in self.tables:
            table.reset()
        self.dialogue, self.samples = Dialogue(), None
        self.has_limits, self.in_prompt, self.added_up, self.anchors = False, False, 0, None
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._pick_rows(beam_idx)
        for layer in self._stock_layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.table.rows, device=self._device)
        self._pick_rows(rows.repeat_interleave(repeats))
        for layer in self._stock_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._pick_rows(indices)
        for layer in self._stock_layers():
            layer.batch_select_indices(indices)

    def _pick_rows(self, rows: torch.Tensor) -> None:
        if self.table.rows:
            for table in self.tables:
                table.pick_rows(rows)
            for layer in self.slot_layers:
                layer.pick_rows(rows)
            if self.anchors is not None:
                self.anchors.pick_rows(rows)
            self.samples = None if self.samples is None else self.samples[rows.to(self.samples.device)]

    def shrink(self, table: LimitedTable, capacity: int) -> None:
        """Give back the slots of a group of layers beyond ``capacity``."""
        table.shrink(capacity)
        for layer in self.slot_layers:
            if layer.table is table:
                layer.shrink()

    def stats(self) -> CacheStats:
        """Counts and bytes, measured on the tensors. Of a static cache this copies counts to the host."""
        counters = self.counters()
        kv = [tensor for layer in self.layers for tensor in _held(layer)]
        others = [tensor for table in self.tables for tensor in table.tensors()] + self.dialogue.tensors()
        others += [] if self.anchors is None else self.anchors.tensors()
        used_bytes = token_bytes = 0
        tokens: list[list[int]] = []
        for table in self.tables:
            slot = sum(
                tensor.nbytes // tensor.shape[2] for layer in self.slot_layers if layer.table is table
                for tensor in (layer.keys, layer.values) if tensor is not None
            )  # fmt: skip
            held = table.tokens_by_line()
            used_bytes += slot * table.counters()["physical"]
            token_bytes += slot * sum(held) // max(len(held), 1)
            tokens.append([max(held[i : i + table.heads]) for i in range(0, len(held), table.heads)])
        return CacheStats(
            **counters,
            capacity=max(table.capacity if table.rows else 0 for table in self.tables),
            nbytes=_storage_bytes([*kv, *others]),
            kv_bytes=_storage_bytes(kv),
            used_bytes=used_bytes,
            tokens=[max(row) for row in zip(*tokens)],
            token_bytes=token_bytes,
        )

    @property
    def _device(self) -> torch.device:
        return self.table.slot_pos.device

    def _stock_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, SlotLayer)]

    def _storages(self, table: Table) -> list[torch.Tensor]:
        return [tensor for layer in self.slot_layers if layer.table is table for tensor in layer.storages()]


def _held(layer: Any) -> list[torch.Tensor]:
    """K and V of a layer, or the states of a recurrent one."""
    states = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        found = getattr(layer, name, None)
        states += list(found.values()) if isinstance(found, dict) else [found]
    return [state for state in states if isinstance(state, torch.Tensor)]


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes kept alive: a view counts as what it is a view of, and nothing counts twice."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


__all__ = ["CacheStats", "EvictionCache"]
