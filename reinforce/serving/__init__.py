"""The reward endpoint behind serve_rm.py. A reader of the algorithm can leave it closed."""
