"""Distributed checkpoints on disk: their layout, which can be trusted, reading and writing of tensors."""
