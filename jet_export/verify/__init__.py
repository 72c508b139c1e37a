"""`jet-export verify`: an engine compared with the PyTorch model, step by step."""
