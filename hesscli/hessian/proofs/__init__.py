"""What a recorded pass proves: how samples keep apart, and how parameters enter."""
