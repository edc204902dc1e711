"""Training inside random subspaces of the parameters."""
