"""Inference: read any number of tokens into a state of constant size, then generate from it.

>>> from holo_jax.generate import Sampling, generate, prefill, take_rows
>>> document = prefill(model, [tokens])                       # read once, in pieces, from the host
>>> state = take_rows(document.state, [0, 0])                 # ask twice
>>> result = generate(model, [question, other_question], state=state, max_new_tokens=64,
...                   sampling=Sampling(temperature=0.8, top_p=0.95), seeds=[1, 2])

States are values: nothing here changes one that it was given.
"""

from holo_jax.generate.checks import CacheFullError
from holo_jax.generate.decoding import Generated, generate
from holo_jax.generate.forms import decoding_form, state_bytes, take_rows
from holo_jax.generate.reading import Reading, decode_step, init_state, prefill
from holo_jax.generate.sampling import Sampling
from holo_jax.generate.state_precision import STATE_DTYPES, compress_state, expand_state, stored_dtype

__all__ = [
    "STATE_DTYPES",
    "CacheFullError",
    "Generated",
    "Reading",
    "Sampling",
    "compress_state",
    "decode_step",
    "decoding_form",
    "expand_state",
    "generate",
    "init_state",
    "prefill",
    "state_bytes",
    "stored_dtype",
    "take_rows",
]
