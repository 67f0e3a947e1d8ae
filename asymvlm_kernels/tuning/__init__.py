"""Launch configurations: frozen dataclasses, one file a phase, a reason beside each threshold."""
