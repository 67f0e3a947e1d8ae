"""Methods: which tokens go. One file a method, in a folder by the moment at which it decides.

    before/   vision tokens before the decoder runs: `VisionPruning(method=...)`
    inside/   vision tokens between two layers of the decoder while it prefills: the same
    cached/   tokens in the K/V cache: generated ones, `TextEviction(method=...)`, or all, `CacheLimit(method=...)`

A method of your own is a class with one function of scores. It is passed as an object, or registered under a name by an
installed package: entry-point group `asymvlm.methods`, the value a class that needs no arguments.
"""

from __future__ import annotations

from asymvlm.methods.before.base import BeforeMethod, Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.controls import RandomTokens, Spiral, Stride
from asymvlm.methods.before.similarity import AsymVLM
from asymvlm.methods.cached.attention import LastRow
from asymvlm.methods.cached.base import CachedMethod, CachedTokens, RowLimit
from asymvlm.methods.cached.controls import OldestFirst, RandomEviction
from asymvlm.methods.cached.duo import DuoAttention
from asymvlm.methods.cached.h2o import H2O
from asymvlm.methods.cached.pyramidkv import PyramidKV
from asymvlm.methods.cached.snapkv import SnapKV
from asymvlm.methods.cached.streaming import StreamingLLM
from asymvlm.methods.cached.tova import TOVA
from asymvlm.methods.cached.vlcache import VLCache
from asymvlm.methods.inside.base import InsideMethod, LayerTokens
from asymvlm.methods.registry import available_methods, find_method

__all__ = [
    "AsymVLM",
    "BeforeMethod",
    "CachedMethod",
    "CachedTokens",
    "DuoAttention",
    "H2O",
    "InsideMethod",
    "Kept",
    "LastRow",
    "LayerTokens",
    "OldestFirst",
    "PyramidKV",
    "RandomEviction",
    "RandomTokens",
    "RowLimit",
    "SelectingMethod",
    "SnapKV",
    "Spiral",
    "StreamingLLM",
    "Stride",
    "TOVA",
    "VLCache",
    "VisionPrompt",
    "available_methods",
    "find_method",
]
