"""PyTorch peers of the train step, each in a process of its own; only that process imports PyTorch."""
