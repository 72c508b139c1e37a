"""Helpers for every package: errors, files, processes, the compiler, progress, the console, the environment."""
