"""Which decoder, with which settings: searched on this machine, for this model and these prompts."""
