"""Tokenizer pre-training: contrast with words, self-distillation, rebuilding, and a judge for the decoder."""
