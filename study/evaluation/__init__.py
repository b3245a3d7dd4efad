"""Numbers of one model: downstream scores, language-modelling loss, size, latency, likeness of layers; and tuning."""
