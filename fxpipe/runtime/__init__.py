"""Running a plan: on ``torch.distributed.pipelining`` under torchrun, or in one process."""
