"""What runs a graph: the engine interface, and an engine for each `--backend`."""
