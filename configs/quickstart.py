"""Quick start: a small byte-level Holo-Transformer on the source files of Python's standard library.

Command:  make train    (or: python -m train.main --config=configs/quickstart.py)
Hardware: 2 CPU cores, or a GPU if one is there
Duration: 4 to 7 minutes on 2 CPU cores
Expect:   fewer held-out bits per byte than gzip -9; a sample in the letters of Python, if not its sense
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Everything that differs from ``configs/base.py``."""
    config = base.get_config()
    config.name = "quickstart"
    config.num_steps = 700
    config.global_batch_size = 4
    config.context_length = 512

    config.mesh.devices = 1  # so small a batch gains nothing from more

    config.model.vocab_size = 258  # bytes, begin, end
    config.model.hidden_size = 128
    config.model.hd_dim = 128
    config.model.head_dim = 64
    config.model.phasors = 32
    config.model.num_hidden_layers = 4
    config.model.tie_embeddings = False
    config.model.precision.storage = "float32"  # CPUs have no fast bfloat16 product

    config.model.phase_scale = 0.7
    config.model.value_conv = 4
    config.model.chunk_size = 32
    config.model.scan_unroll = 4

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 40
    config.optimizer.final_ratio = 0.02

    config.eval.every_steps = 350
    config.eval.num_batches = 8
    config.eval.global_batch_size = 4  # more at a time leaves the caches of a CPU
    config.eval.context_length = 2048  # longer than in training: a memory that does not grow reads on
    config.eval.heldout_summary = True
    config.eval.sample_tokens = 300
    config.eval.sample_prompt = "def "

    config.checkpoint.every_steps = 100
    config.checkpoint.keep_latest = 2
    return config
