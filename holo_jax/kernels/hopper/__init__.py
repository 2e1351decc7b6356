"""The outer-product memory on Hopper (backend ``hopper``): kernels of jax-linear-attention and our own."""
