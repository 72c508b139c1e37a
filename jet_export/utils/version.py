"""The version of jet-export; pyproject.toml reads it from here."""

__version__ = "0.2.0"
