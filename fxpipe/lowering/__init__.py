"""A stage's forward and backward graph."""
