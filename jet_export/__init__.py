"""jet-export: engines for Jet-Nemotron hybrid linear-attention models."""
