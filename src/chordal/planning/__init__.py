"""How much to draft: chosen from measured latency by width and measured acceptance."""
