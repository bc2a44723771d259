"""Pretrained networks in plain JAX, with loaders for the files that packages carry."""
