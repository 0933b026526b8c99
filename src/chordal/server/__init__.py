"""An OpenAI-compatible server: one engine thread, continuous batching for every decoder."""
