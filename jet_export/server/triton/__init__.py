"""The model behind Triton Inference Server, its repository, and a run of the server."""
