"""The options on a Hydra that the hook does not fit: choosing one ends the composition, and the message says why."""
