"""Fuzzing: bytes from anywhere meet the code that reads them. `python -m tests.fuzz all --seconds 10`."""
