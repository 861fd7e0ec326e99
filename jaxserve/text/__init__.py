"""Text and tokens: tokenizers, incremental decoding, stop strings. Nothing here uses JAX."""
