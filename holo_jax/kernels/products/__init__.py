"""Products with what follows them: denoiser and loss, on Hopper."""
