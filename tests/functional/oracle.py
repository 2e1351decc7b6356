"""The definitions as plain NumPy loops in float64, written from the mathematics alone."""

import numpy as np


def memory_loop(write, read, values, gates, erase, *, binding, segment_ids, memory, writes):
    """M <- M + bind(g v - e read); y = unbind(M). Returns outputs, memory, writes."""
    batch, time, heads, _ = values.shape
    m = write.shape[-1]
    outputs = np.zeros(values.shape)
    memory, writes = np.array(memory, np.complex128), np.array(writes, np.float64)
    for b in range(batch):
        for t in range(time):
            if t and segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
                memory[b], writes[b] = 0, 0
            for h in range(heads):
                key, query = np.exp(1j * write[b % len(write), t, h]), np.exp(1j * read[b % len(read), t, h])
                value = gates[b, t, h] * values[b, t, h]
                if binding == "hadamard":
                    memory[b, h] += key * value
                    outputs[b, t, h] = (query.conj() * memory[b, h]).real
                else:
                    key, query = key / np.sqrt(m), query / np.sqrt(m)
                    if erase is not None:
                        value = value - erase[b, t, h] * (key.conj() @ memory[b, h]).real
                    memory[b, h] += np.outer(key, value)
                    outputs[b, t, h] = (query.conj() @ memory[b, h]).real
                writes[b, h] += gates[b, t, h] ** 2
    return outputs, memory, writes


def decay_loop(keys, queries, values, logs, *, segment_ids, state):
    """S <- exp(l) S + k v^T; y = S^T q. Returns outputs and state."""
    batch, time, heads, _ = values.shape
    outputs, state = np.zeros(values.shape), np.array(state, np.float64)
    for b in range(batch):
        for t in range(time):
            if t and segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
                state[b] = 0
            for h in range(heads):
                state[b, h] = np.exp(logs[b, t, h]) * state[b, h] + np.outer(keys[b, t, h], values[b, t, h])
                outputs[b, t, h] = queries[b, t, h] @ state[b, h]
    return outputs, state
