"""A program after every pass: printed, saved, read."""
