"""WHEN the flows run, and the face to people."""
