"""Model, data and options -> the problem, ready to be differentiated, by one process or by several."""
