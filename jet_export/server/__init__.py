"""An OpenAI-compatible HTTP server, and the model behind Triton Inference Server; needs the extra `[serve]`."""
