"""What a DemoResetRun is: its fields, its errors and every name that two processes share."""
