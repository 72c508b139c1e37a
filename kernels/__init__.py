"""Triton kernels and the jet:: ops over them; one op, one reference, one kernel a file."""
