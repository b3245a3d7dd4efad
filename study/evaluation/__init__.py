"""Numbers per run: downstream scores, masked-language-modelling loss, size and latency."""
