"""The published mechanism (positional hadamard memory, no gates) in the SlimPajama recipe.

Command:  python -m train.main --config=configs/seed.py    (data as in configs/slimpajama.py)
Hardware: one GPU with 80 GB; on n GPUs divide accumulation_steps by n
Size:     216.6 million parameters
Duration: not measured yet
Expect:   not measured yet; a baseline for configs/slimpajama.py
"""

from ml_collections import ConfigDict

from configs import slimpajama


def get_config() -> ConfigDict:
    """``slimpajama`` with another preset."""
    config = slimpajama.get_config()
    config.name = "seed"
    config.model.preset = "seed"
    return config
