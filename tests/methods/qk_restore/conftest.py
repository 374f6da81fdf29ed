"""Tiny hybrids are in tests/hybrids.py; what they warn of is nothing that these tests can change."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)  # tests of other folders run in this process
