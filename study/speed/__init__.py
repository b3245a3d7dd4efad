"""How fast a training step is, beside its floor and public packages, and what a run costs."""
