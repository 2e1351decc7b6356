"""Corpora: sources of text, tokenizers, packing into fixed-length records, manifests, readers.

Nothing here imports JAX, so that preparing data starts many light worker processes.
"""
