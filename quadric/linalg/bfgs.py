"""BFGS in matrices: the update of an inverse, its damping, and the compact form of L-BFGS."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def update_(
    H: Float[Tensor, "n n"], s: Float[Tensor, " n"], y: Float[Tensor, " n"], use: Bool[Tensor, ""] | bool = True
) -> Bool[Tensor, ""]:
    """H <- (I - s y' / s'y) H (I - y s' / s'y) + s s' / s'y, equation 6.17 of Nocedal and Wright (2006).

    Then H y = s, and a positive definite H stays so. A pair without s'y > 0, or beyond the numbers of its type, leaves
    H as it is, without a word to the host.

    Args:
        H: symmetric; it stays so to the bit.
        s, y: the pair.
        use: False leaves H as it is, too.

    Returns:
        Whether the pair was used.
    """
    sy, Hy = s @ y, H @ y
    u = (Hy - 0.5 * (1 + (y @ Hy) / sy) * s) / sy
    used = (sy > 0) & (s.norm() * u.norm()).isfinite() & use
    outer = torch.outer(torch.where(used, s, 0.0), torch.where(used, u, 0.0))
    H.sub_(outer + outer.T)
    return used


def damp(
    s: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    Hy: Float[Tensor, " n"],
    *,
    powell: float,
    share: float,
    unit: Float[Tensor, ""],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Double damping of a pair: D_P(mu_1) and D_LM(mu_2) of Goldfarb, Ren and Bahamou (2020), in this order.

    First s <- theta s + (1 - theta) H y, with s'y = powell y'Hy where it was less, so that an update by the pair does
    not shrink H's inverse by too much; then y <- theta y + (1 - theta) unit s, with s'y = share unit s's where it was
    less, so that it does not grow H by too much. The paper has unit = 1, and share below 1; above, y is share unit s.

    Args:
        s, y: the pair; y is not zero.
        Hy: H y, for the first.
        powell, share: mu_1 and mu_2.
        unit: a mean curvature.
    """
    sy, yHy = s @ y, y @ Hy
    theta = torch.where(sy > powell * yHy, 1.0, (1 - powell) * yHy / (yHy - sy))
    s = theta * s + (1 - theta) * Hy
    sy, ss = s @ y, unit * (s @ s)
    theta = torch.where(sy > share * ss, 1.0, ((1 - share) * ss / (ss - sy)).clamp(min=0.0))
    return s, theta * y + (1 - theta) * max(share, 1.0) * unit * s


def compact(
    S: Float[Tensor, "m n"], Y: Float[Tensor, "m n"], scale: Float[Tensor, ""] | float, V: Float[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """H V of the L-BFGS inverse H from H_0 = scale I: theorem 2.2 of Byrd, Nocedal and Schnabel (1994).

    The same as `LBFGSInverse` in products of matrices, for many vectors at once. With R the upper half of S Y' and D
    its diagonal, H V = scale W + S' Q, where R P = S V, W = V - Y' P and R' Q = D P - scale Y W.

    Args:
        S, Y: pairs as rows, oldest first, each with s'y > 0.
        scale: positive.
        V: vectors as columns.
    """
    if len(S) == 0:
        return scale * V
    R = (S @ Y.T).triu()
    P = torch.linalg.solve_triangular(R, S @ V, upper=True)
    W = V - Y.T @ P
    Q = torch.linalg.solve_triangular(R.T, R.diagonal().unsqueeze(1) * P - scale * (Y @ W), upper=False)
    return scale * W + S.T @ Q
