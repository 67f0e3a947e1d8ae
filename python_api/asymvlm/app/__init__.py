"""What people at a keyboard and files of theirs need: loading, sessions, samples, metrics."""
