"""Other people's implementations of the methods, run for real in environments of their own, beside ours."""
