"""Eq. 2-13 of Horváth and Al-afandi (2020), value by value in float64: an oracle with no code of the package."""

import math

import numpy as np


def sets_of(shape, num_groups):
    """The index sets S_i of the paper: per channel (num_groups 0), or per sample and group."""
    n, c, *space = shape
    cells = list(np.ndindex(*space))
    if num_groups == 0:
        return [[(i, j, *p) for i in range(n) for p in cells] for j in range(c)]
    k = c // num_groups
    return [[(i, j, *p) for j in range(g * k, (g + 1) * k) for p in cells] for i in range(n) for g in range(num_groups)]


def forward_set(x, members, t_sigma, eps):
    """Filter one set: mu', sigma'^2 (without eps) and the mask."""
    m = len(members)
    mu = math.fsum(x[k] for k in members) / m
    sigma = math.sqrt(math.fsum((x[k] - mu) ** 2 for k in members) / m + eps)
    f = {k: 1 if -t_sigma <= (x[k] - mu) / sigma <= t_sigma else 0 for k in members}
    kept = sum(f.values())
    mean = math.fsum(f[k] * x[k] for k in members) / kept
    var = math.fsum(f[k] * (x[k] - mean) ** 2 for k in members) / kept
    return mean, var, f


def forward(x, gamma, beta, t_sigma, eps, num_groups=0):
    """Eq. 8 for every value. Returns y and, for each set, (mean, var, kept)."""
    y, moments = np.empty_like(x), []
    for members in sets_of(x.shape, num_groups):
        mean, var, f = forward_set(x, members, t_sigma, eps)
        for k in members:
            y[k] = gamma[k[1]] * (x[k] - mean) / math.sqrt(var + eps) + beta[k[1]]
        moments.append((mean, var, sum(f.values())))
    return y, moments


def backward(grad, x, gamma, t_sigma, eps, num_groups=0):
    """Eq. 9-13 as printed, with gamma inside the sums (it differs within a group). Returns dx, dgamma, dbeta."""
    dx, dgamma, dbeta = np.zeros_like(x), np.zeros_like(gamma), np.zeros_like(gamma)
    for members in sets_of(x.shape, num_groups):
        mean, var, f = forward_set(x, members, t_sigma, eps)
        kept = sum(f.values())
        root = math.sqrt(var + eps)
        dvar = 0.0  # Eq. 9
        for k in members:
            dvar += f[k] * grad[k] * gamma[k[1]] * (x[k] - mean) * -0.5 * (var + eps) ** -1.5
        dmean, inner = 0.0, 0.0  # Eq. 10
        for k in members:
            dmean += f[k] * grad[k] * gamma[k[1]] * -1 / root
            inner += -2 * f[k] * (x[k] - mean)
        dmean += dvar * inner / kept
        for k in members:
            dx[k] = grad[k] * gamma[k[1]] / root + dvar * 2 * f[k] * (x[k] - mean) / kept + dmean / kept  # Eq. 11
            dbeta[k[1]] += f[k] * grad[k]  # Eq. 12
            dgamma[k[1]] += f[k] * grad[k] * (x[k] - mean) / root  # Eq. 13
    return dx, dgamma, dbeta
