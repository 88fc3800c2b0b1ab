"""Reads the environment when it is imported, as libraries do that keep a cache."""

import os

CACHE = os.environ.get("CACHE_OF_THE_JOB")


class Net:
    def __init__(self, dtype=None):
        pass
