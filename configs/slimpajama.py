"""The 6-billion-token sample of SlimPajama at 4k: a Holo-Transformer of 12 layers and width 1024.

Prepare:  python -m train.prepare --tokenizer=train:32000 --out=data/slimpajama \\
            --source=hf:DKYoon/SlimPajama-6B@b5f90f419b7489cdba26fdbc8c022fcb5562f968
Command:  python -m train.main --config=configs/slimpajama.py [--config.data.paths='("elsewhere",)']
Hardware: 2 GPUs of 80 GB (one does it too: raise config.accumulation_steps if memory is short)
Duration: see "Train on SlimPajama" in the README
Expect:   one pass over the training split; held-out loss on its validation split
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Everything that differs from ``configs/base.py``."""
    config = base.get_config()
    config.name = "slimpajama"
    config.num_steps = 11_000  # about one epoch
    config.global_batch_size = 128  # 524,288 tokens
    config.context_length = 4096
    config.accumulation_steps = 8

    config.model.vocab_size = 32_000

    config.data.source = "prepared"
    config.data.paths = ("data/slimpajama",)

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 500

    config.eval.every_steps = 500
    config.eval.num_batches = 16
    config.eval.global_batch_size = 32
    config.eval.sample_tokens = 200
    config.eval.sample_prompt = "The history of"

    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 5000
    return config
