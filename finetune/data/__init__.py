"""Shards on disk, the order of samples, and the loader that turns both into batches."""
