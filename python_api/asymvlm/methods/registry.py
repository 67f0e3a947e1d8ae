"""Methods by name: those of the library, and those of installed packages in the entry-point group `asymvlm.methods`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from asymvlm.methods.before.cdpruner import CDPruner
from asymvlm.methods.before.controls import RandomTokens, Spiral, Stride
from asymvlm.methods.before.dedup import Dedup
from asymvlm.methods.before.divprune import DivPrune
from asymvlm.methods.before.downsample import Downsample
from asymvlm.methods.before.flashvlm import FlashVLM
from asymvlm.methods.before.similarity import AsymVLM
from asymvlm.methods.before.visionzip import VisionZip
from asymvlm.methods.before.vispruner import VisPruner
from asymvlm.methods.cached.attention import LastRow
from asymvlm.methods.cached.controls import OldestFirst, RandomEviction
from asymvlm.methods.cached.duo import DuoAttention
from asymvlm.methods.cached.h2o import H2O
from asymvlm.methods.cached.pyramidkv import PyramidKV
from asymvlm.methods.cached.snapkv import SnapKV
from asymvlm.methods.cached.streaming import StreamingLLM
from asymvlm.methods.cached.tova import TOVA
from asymvlm.methods.cached.vlcache import VLCache
from asymvlm.methods.inside.fastv import FastV, FastVMasked
from asymvlm.methods.inside.pyramiddrop import PyramidDrop
from asymvlm.methods.inside.sparsevlm import SparseVLM, SparseVLM2

ENTRY_POINT_GROUP = "asymvlm.methods"
OURS: tuple[type[Any], ...] = (
    AsymVLM,
    RandomTokens,
    Stride,
    Spiral,
    Downsample,
    VisPruner,
    FlashVLM,
    VisionZip,
    DivPrune,
    CDPruner,
    Dedup,
    FastV,
    FastVMasked,
    SparseVLM,
    SparseVLM2,
    PyramidDrop,
    LastRow,
    OldestFirst,
    RandomEviction,
    TOVA,
    H2O,
    SnapKV,
    PyramidKV,
    StreamingLLM,
    DuoAttention,
    VLCache,
)


def available_methods(*moments: type[Any]) -> list[str]:
    """Names that ``method=`` takes, third-party ones included.

    Args:
        moments: `BeforeMethod`, `InsideMethod`, `CachedMethod`: list of the library's own only these; None means all.
            Those of other packages are not loaded, so they are always listed.
    """
    ours = {kind.name for kind in OURS if not moments or issubclass(kind, moments)}
    return sorted(ours | set(entry_points(group=ENTRY_POINT_GROUP).names))


def find_method(method: Any, *moments: type[Any]) -> Any:
    """A method as it was given: an object, or the name of one that needs no arguments.

    Args:
        moments: base classes, any of which will do.

    Raises:
        ValueError: for a name that nobody has; the message lists the known ones.
        TypeError: for anything that is no method of these ``moments``.
    """
    found = _named(method, moments) if isinstance(method, str) else method
    if isinstance(found, type) and issubclass(found, moments):
        found = found()
    if not isinstance(found, moments):
        wanted = " or ".join(moment.__name__ for moment in moments)
        raise TypeError(f"method must be of {wanted}, or the name of one, got {method!r}")
    return found


def _named(name: str, moments: tuple[type[Any], ...]) -> Any:
    for kind in OURS:
        if kind.name == name and issubclass(kind, moments):
            return kind
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return entry.load()
    raise ValueError(f"no method is called {name!r}; known: {', '.join(available_methods(*moments))}")
