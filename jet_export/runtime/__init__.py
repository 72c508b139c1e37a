"""Running a bundle: engines, state pools, sampling, generation."""
