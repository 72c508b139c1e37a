"""`jet-export eval`: lm-evaluation-harness over an engine in process, with local tasks and a paired baseline."""
