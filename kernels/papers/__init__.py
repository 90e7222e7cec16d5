"""What only the papers' presets `svg_ear` and `svg2` need: k-means clusters of any size, and row budgets."""
