"""Figures, a module for each analysis: functions that take its numbers and return a matplotlib figure."""
