"""The two passes of a frozen model that training compares: as it is, and under a bias on its vision keys."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from asymvlm.hf.arguments import ABOUT_CACHE, EMBEDS, MASK, USE_CACHE, Callee
from asymvlm.hf.decoder import decoder_of
from asymvlm.hf.key_bias import INJECTIONS, KeyBias, biased, causal, own_attention
from asymvlm.hf.merge import merge_embeddings
from asymvlm.models import adapter_for
from asymvlm.models.adapter import Adapter
from asymvlm.tokens.images import image_layout, known_cells
from asymvlm.tokens.positions import original_positions
from asymvlm.tokens.roles import Tokens, check_prompt, scored_text
from asymvlm.tokens.user_turns import UserTurns

NOT_FOR_THE_PASS = (*ABOUT_CACHE, EMBEDS, MASK, "return_dict")
OUR_INPUTS = ("text_mask",)


@dataclass(frozen=True, eq=False)
class MergedBatch:
    """A batch just before decoder layer 0."""

    embeds: torch.Tensor  # (B, S, D)
    prunable: torch.Tensor  # (B, S) bool: vision tokens that may be dropped
    text: torch.Tensor  # (B, S) bool: tokens that vision is scored against; no answer token
    compared: torch.Tensor  # (B, S) bool: positions whose last hidden states are compared
    trainable: torch.Tensor  # (B,) bool: rows with vision to prune and text to score it against
    positions: torch.Tensor  # (B, S), or (R, B, S) for M-RoPE
    decoder: dict[str, Any]  # the decoder's other arguments
    make_lines: Callable[[], torch.Tensor] = field(repr=False)

    @property
    def lines(self) -> torch.Tensor:
        """``(B, S)`` int64: the line of an image that a vision token lies on, as `asymvlm_kernels.Spread` takes them.

        Raises:
            ValueError: for a family whose grids are not known.
        """
        return self.make_lines()


class FrozenModel:
    """A model whose parameters ask for no gradient, to be run twice on the same batch.

    Everything it changes on the model it changes inside `frozen`, and takes back.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        injection: str = "auto",
        checkpointing: bool = False,
        turns: UserTurns | None = None,
    ) -> None:
        self.model = model
        self.turns = turns  # None: vision is scored against all text
        self.adapter: Adapter = adapter_for(model)
        self.text = self.adapter.text_of(model)  # what is called
        self.callee = Callee.of(type(self.text).forward)
        self.decoder = decoder_of(model)  # the same module in most families
        self.checkpointing = checkpointing
        if injection == "auto":
            injection = "bias" if self.device.type == "cuda" else "mask"  # S x S numbers a layer are cheap on a CPU
        if injection not in INJECTIONS:
            raise ValueError(f"injection must be 'auto', {' or '.join(map(repr, INJECTIONS))}, got {injection!r}")
        self.injection = injection

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        config: Any = self.model.config
        return int(config.get_text_config().hidden_size)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter asks for a gradient, dropout is off, the decoder attends by our function; all of it undone."""
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        training = [module for module in self.model.modules() if module.training]
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            for module in training:
                module.training = False
            with own_attention(self.decoder), self._checkpointed():
                yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    def merge(self, inputs: Mapping[str, Any]) -> MergedBatch:
        """Vision tower, projector and embeddings of a batch, and the role of each of its tokens.

        ``inputs`` are the model's, as its processor returns them. Tokens with a label (not -100) are the answer: they
        are compared, and never scored against. ``text_mask`` ``(B, S)`` bool narrows the text that is scored against.
        """
        moved = {name: self._move(value) for name, value in inputs.items()}
        extra = {name: moved.pop(name) for name in OUR_INPUTS if name in moved}
        input_ids, mask = check_prompt(moved)
        record = merge_embeddings(self.model, self.adapter, moved)
        embeds = record[EMBEDS].detach()
        tokens = Tokens.read(self.model, self.adapter, input_ids, mask, moved, embeds)
        prunable = tokens.prunable
        text = scored_text(tokens, self.turns or "all", moved.get("labels"), turn_wanted=False)
        if extra.get("text_mask") is not None:
            text = text & extra["text_mask"].bool()
        compared = tokens.text
        if not self.adapter.open_prompt:  # what stands before an image does not see it
            compared = compared & ~tokens.before_vision
        compared = torch.where(compared.any(-1, keepdim=True), compared, tokens.last)
        decoder = {name: value for name, value in record.items() if name not in NOT_FOR_THE_PASS}
        # always a mask: without one, gapped positions are read as packed sequences
        own = record.get(MASK)
        decoder[MASK] = mask if own is None or getattr(own, "ndim", 0) == 2 else own

        def lines() -> torch.Tensor:
            layout = image_layout(self.model, self.adapter, tokens, moved)
            return known_cells(layout, self.adapter.model_type).line

        trainable = prunable.any(-1) & text.any(-1)
        positions = original_positions(self.adapter, moved, record, mask, generating=False, start=None)
        return MergedBatch(embeds, prunable, text, compared, trainable, positions, decoder, lines)

    def hidden(self, batch: MergedBatch, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states, after the final norm, of the compared positions: ``(positions, D)`` fp32.

        ``bias`` is ``(B, S)`` fp32; None means zeros, which leaves the model's own output. Differentiable in ``bias``.
        """
        zeros = torch.zeros(batch.prunable.shape, device=batch.embeds.device)
        key_bias = KeyBias(zeros if bias is None else bias, self.injection)
        mask = batch.decoder[MASK]
        if isinstance(mask, dict):
            mask = {kind: self._join(key_bias, own, batch) for kind, own in mask.items()}
        elif mask.ndim == 4:
            mask = self._join(key_bias, mask, batch)
        with biased(key_bias):
            arguments = {**batch.decoder, EMBEDS: batch.embeds, MASK: mask, USE_CACHE: False}
            output = self.text(**self.callee.write(arguments))
        hidden: torch.Tensor = output.last_hidden_state[batch.compared]
        return hidden.to(exact_type(hidden))

    @staticmethod
    def _join(key_bias: KeyBias, mask: torch.Tensor | None, batch: MergedBatch) -> torch.Tensor:
        """A mask that the composite made, with the bias on top. None is a causal one without padding."""
        B, S, _ = batch.embeds.shape
        if mask is None:
            mask = causal(S, batch.embeds.device).expand(B, 1, S, S)
        return key_bias.join(mask.expand(B, -1, -1, -1), batch.embeds.dtype)

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Layers keep their inputs only and run again in the backward pass."""
        if not self.checkpointing:
            yield
            return
        layers = list(cast("Any", self.decoder).layers)
        before = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.__dict__["forward"] = functools.partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = forward

    def _move(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = getattr(self.model, "dtype", None) if value.is_floating_point() else None
        return value.to(self.device, dtype)


def exact_type(tensor: torch.Tensor) -> torch.dtype:
    """Scores and losses are fp32; float64 for a float64 model."""
    return torch.promote_types(tensor.dtype, torch.float32)
