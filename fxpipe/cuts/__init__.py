"""Where a graph is cut into stages."""
