"""What makes a run safe: set-up, processes, checkpoints, logs.

A reader of the algorithm can leave this folder closed.
"""
