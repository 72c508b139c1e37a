"""AOTInductor: packages compiled from exported graphs, and the engine that calls them."""
