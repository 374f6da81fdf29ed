"""Tiny hybrids are in tests/hybrids.py; what they warn of is nothing that these tests can change."""

import logging

import pytest


@pytest.fixture(autouse=True, scope="session")
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)
