"""What ./launch.sh NAME does, command by command: `pipeline(job, words)` of NAME.py, with the verbs of launch.Job."""
