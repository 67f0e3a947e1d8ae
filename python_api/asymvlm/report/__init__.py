"""What a call did: counts, bytes, work, pictures of the kept tokens."""

from asymvlm.old_names import handed_on

__getattr__ = handed_on("asymvlm.report", "asymvlm.report.pruning")
