"""The elementwise memory by Triton (backend ``triton``): Ampere, Ada and Hopper."""
