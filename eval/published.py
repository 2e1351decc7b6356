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
