"""Configuration, command line, training, evaluation and reports."""

__version__ = "0.1.0"
