"""`jet-export build` and `export-hf`: the plan, the choice of a backend, and the steps of the build."""
