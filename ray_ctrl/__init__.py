"""The desk: configuration, command line, training, evaluation and reports."""
