"""What is fast: optimised variants of the five systems, one sub-package a technique."""
