"""WHAT is done: launch, split, merge, and what they are made of."""
