"""Text eviction: generated tokens leave the K/V cache, the prompt stays. `asymvlm` names what is public of it."""
