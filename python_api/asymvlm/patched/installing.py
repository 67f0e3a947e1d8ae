"""What `PatchHandle` puts on a model, all of it or nothing: the evictor, the pruner between layers, the two doors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from asymvlm.eviction.limit import LimitEvictor
from asymvlm.eviction.text import TextEvictor
from asymvlm.eviction.turns import TurnEvictor
from asymvlm.hf.decoder import decoder_of
from asymvlm.inside.pruner import InsidePruner
from asymvlm.patched.forward import Forwards
from asymvlm.prompt.recall_store import check_family

if TYPE_CHECKING:
    from asymvlm.patched.handle import PatchHandle


def install(handle: PatchHandle) -> tuple[TextEvictor | None, Forwards]:
    """By the handle's settings.

    Raises:
        ValueError: for turns of a model that sees nothing.
        NotImplementedError: for a decoder, or settings, that one of them does not know. The model is as it was.
    """
    model, adapter, vision = handle.model, handle.adapter, handle.vision
    evicts = handle.text is not None or handle.turns is not None or handle.cache is not None
    if vision.inside is not None and (evicts or handle.strategy is not None):
        raise NotImplementedError(f"{vision.method!r} works inside the decoder, not beside text eviction")
    if handle.turns is not None and not adapter.sees:
        raise ValueError(
            f"turns=TurnEviction(...) scores earlier answers by their similarity to images, and {type(model).__name__} "
            "sees none: pass text=TextEviction(...) or cache=CacheLimit(...)"
        )
    text_config = cast("Any", model.config).get_text_config()
    if vision.recall:
        check_family(adapter, text_config)
        if evicts or handle.strategy is not None:
            raise NotImplementedError(
                "recall moves the columns of a cache, and eviction has tables of them: pass one of the two"
            )
    evictor: TextEvictor | None = None
    pruner: InsidePruner | None = None
    if handle.cache is not None:
        evictor = LimitEvictor(handle, adapter.text_of(model), text_config, handle.cache)
    elif evicts:
        turns = None if handle.turns is None else TurnEvictor(adapter, handle.turns)
        evictor = TextEvictor(handle, adapter.text_of(model), text_config, handle.text, turns)
    try:
        pruner = None if vision.inside is None else InsidePruner(model, adapter, decoder_of(model), vision.inside)
        return evictor, Forwards(handle, evictor, pruner)
    except BaseException:
        for installed in (evictor, pruner):
            if installed is not None:
                installed.remove()
        raise
