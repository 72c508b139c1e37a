"""The verification ladder: every check, cheapest first, on the user's own machine, up to the first that fails.

climb    runs the rungs, each in a process of its own, and writes the report
rungs    what each rung checks
site     what every rung works on: a bundle on this machine
inputs   random and invalid inputs of the jet nodes
"""
