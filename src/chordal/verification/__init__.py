"""Whether a decoder gives what plain decoding gives, on a model and prompts of your own."""
