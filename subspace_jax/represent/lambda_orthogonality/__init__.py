"""Lambda-orthogonality: vectors of a new model that stay compatible with a store of old ones (arXiv 2509.16664)."""
