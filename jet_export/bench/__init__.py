"""`jet-export bench` and what it is made of: protocols, rooflines, ratios to a baseline, tables and pictures."""
