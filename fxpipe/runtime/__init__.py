"""Running a plan: in this process, or under torchrun on PyTorch's pipeline schedule runtime."""
