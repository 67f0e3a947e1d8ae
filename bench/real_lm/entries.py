"""What is compared: settings that hold the same number of tokens in every layer once a text is over."""

from __future__ import annotations

from typing import Any

from asymvlm.methods import H2O, TOVA, LastRow, OldestFirst, RandomEviction, SnapKV, StreamingLLM
from bench.harness.cache_entries import Entry

SHARES = (0.5, 0.75, 0.9)
PROMPT, FORCED = 128, 96  # tokens of a block: read at once, and one by one
HELD = 48  # of the latter, of which a share is held
SCORED = 48  # the last of them, all behind the first eviction
SINKS = 4
FULL = "nothing evicted"


def equal_settings(entry: Entry, share: float) -> dict[str, Any]:
    """Arguments of `asymvlm.patch` that hold the prompt and ``share`` of `HELD`, or as many tokens of both."""
    return entry.equal_to(int(HELD * share), PROMPT, FORCED - 1)


ENTRIES = (  # the first ones matter most where time is short
    Entry.paper("asymvlm (last layer)"),
    Entry.paper("asymvlm, 16 recent kept", recent=16),
    Entry("asymvlm (default)"),
    Entry("h2o", H2O(), protected=False),
    Entry("oldest first", OldestFirst()),
    Entry("streamingllm, original positions", StreamingLLM(positions="original"), protected=False),
    Entry("tova", TOVA(), protected=False),
    Entry("h2o", H2O()),
    Entry("random", RandomEviction()),
    Entry("last row, 4 first kept", LastRow(sinks=SINKS), protected=False),
    Entry.paper("asymvlm, 6 recent kept", recent=6),
    Entry("last row, a list for each layer, 16 recent kept", recent=16, score="last"),
    Entry("tova", TOVA()),
    Entry("streamingllm, re-indexed", StreamingLLM(), protected=False),
    Entry("snapkv", SnapKV(window=8), protected=False),
    Entry("random, 4 first kept", RandomEviction(sinks=SINKS), protected=False),
    Entry("oldest first", OldestFirst(), protected=False),
    Entry("streamingllm, re-indexed", StreamingLLM()),
)

__all__ = ["ENTRIES", "FORCED", "FULL", "HELD", "PROMPT", "SCORED", "SHARES", "equal_settings"]
