"""`jet-export try`: builds, verifies, compares and measures a model on this machine, and writes a page to share."""
