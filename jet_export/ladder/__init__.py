"""The verification ladder: every check from cheapest to dearest, on the user's own machine, up to the first that fails.

climb    runs the rungs, each in a process of its own, and writes one JSON
rungs    what each rung checks
inputs   random, and meaningless, inputs of the jet nodes
"""
