"""Trains the demo's model and its scorer from nothing; `python -m training --help`."""
