"""A Mamba-2-style state-space layer in the same block, data and optimizer as ``slimpajama``.

Command:  python -m train.main --config=configs/ssm.py    (data as in configs/slimpajama.py)
Hardware: one GPU with 80 GB; on n GPUs divide accumulation_steps by n
Size:     244.6 million parameters
Duration: not measured yet
Expect:   not measured yet; a baseline for configs/slimpajama.py
"""

from ml_collections import ConfigDict

from configs import slimpajama


def get_config() -> ConfigDict:
    """``slimpajama`` with another preset."""
    config = slimpajama.get_config()
    config.name = "ssm"
    config.model.preset = "ssm"
    return config
