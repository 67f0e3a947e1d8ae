"""The K/V cache that tokens are evicted from: which token lies in which slot, layers, masks."""

from asymvlm.old_names import handed_on

__getattr__ = handed_on("asymvlm.cache", "asymvlm.cache.eviction_cache")
