"""Every field of a run, its default and what it means. Other configurations change a copy of this one.

Command:  python -m train.main --config=configs/base.py --config.model.vocab_size=258
Hardware: one accelerator with 24 GB; a run from here is a start for your own configuration
Duration: not measured
Expect:   a byte-level model of Python's standard library with the default, full-size model
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from holo_jax.config import HoloConfig
from holo_jax.precision import Precision

optional = config_dict.placeholder


def get_config() -> ConfigDict:
    """The defaults. Fields are locked: an override with a typo is refused."""
    config = ConfigDict()
    config.name = "base"  # runs/NAME is the run directory unless --workdir says otherwise
    config.seed = 0  # of initialisation and data order
    config.num_steps = 1000  # optimizer steps in all
    config.global_batch_size = 32  # sequences in one optimizer step, over all devices and hosts
    config.context_length = 1024  # tokens in a sequence
    config.accumulation_steps = 1  # parts in which a batch is computed; must divide global_batch_size

    config.model = model_section()

    config.data = ConfigDict()
    config.data.source = (
        "python"  # python: this Python's standard library; prepared: data.paths; random: noise
    )
    config.data.paths = ()  # directories written by train.prepare, mixed by data.weights
    config.data.weights = ()  # one positive weight a path; empty for equal ones
    config.data.heldout_split = "validation"  # of prepared data
    config.data.num_threads = 2  # threads that read ahead

    config.optimizer = ConfigDict()  # no decay on norms, biases and gates
    config.optimizer.name = "adamw"  # adamw, or muon for the matrices of the blocks and adamw for the rest
    config.optimizer.learning_rate = 3e-4  # peak
    config.optimizer.warmup_steps = 100  # linear from 0
    config.optimizer.final_ratio = 0.1  # cosine down to this share of the peak at num_steps; 1: constant
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0  # of the global gradient; 0: no clipping

    config.mesh = ConfigDict()  # device mesh; the product of its axes must be the number of devices
    config.mesh.devices = 0  # how many to use; 0: all
    config.mesh.data = -1  # batch; -1: all devices that the other axes leave
    config.mesh.fsdp = 1  # batch, with parameters and optimizer state sharded as well
    config.mesh.seq = 1  # sequence
    config.mesh.tensor = 1  # heads, MLP width, vocabulary
    config.mesh.reshard_after_forward = True  # fsdp: gather weights again backward; False keeps them (ZeRO-2)
    config.mesh.reduce_dtype = "float32"  # in which gradients are sent; bfloat16 is half the bytes
    config.mesh.transport = "collectives"  # copies: by a GPU's copy engines, for devices of one process
    config.mesh.in_order = True  # over data alone: sums of unrolled blocks beside the backward pass

    config.eval = ConfigDict()  # on held-out data
    config.eval.every_steps = 200  # 0: only at the end
    config.eval.num_batches = 16
    config.eval.global_batch_size = 32  # sequences in one evaluation batch
    config.eval.context_length = 0  # tokens in an evaluated sequence; 0: as in training
    config.eval.heldout_summary = (
        False  # at the end: bits per byte of every held-out byte, beside gzip and xz
    )
    config.eval.sample_tokens = 0  # at the end: print a sample of so many tokens
    config.eval.sample_prompt = ""  # what the sample goes on from
    config.eval.sample_temperature = 0.7  # 0: always the likeliest token

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # and at the start, at the end and when asked to stop
    config.checkpoint.keep_latest = 3
    config.checkpoint.keep_best = 1  # lowest held-out loss
    config.checkpoint.keep_every_steps = 0  # multiples of this are kept for ever; 0: none

    config.guard = ConfigDict()
    config.guard.max_nonfinite_steps = 5  # skipped in a row before going back to the last good checkpoint
    config.guard.max_rollbacks = 3  # then the run stops
    config.guard.spike_window = 64  # steps whose losses tell what is normal; 0: no spike warnings
    config.guard.spike_threshold = 8.0  # robust standard deviations above the median that make a spike

    config.watchdog = ConfigDict()  # a phase that takes longer ends the process with all stacks; 0: no limit
    config.watchdog.startup_seconds = 1800.0  # until the first step is done, compilation included
    config.watchdog.step_seconds = 600.0  # data and step, and each evaluation batch
    config.watchdog.save_seconds = 1800.0  # waiting for a checkpoint

    config.log = ConfigDict()
    config.log.every_steps = 10  # progress lines when not on a terminal
    config.log.tensorboard = True  # metrics.jsonl is always written
    return config.lock()


def model_section() -> ConfigDict:
    """The model: a preset, and the fields of ``HoloConfig`` that change it, which documents them.

    A field that is None takes the preset's value.
    """
    model = ConfigDict({"preset": "holo"})  # holo, seed, dual, attention, ssm
    for field in dataclasses.fields(HoloConfig):
        if field.name == "precision":
            model.precision = ConfigDict({role.name: optional(str) for role in dataclasses.fields(Precision)})
        else:
            model[field.name] = optional(type(field.default))
    return model
