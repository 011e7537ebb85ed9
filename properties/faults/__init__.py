"""The suite's own exam: wrong implementations that it must catch, each taken from a published defect or a clause.

`fault` says what one is and how it is sat; one module a system lists its faults; `cheats` tries to fool the harness.
"""
