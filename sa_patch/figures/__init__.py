"""What every figure of the package shares: colours, layout and axes."""
