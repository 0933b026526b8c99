"""Chordal's parts inside other libraries."""
