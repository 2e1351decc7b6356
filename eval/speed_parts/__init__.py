"""Parts of ``eval.speed``: timing, ceilings, equality gate, memory op, mixer, train step, peers."""
