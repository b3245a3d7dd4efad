"""Figures, tables and pages from the small result files alone."""
