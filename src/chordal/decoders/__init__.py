"""The decoders: one system a file; `registry` knows them by name."""
