"""From a call's inputs to the shorter prompt, and how later steps and turns go on from it. Needs no cache of ours."""

from asymvlm.old_names import handed_on

__getattr__ = handed_on("asymvlm.prompt", "asymvlm.prompt.shorten")
