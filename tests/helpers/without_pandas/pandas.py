"""First on the path of Ray's processes: ray.serve imports pandas where it is installed, and does not need it."""

raise ImportError("tests do without pandas in Ray's processes")
