"""What the checks need to know about how transformers is written, in one place."""

from __future__ import annotations

from asymvlm.hf.arguments import cache_of
from asymvlm.hf.decoder import decoder_of

__all__ = ["cache_of", "decoder_of"]
