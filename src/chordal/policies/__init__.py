"""What `denoise` feeds and which positions it commits."""
