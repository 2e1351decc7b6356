"""Softmax attention with rotary positions in the same block, data and optimizer as ``slimpajama``.

Command:  python -m train.main --config=configs/attention.py    (data as in configs/slimpajama.py)
Hardware: one GPU with 80 GB; on n GPUs divide accumulation_steps by n
Size:     267.7 million parameters
Duration: not measured yet
Expect:   not measured yet; a baseline for configs/slimpajama.py
"""

from ml_collections import ConfigDict

from configs import slimpajama


def get_config() -> ConfigDict:
    """``slimpajama`` with another preset."""
    config = slimpajama.get_config()
    config.name = "attention"
    config.model.preset = "attention"
    return config
