"""GOT-OCR 2: one square grid a page or crop."""

from __future__ import annotations

from asymvlm.models.adapter import Adapter
from asymvlm.models.towers import square_patches, square_tiles

ADAPTER = Adapter(
    model_type="got_ocr2",
    per_token={"labels": -100},
    grids=square_tiles(lambda config: square_patches(config) // 16),  # two convolutions of stride 2
    tiling="canvas",
    # no tower_tokens: convolutions of overlapping windows follow, so a patch belongs to several tokens
)
