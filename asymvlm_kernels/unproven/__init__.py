"""Ways to run an op that no GPU has timed: asked for by name, never chosen.

`one_launch` prunes a prompt in one launch instead of two, `paths` asks for it or for launches that overlap, `cuda`
holds the launchers of the optional CUDA library (csrc/). A stored result of ``make gpu`` moves a file from here to the
folder of its op, or out of the house. Nothing imports this package but `dispatch`, when the library is asked for.
"""
