"""Shipping a student: export to the formats that programs load, parity with the original, model card."""
