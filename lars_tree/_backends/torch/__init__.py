"""Torch tensors: their backend, and the engines for devices and shards."""
