"""Figures that others published, to be drawn beside ours and always labelled as theirs.

Multi-query associative recall, vocabulary 8,192, 2 layers: accuracy averaged over (length, pairs) of
(64, 4) (64, 8) (64, 16) (128, 32) (256, 64) (512, 128) (1024, 256), against bytes of recurrent state, as
read from the figure. Trained on 180,000 sequences, 32 epochs, best of four learning rates. Ours is the same
task and average with other training (see configs/eval/recall.py), so read the points as a landscape.
"""

MQAR_CITATION = (
    "read from the published state-size figure of Zoology / Based (Arora et al. 2024) and successors"
)

# model -> ((bytes of state, accuracy), ...)
MQAR = {
    "DeltaNet": ((9_000, 0.79), (34_000, 0.96), (134_000, 0.995)),
    "gated DeltaNet": ((17_000, 0.89), (67_000, 0.99)),
    "GLA": ((18_000, 0.77), (68_000, 0.95)),
    "RWKV-7": ((17_000, 0.815), (132_000, 0.91)),
    "Mamba-2": ((8_000, 0.52), (16_000, 0.69), (33_000, 0.785), (65_000, 0.83)),
    "Mamba": ((98_000, 0.85),),
    "Based": ((9_000, 0.67), (25_000, 0.84), (40_000, 0.91), (80_000, 0.985)),
}
MQAR_ATTENTION = 1.0

RULER_CITATION = (
    "1.3B parameters, 100B tokens, trained at 4k; as published with gated DeltaNet (Yang et al. 2024)"
)

# model -> task -> ((tokens, percent), ...)
RULER = {
    "DeltaNet 1.3B": {
        "single_1": ((1024, 97.4), (2048, 96.8), (4096, 99.0), (8192, 98.8)),
        "single_2": ((1024, 98.4), (2048, 45.6), (4096, 18.6), (8192, 14.4)),
        "single_3": ((1024, 85.2), (2048, 47.0), (4096, 22.4)),
    },
    "Mamba-2 1.3B": {
        "single_1": ((1024, 99.2), (2048, 98.8), (4096, 65.4), (8192, 30.4)),
        "single_2": ((1024, 99.4), (2048, 98.8), (4096, 56.2), (8192, 17.0)),
        "single_3": ((1024, 64.4), (2048, 47.6), (4096, 4.6)),
    },
    "gated DeltaNet 1.3B": {
        "single_1": ((1024, 98.4), (2048, 88.4), (4096, 91.4), (8192, 91.8)),
        "single_2": ((1024, 100.0), (2048, 99.8), (4096, 92.2), (8192, 29.6)),
        "single_3": ((1024, 86.6), (2048, 84.2), (4096, 27.6)),
    },
}
