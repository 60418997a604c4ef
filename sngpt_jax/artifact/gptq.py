"""Rounding that knows the inputs: later weights compensate the rounding error of each weight.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) lowers tr((W - Q) H (W - Q)^T), the
squared error of a layer's outputs over the inputs X with H = X^T X. It rounds W column by column.
This module writes GPTQ as Babai's nearest plane algorithm, which is equivalent (Chen et al. 2025,
https://arxiv.org/abs/2507.18553): with H = R R^T, R upper triangular, and e the errors of one row,

    e H e^T = sum_i R_ii^2 (e_i + sum_{j<i} e_j R_ji / R_ii)^2

Column i is rounded so that the bracket is as close to 0 as its grid allows. H is never inverted.
"""

import numpy as np

from sngpt_jax.artifact.quantize import inverse
from sngpt_jax.base.errors import UserError


def gptq(
    rows: np.ndarray,
    scales: np.ndarray,
    second_moment: np.ndarray,
    *,
    q_min: int,
    q_max: int,
    damping: float,
    block: int,
) -> np.ndarray:
    """Codes, int8 [out, in], C-contiguous, for `rows`, float32 [out, in], on the grids of
    `scales`, float16 [out].

    `second_moment` is H, float64 [in, in], a sum or a mean. `damping` times the mean diagonal is
    added to the diagonal, which damps moves that few inputs support. Columns with the largest
    diagonal come first, because most other columns can then compensate them. The column of an input
    that was always 0 is rounded to the nearest codes. `block`, the number of columns between
    updates of the rest, affects only the speed. Raises `UserError`, without the tensor's name, if H
    is not finite or has no Cholesky factor.
    """
    if not np.isfinite(second_moment).all():
        raise UserError("the second moments of its inputs are not finite; export an earlier --step")
    diagonal = second_moment.diagonal()
    ascending = np.argsort(diagonal, kind="stable")
    order = ascending[::-1]
    damped = second_moment[np.ix_(ascending, ascending)]
    damped[np.diag_indices_from(damped)] += damping * diagonal.mean() + (diagonal[ascending] == 0)
    try:
        lower = np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:
        raise UserError(
            "the second moments of its inputs are singular; raise export.gptq_damping"
        ) from None
    # The reversed lower triangle is the upper R with R R^T = H in the order of rounding.
    carry = lower[::-1, ::-1].T / lower.diagonal()[::-1, None]  # carry[i, j] = R_ji / R_ii

    weights = rows.T[order].astype(np.float64)  # [in, out], so that a column is contiguous
    steps, inverses = scales.astype(np.float64), inverse(scales)
    errors = np.empty_like(weights)
    codes = np.empty((rows.shape[1], rows.shape[0]), np.int8)
    for start in range(0, len(weights), block):
        stop = min(start + block, len(weights))
        targets = weights[start:stop] + carry[start:stop, :start] @ errors[:start]
        for i in range(start, stop):
            target = targets[i - start] + carry[i, start:i] @ errors[start:i]
            # float32 as in `quantize.nearest_codes`, so that columns without a carry agree with it
            codes[order[i]] = rounded = np.clip(
                np.rint(target.astype(np.float32) * inverses), q_min, q_max
            )
            errors[i] = weights[i] - steps * rounded
    return np.ascontiguousarray(codes.T)
