"""Prompts that begin alike: what models cached of the beginning is computed once and shared."""
