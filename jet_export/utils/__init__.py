"""What every other package may use: errors, files, processes, compilers, progress, the console, the environment."""
