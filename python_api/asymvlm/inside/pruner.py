"""Drops vision tokens between layers while a prompt is prefilled, and gives later steps the masks that fit.

layer      0 ... K-1 | K ... L-1
prefill    S tokens  | S' tokens, at their original positions
K/V cache  S + t     | S' + t columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from asymvlm.hf import attention as capture
from asymvlm.hf.arguments import CACHE, past_length, tokens_of
from asymvlm.hf.context import Frame, innermost, pop, push
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.layers import LayerDoors
from asymvlm.hf.masks import attention_form
from asymvlm.hf.pruned_cache import hold
from asymvlm.hf.windows import sliding_window
from asymvlm.inside.state import InsideState, inside_state
from asymvlm.methods.inside.base import InsideMethod, LayerTokens
from asymvlm.models.adapter import Adapter, Grid
from asymvlm.prompt.selection import Selection
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.images import has_several, image_layout, read_images
from asymvlm.tokens.roles import Tokens, check_prompt
from asymvlm_kernels import PrunedSequence, gather_rows, prune_sequence
from asymvlm_kernels.prefill.reference import compact

MECHANISM = "pruning between layers"


@dataclass(eq=False, kw_only=True)
class Prefill(Frame):
    """A prompt on its way through the decoder."""

    policy: VisionPruning
    whole: Tokens  # of all columns
    tokens: Tokens  # of those that are left
    index: torch.Tensor  # (B, S') int64: their columns, -1 = padding
    images: torch.Tensor | None  # (B, S) image number, where a row has several
    grids: list[list[Grid]] | None = None  # of each row's images
    stages: dict[int, torch.Tensor] = field(default_factory=dict)  # first layer -> (B, S') real
    mask: Any = None  # of the layers of the stage, in the form of the decoder's attention
    block: torch.Tensor | None = None  # (B, 1, S', S') bool: what may see what, as far as the model's own mask says
    first: PrunedSequence | None = None  # what the first dropping decided


class InsidePruner:
    """What one decoder does around its layers for a method inside it."""

    def __init__(self, model: nn.Module, adapter: Adapter, decoder: nn.Module, method: InsideMethod) -> None:
        config: Any = model.config
        self.config, self.model, self.adapter, self.method = config.get_text_config(), model, adapter, method
        layers = cast("Any", decoder).layers
        stages = method.layers
        if not stages or list(stages) != sorted({*stages}) or not 0 < stages[0] <= stages[-1] < len(layers):
            raise ValueError(f"layers of a method must ascend within 1 .. {len(layers) - 1}, got {stages}")
        for reason, found in (
            ("sliding windows", sliding_window(self.config) is not None),
            ("recurrent layers", adapter.recurrent),
            ("features added behind its first layers", adapter.deepstack),
            ("prompts that attend both ways", adapter.open_prompt),
            ("a decoder that merges images itself", adapter.merge is not None),
            ("rows of its own for each layer", bool(adapter.decoder_rows)),
        ):
            if found:
                raise NotImplementedError(f"methods inside the decoder do not know {adapter.model_type}: {reason}")
        attention = capture.attention_modules(decoder)
        self._scored = {number - 1: attention[number - 1] for number in stages}
        self._doors = LayerDoors(layers, range(stages[0], len(layers)), self._enter_layer)
        capture.install(self._scored)

    def remove(self) -> None:
        self._doors.remove()
        capture.remove(self._scored)

    def before_decoder(self, policy: VisionPruning, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """The decoder begins the whole prompt of a call. ``inputs`` of the model, ``arguments`` of its decoder.

        Raises:
            NotImplementedError: for a prompt in chunks, and for static caches.
        """
        ids, mask = check_prompt(inputs)
        embeds, cache = tokens_of(arguments), arguments.get(CACHE)
        if embeds.shape[1] != ids.shape[1] or past_length(cache) or getattr(cache, "is_compileable", False):
            raise NotImplementedError(
                "methods inside the decoder need the whole prompt in one step on a cache that grows, got "
                f"{embeds.shape[1]} of {ids.shape[1]} columns on a {type(cache).__name__}"
            )
        repeats = len(embeds) // len(ids)
        if repeats > 1:
            raise NotImplementedError("methods inside the decoder do not work with beams or several sequences")
        tokens = Tokens.read(self.model, self.adapter, ids, mask, inputs, embeds)
        images, grids = read_images(image_layout(self.model, self.adapter, tokens, inputs), self.adapter.views)
        several = policy.per_image or has_several(grids, self.adapter.views)
        index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        prefill = Prefill(
            policy=policy,
            whole=tokens,
            tokens=tokens,
            index=index.masked_fill(~tokens.real, -1),
            images=images if several else None,
            grids=grids,
        )
        push(prefill)
        self._ask(self.method.layers[0], prefill)

    def _ask(self, number: int, prefill: Prefill) -> None:
        """Let the layer in front of ``number`` score."""
        tokens = prefill.tokens
        rows = self.method.rows(tokens) & tokens.real
        most = int(rows.sum(1).max())
        if most == 0:
            raise ValueError(f"the rows of {self.method!r} mark no token of the batch, whose attention is to score")
        queries = compact(rows, most)
        columns = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).expand(rows.shape)
        lying = capture.Places(columns.masked_fill(~tokens.real, -2).contiguous(), queries[:, 0], queries=queries)
        capture.wanted.set(capture.Step(places={number - 1: lying}))

    def abandon(self, prefill: Prefill) -> None:
        """An exception is on its way."""
        capture.wanted.set(None)
        pop(prefill)

    def after_decoder(self, prefill: Prefill, cache: Any) -> Selection:
        """The prompt is through, ``cache`` holds it, if there is one."""
        self.abandon(prefill)
        first, whole = prefill.first, prefill.whole
        if first is None or [*prefill.stages] != [*self.method.layers]:
            raise MechanismError(MECHANISM, f"tokens went before layers {[*prefill.stages]}, not {self.method.layers}")
        if cache is not None:
            shortest = min(real.shape[1] for real in prefill.stages.values())
            hold(cache, InsideState(prefill.whole.ids.shape[1], shortest, dict(prefill.stages)))
        return Selection(
            lengths_before=whole.real.sum(-1),
            lengths_after=prefill.tokens.real.sum(-1),
            num_vision=whole.prunable.sum(-1),
            counts=prefill.tokens.prunable.sum(-1).to(torch.int32),
            gaps=first.gap,
            scores=first.scores,
            index=prefill.index,
            has_text=torch.ones_like(whole.real[:, 0]),
            columns_before=whole.ids.shape[1],
            image_grids=prefill.grids,
        )

    # -- layers ------------------------------------------------------------------------------------------------------

    def _enter_layer(
        self, number: int, hidden: torch.Tensor, mask: Any
    ) -> tuple[torch.Tensor, Any, torch.Tensor | None] | None:
        prefill = innermost(Prefill)
        if prefill is not None:
            if number in self.method.layers:
                hidden = self._drop(number, hidden, mask, prefill)
            return hidden, prefill.mask, prefill.index.clamp_min(0)
        later = innermost(Later)
        first = None if later is None else later.state.stage(number)
        if later is None or first is None:
            return None
        if first not in later.masks:  # layers of a stage share it
            later.masks[first] = self._later_mask(hidden, mask, later.state.real[first], later)
        return hidden, later.masks[first], None

    def _drop(self, number: int, hidden: torch.Tensor, mask: Any, prefill: Prefill) -> torch.Tensor:
        step = capture.wanted.get()
        if step is None:
            raise MechanismError(MECHANISM, f"nothing was asked of layer {number - 1}")
        attention = step.mean().to(hidden.device)
        tokens = prefill.tokens
        scores = self.method.scores(LayerTokens(tokens, hidden.detach(), attention, number))
        rows = hidden.float() if hidden.dtype == torch.float64 else hidden
        roles = {"ids": tokens.ids, "vision": tokens.vision, "separators": tokens.separators}
        pruned = prune_sequence(
            rows.detach(),
            tokens.vision,
            tokens.text,
            scores=scores,
            budget=prefill.policy.budget,
            protect=tokens.text | tokens.structural,
            groups=None if prefill.images is None else gather_rows(prefill.images, prefill.index, pad=-1),
            per_image=prefill.policy.per_image,
            carry={**roles, "columns": prefill.index},
            carry_pad={"columns": -1},
        )
        if prefill.first is None:
            prefill.first = pruned
        if prefill.block is None:
            prefill.block = self._block(mask, tokens.ids.shape, hidden.device)
        chosen, real = pruned.index.clamp_min(0), pruned.index >= 0
        prefill.block = _picked(prefill.block, chosen)
        prefill.tokens = Tokens(pruned.carry["ids"], real, pruned.carry["vision"] & real, pruned.carry["separators"])
        prefill.index = pruned.carry["columns"].masked_fill(~real, -1)
        prefill.stages[number] = real
        kept = gather_rows(hidden, pruned.index)
        prefill.mask = self._mask(kept, prefill.block, real)
        following = [later for later in self.method.layers if later > number]
        if following:
            self._ask(following[0], prefill)
        return kept

    @staticmethod
    def _block(mask: Any, shape: Any, device: torch.device) -> torch.Tensor:
        """``(B, 1, S, S)`` bool: what may see what, by the model's own mask; a causal one where it made none."""
        rows, columns = shape
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            found = mask if mask.dtype == torch.bool else mask == 0
            return found[..., -columns:].expand(rows, -1, -1, -1)
        return torch.ones((columns, columns), dtype=torch.bool, device=device).tril().expand(rows, 1, -1, -1)

    def _mask(self, hidden: torch.Tensor, block: torch.Tensor, real: torch.Tensor) -> Any:
        if self._is_flash:
            return None if bool(real.all()) else real
        own = torch.eye(block.shape[-1], dtype=torch.bool, device=block.device)  # a row that sees nothing would be NaN
        return attention_form(self.config, hidden, (block & real[:, None, None]) | own)

    @property
    def _is_flash(self) -> bool:
        return "flash" in self.config._attn_implementation

    def _later_mask(self, hidden: torch.Tensor, mask: Any, real: torch.Tensor, later: Later) -> Any:
        """Of a step behind the prompt: the kept columns, then what the model's own mask says of the new ones."""
        queries, new = hidden.shape[1], later.columns - later.state.original_length
        real = real.repeat_interleave(len(hidden) // len(real), 0)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return torch.cat([real.to(mask), mask[:, -new:]], 1)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            behind = (mask if mask.dtype == torch.bool else mask == 0)[..., -new:]
        else:
            behind = real.new_ones((queries, new)).tril(new - queries)[None, None]
        if self._is_flash:
            return None if bool(real.all()) else torch.cat([real, real.new_ones((len(real), new))], 1)
        front = real[:, None, None].expand(-1, 1, queries, -1)
        return attention_form(self.config, hidden, torch.cat([front, behind.expand(len(real), -1, -1, -1)], -1))

    # -- steps behind the prompt -------------------------------------------------------------------------------------

    def begin_later(self, arguments: Mapping[str, Any]) -> Later | None:
        """A step on a cache whose prompt was pruned between layers; None for any other."""
        cache = arguments.get(CACHE)
        state = inside_state(cache)
        if state is None:
            return None
        later = Later(state=state, columns=past_length(cache) + tokens_of(arguments).shape[1])
        push(later)
        return later


@dataclass(eq=False, kw_only=True)
class Later(Frame):
    """A step behind such a prompt; ``columns`` are seen by the layers that hold all of it."""

    state: InsideState
    columns: int
    masks: dict[int, Any] = field(default_factory=dict)  # first layer of a stage -> the mask of its layers


def _picked(block: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Rows and columns ``chosen`` ``(B, S')`` of ``(B, 1, S, S)``."""
    rows = chosen[:, None, :, None].expand(-1, -1, -1, block.shape[-1])
    columns = chosen[:, None, None].expand(-1, -1, chosen.shape[1], -1)
    return block.gather(2, rows).gather(3, columns)
