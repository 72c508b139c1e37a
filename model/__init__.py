"""The Jet-Nemotron model: config, weights, packed forward."""
