"""Hydra config options, installed as ``precision_policy.conf``; a package because Hydra 1.4 ignores a plain folder."""
