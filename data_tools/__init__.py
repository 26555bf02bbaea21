"""Prepare data sets: pictures to image shards, image shards to latent shards, and a look at either."""
