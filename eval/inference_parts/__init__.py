"""Parts of ``eval.inference``."""
