"""Options of the tests."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write golden values of families whose revision was raised")
