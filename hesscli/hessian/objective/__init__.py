"""What is differentiated: the loss of a model over all batches of the data."""
