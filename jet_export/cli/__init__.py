"""The `jet-export` command line: one file a command."""
