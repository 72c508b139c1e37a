"""Drives the plugin objects with no TensorRT library: for the tests and for `jet-export verify --ladder`."""
