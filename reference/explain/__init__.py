"""Every assignment explained: the oracle run in float64 with error bounds, and what rounding leaves open.

One module a system, beside `explanation`, which holds what they share.
"""
