"""The genuine packages as implementations of our operations, for whoever has them installed.

Each function takes an operation's arguments by keyword and hands them to the published code, so that
``detoracle check yolov8.assign detoracle.adapters.ultralytics:assign`` compares the two. The packages are no dependency
of ours: a module here imports its package when one of its functions is called. What a function raises is what the
package raised.
"""
