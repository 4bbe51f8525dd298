"""hesscli against its peers, from saved model to written file: `python -m tests.benchmarks`."""
