"""What nodes, stages and steps take: modelled, measured, predicted."""
