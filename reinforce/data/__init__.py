"""Lines in, prompts out. Imports the update's shelf alone."""
