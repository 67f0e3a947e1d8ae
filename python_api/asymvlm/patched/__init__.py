"""A patched model: its doors, a call in flight, the handle."""
