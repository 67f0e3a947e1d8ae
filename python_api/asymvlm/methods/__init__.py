"""Methods: which tokens go. One file a method, in a folder by the moment at which it decides.

    before/   vision tokens before the decoder runs: `VisionPruning(method=...)`
    inside/   vision tokens between two layers of the decoder while it prefills: the same
    cached/   tokens in the K/V cache: generated ones, `TextEviction(method=...)`, or all, `CacheLimit(method=...)`

A method of your own is a class with one function of scores. It is passed as an object, or registered under a name by an
installed package: entry-point group `asymvlm.methods`, the value a class that needs no arguments.
"""

from __future__ import annotations

from asymvlm.methods.before.base import BeforeMethod, Kept, PositiveScores, SelectingMethod, VisionPrompt
from asymvlm.methods.before.cdpruner import CDPruner
from asymvlm.methods.before.controls import RandomTokens, Spiral, Stride
from asymvlm.methods.before.dedup import Dedup
from asymvlm.methods.before.divprune import DivPrune
from asymvlm.methods.before.downsample import Downsample, image_size_for
from asymvlm.methods.before.flashvlm import FlashVLM
from asymvlm.methods.before.similarity import AsymVLM
from asymvlm.methods.before.visionzip import VisionZip
from asymvlm.methods.before.vispruner import VisPruner
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
from asymvlm.methods.inside.base import InsideMethod, Joined, LayerTokens, StageTokens
from asymvlm.methods.inside.budget import StageBudget
from asymvlm.methods.inside.fastv import FastV, FastVMasked
from asymvlm.methods.inside.pyramiddrop import PyramidDrop
from asymvlm.methods.inside.sparsevlm import SparseVLM, SparseVLM2
from asymvlm.methods.registry import available_methods, find_method

__all__ = [
    "AsymVLM",
    "BeforeMethod",
    "CDPruner",
    "CachedMethod",
    "CachedTokens",
    "Dedup",
    "DivPrune",
    "Downsample",
    "DuoAttention",
    "FastV",
    "FastVMasked",
    "FlashVLM",
    "H2O",
    "InsideMethod",
    "Joined",
    "Kept",
    "LastRow",
    "LayerTokens",
    "OldestFirst",
    "PositiveScores",
    "PyramidDrop",
    "PyramidKV",
    "RandomEviction",
    "RandomTokens",
    "RowLimit",
    "SelectingMethod",
    "SnapKV",
    "SparseVLM",
    "SparseVLM2",
    "Spiral",
    "StageBudget",
    "StageTokens",
    "StreamingLLM",
    "Stride",
    "TOVA",
    "VLCache",
    "VisPruner",
    "VisionPrompt",
    "VisionZip",
    "available_methods",
    "find_method",
    "image_size_for",
]
