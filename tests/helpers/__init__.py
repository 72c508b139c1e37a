"""What several test modules use: models, bundles, fakes, references and paths."""
