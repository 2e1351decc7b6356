"""The published recipe on SlimPajama: 12 layers, hidden 1024, hd_dim 2048, 32,000 tokens, 6 billion of them.

Command:  python -m train.prepare --tokenizer=train:32000 --out=data/slimpajama \\
              --source=hf:DKYoon/SlimPajama-6B@b5f90f419b7489cdba26fdbc8c022fcb5562f968
          python -m train.main --config=configs/slimpajama.py
Hardware: one GPU with 80 GB; on n GPUs divide accumulation_steps by n
Size:     256.0 million parameters
Duration: not measured yet
Expect:   not measured yet; aim: held-out loss at 16,384 tokens as low as at the 4,096 trained on
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Everything that differs from ``configs/base.py``."""
    config = base.get_config()
    config.name = "slimpajama"
    config.global_batch_size = 128  # x 4,096 = 524,288 tokens
    config.context_length = 4096
    config.num_steps = 11_445  # 6.0 billion tokens
    config.accumulation_steps = 16  # 8 sequences at a time

    config.model.vocab_size = 32_000
    config.model.hidden_size = 1024
    config.model.hd_dim = 2048
    config.model.num_hidden_layers = 12
    config.model.remat = "full"
    config.model.scan_unroll = 12  # a loop would copy stacks of parameters and gradients: a fifth slower

    config.data.source = "prepared"
    config.data.paths = ("data/slimpajama",)

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 500

    config.eval.every_steps = 500
    config.eval.context_length = 16_384
    config.eval.global_batch_size = 8
    config.eval.num_batches = 16

    config.checkpoint.every_steps = 250
    config.checkpoint.keep_every_steps = 2500
    return config
