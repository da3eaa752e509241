"""What is done with each value that is kept for backward."""
