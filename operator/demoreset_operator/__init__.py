"""The operator: turns DemoResetRuns into groups of pods, and keeps them training."""
