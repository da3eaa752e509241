"""The planner: from a profile and a topology to stages and their devices. Loads numpy, never torch."""
