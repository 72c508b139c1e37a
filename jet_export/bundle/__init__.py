"""The bundle: manifest, limits, the machine that it is for, and the memory that an engine takes."""
