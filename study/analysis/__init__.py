"""Figures, tables and pages from the small result files alone: nothing here trains, loads a model or imports torch."""
