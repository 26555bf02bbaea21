"""Measurements. A result is a ratio against a peer in the same run, with hardware, versions, date and commit."""
