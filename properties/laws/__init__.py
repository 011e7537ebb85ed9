"""Metamorphic laws: how a right answer changes when the question does, such as permuted ground truths.

A law needs no oracle of its own: what an implementation returns for the changed arguments is mapped back to the
original ones, and judged by the expectation that is there already.
"""
