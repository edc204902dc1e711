"""One step on a Grassmann manifold."""
