"""Options of the tests."""

from __future__ import annotations

import gc

import pytest


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write golden values of families whose revision was raised")


def pytest_collection_finish():
    """What is imported stays: statsmodels collects garbage at every call, and need not look through all of torch."""
    gc.freeze()


@pytest.fixture
def emulated_bf16(monkeypatch):
    """bf16 on processors that have no instructions for it, too: the numbers are the same."""
    monkeypatch.setattr("study.runtime.has_bf16", lambda device: True)
