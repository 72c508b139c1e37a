"""The engine's process and its front ends: processes that do HTTP and text, over a Unix socket each."""
