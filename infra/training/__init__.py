"""Trains the bundled model. Stands beside the product, not in it: nothing here is imported by Shoal (README.md)."""
