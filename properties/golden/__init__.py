"""Replay of recorded vectors: what the genuine code returned, against the oracles, stage by stage.

`vectors` reads the files, `checks` compares, and one module a system knows which oracle stage each array is.
"""
