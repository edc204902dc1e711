import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.manifolds import grassmann


@pytest.mark.parametrize("name", ["exp_H", "exp_tH", "transport_D", "transport_H", "log_expH", "dist", "angles"])
def test_geometry_matches_the_oracle(x64, golden, name):
    g = {key: jnp.asarray(value) for key, value in golden("gcr/oracle_geometry").items()}
    s, h, d, t = g["S"], g["H"], g["D"], g["t"]
    got, want = {
        "exp_H": lambda: (grassmann.exp(s, h), g["exp_H"]),
        "exp_tH": lambda: (grassmann.exp(s, h, t), g["exp_tH"]),
        "transport_D": lambda: (grassmann.parallel_transport(s, h, d, t), g["transport_D"]),
        "transport_H": lambda: (grassmann.parallel_transport(s, h, h, t), g["transport_H"]),
        "log_expH": lambda: (grassmann.log(s, g["exp_H"]), g["log_expH"]),
        "dist": lambda: (grassmann.dist(s, g["exp_H"]), g["dist"]),
        "angles": lambda: (grassmann.principal_angles(s, g["exp_H"]), g["principal_angles"]),
    }[name]()
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["qr", "polar", "cayley"])
def test_retractions_match_the_oracle(x64, golden, method):
    g = golden("gcr/oracle_geometry")
    got = grassmann.retract(jnp.asarray(g["S"]), jnp.asarray(g["H"]), method)
    np.testing.assert_allclose(got, g[f"retract_{method}"], rtol=1e-10, atol=1e-12)
