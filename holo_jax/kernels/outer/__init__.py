"""The outer-product memory without erase by Triton (backend ``triton_outer``): Ampere, Ada and Hopper."""
