"""The work of the commands, one module each; `asymvlm_cli` has their options and calls them.

A command's function takes what the user gave, in its own words; what can be checked before a model is loaded is.
"""
