"""A patched model: its doors, a call in flight, the handle, and a dialogue with it."""
