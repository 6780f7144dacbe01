"""What ./launch.sh NAME runs: `pipeline(job, words)` of NAME.py, with the verbs of launch.Job."""
