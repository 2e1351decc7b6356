"""Fault injection at length: ``make faults`` or ``python -m tests.faults --kills=100``.

The suite runs a few of each kind on every change; this runs many, and counts.
"""
