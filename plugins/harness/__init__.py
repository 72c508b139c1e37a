"""Drives the plugin objects without TensorRT, for the tests and `jet-export verify --ladder`."""
