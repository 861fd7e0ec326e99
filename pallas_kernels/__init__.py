"""Kernels, one package per operation: a plain reference that specifies it, and one file per backend. See README.md."""
