"""Logits of small random models of every family, made by transformers: what the forward pass must reproduce."""
