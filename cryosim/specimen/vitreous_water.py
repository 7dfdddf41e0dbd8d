"""Makes the tables of vitreous water, by molecular dynamics: `python -m cryosim.specimen.vitreous_water`.

The model is the monatomic water mW (Molinero & Moore 2009, doi:10.1021/jp805227c): one particle a molecule, which
stands for its oxygen, with the potential of Stillinger & Weber 1985, doi:10.1103/PhysRevB.31.5262. With r in units of
sigma,

    E = sum_{i<j} A eps (B r_ij^-p - 1) exp(1 / (r_ij - a))                                  r < a
      + sum_i sum_{j<k} lambda eps (cos theta_jik - cos theta_0)^2 h(r_ij) h(r_ik),    h(r) = exp(gamma / (r - a))

The sum over pairs of neighbours j, k needs no triple loop: with the unit vectors u_j from i to j and the moments
s = sum_j h_j, v = sum_j h_j u_j, T = sum_j h_j u_j u_j^T,

    sum_{j<k} h_j h_k (u_j.u_k - c)^2 = (T:T - 2 c v.v + c^2 s^2 - (1 - c)^2 sum_j h_j^2) / 2

A box of liquid at the density of vitreous water is cooled at constant volume within a hundred picoseconds, slowly only
where it is about to become a glass, by Langevin dynamics in the splitting BAOAB (Leimkuhler & Matthews 2013,
doi:10.1093/amrx/abs010). It has no time to crystallize. The structure factor is the mean of a few such boxes; the first
is kept.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import KDTree

DENSITY = 0.93  # [g/cm^3]
MOLECULES_ALONG_EDGE = 20
BOXES = 2
SEED = 1

MOLAR_MASS = 18.015  # [g/mol]
AVOGADRO = 6.02214076e23
KCAL_PER_MOL = 4184 / (AVOGADRO * 1.602176634e-19)  # [eV]
BOLTZMANN = 8.617333262e-5  # [eV/K]
MASS = MOLAR_MASS * 1.66053906660e-27 / 1.602176634e-19 * 1e4  # [eV ps^2 / Å^2]

EPSILON = 6.189 * KCAL_PER_MOL  # [eV]
SIGMA = 2.3925  # [Å]
REACH, LAMBDA, A, B, P, GAMMA, COS_0 = 1.8, 23.15, 7.049556277, 0.6022245584, 4, 1.2, -1 / 3
CUTOFF = REACH * SIGMA  # [Å]

STEP = 0.01  # [ps]
FRICTION = 2.0  # [1/ps]
SKIN = 0.7  # [Å] beyond the cutoff to which neighbours are listed
SCHEDULE = ((0, 330), (8, 330), (16, 240), (90, 185), (100, 80), (104, 80))  # ([ps], [K]), joined by straight lines

K_MAX, K_STEP = 2.02, 0.005  # [1/Å]
SMOOTHING = 0.012  # [1/Å]

TABLES = Path(__file__).parent / "tables"


def neighbours(positions: torch.Tensor, edge: float) -> torch.Tensor:
    """Indices (molecule, most) of the molecules within the cutoff and the skin; rows are filled up with their own."""
    tree = KDTree(positions.double().numpy() % edge, boxsize=edge)
    pairs = torch.from_numpy(tree.query_pairs(CUTOFF + SKIN, output_type="ndarray").astype(np.int64))
    source, target = torch.cat([pairs, pairs.flip(1)]).T
    order = torch.argsort(source, stable=True)
    source, target = source[order], target[order]
    counts = torch.bincount(source, minlength=len(positions))
    column = torch.arange(len(source)) - (counts.cumsum(0) - counts)[source]
    table = torch.arange(len(positions))[:, None].repeat(1, int(counts.max()))
    table[source, column] = target
    return table


def energy_and_forces(
    positions: torch.Tensor, neighbour: torch.Tensor, edge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy [eV] and forces (molecule, 3) [eV/Å].

    Parameters
    ----------
    positions : tensor (molecule, 3)
        [Å].
    neighbour : tensor (molecule, most)
        From `neighbours`.
    edge : float
        Of the periodic box [Å].
    """
    there = positions[neighbour] - positions[:, None]  # (molecule, most, 3) [Å]
    there = (there - edge * torch.round(there / edge)) / SIGMA
    r = there.norm(dim=2)
    near = (r < REACH - 1e-3) & (r > 0)  # exp(1 / (r - a)) is 0 beyond
    r = torch.where(near, r, 1.0)
    unit = there / r[..., None]
    gap = 1 / (torch.where(near, r, 0.0) - REACH)
    tail = torch.exp(gap) * near
    core = B * r**-P
    pair = A * (core - 1) * tail
    pair_slope = -A * P * core / r * tail - pair * gap**2
    h = torch.exp(GAMMA * gap) * near
    h_slope = -GAMMA * gap**2 * h
    hu = h[..., None] * unit
    s, v, t = h.sum(1, keepdim=True), hu.sum(1, keepdim=True), hu.mT @ unit
    tu = unit @ t  # (molecule, most, 3)
    vu = (unit * v).sum(2)
    utu = (unit * tu).sum(2)
    own = (1 - COS_0) ** 2
    triple = (t**2).sum() - 2 * COS_0 * (v**2).sum() + COS_0**2 * (s**2).sum() - own * (h**2).sum()
    energy = EPSILON * (pair.sum() / 2 + LAMBDA * triple / 2)
    by_h = LAMBDA * (utu - 2 * COS_0 * vu + COS_0**2 * s - own * h)
    across = 2 * LAMBDA * (h / r)[..., None] * (tu - utu[..., None] * unit - COS_0 * (v - vu[..., None] * unit))
    along = pair_slope / 2 + by_h * h_slope
    pull = EPSILON / SIGMA * (along[..., None] * unit + across)  # dE / d(there)
    forces = pull.sum(1).index_add(0, neighbour.flatten(), -pull.flatten(0, 1))
    return energy, forces


def quenched_box(generator: torch.Generator, per_edge: int = MOLECULES_ALONG_EDGE) -> tuple[torch.Tensor, float]:
    """Positions (molecule, 3) [Å] of vitreous water in a periodic cube, and its edge [Å]."""
    volume = MOLAR_MASS / (DENSITY * AVOGADRO) * 1e24  # of a molecule [Å^3]
    edge = per_edge * volume ** (1 / 3)
    axis = torch.arange(per_edge, dtype=torch.float32) + 0.5
    x = torch.cartesian_prod(axis, axis, axis) * edge / per_edge
    velocities = torch.randn(x.shape, generator=generator, dtype=x.dtype) * math.sqrt(BOLTZMANN * SCHEDULE[0][1] / MASS)
    listed, table = x.clone(), neighbours(x, edge)
    _, forces = energy_and_forces(x, table, edge)
    keep = math.exp(-FRICTION * STEP)
    times, temperatures = zip(*SCHEDULE, strict=True)
    for step in range(round(times[-1] / STEP)):
        temperature = float(np.interp(step * STEP, times, temperatures))
        velocities = velocities + 0.5 * STEP * forces / MASS
        x = x + 0.5 * STEP * velocities
        kick = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        velocities = keep * velocities + math.sqrt((1 - keep**2) * BOLTZMANN * temperature / MASS) * kick
        x = x + 0.5 * STEP * velocities
        if (x - listed).square().sum(1).max() > (SKIN / 2) ** 2:
            listed, table = x.clone(), neighbours(x, edge)
        energy, forces = energy_and_forces(x, table, edge)
        velocities = velocities + 0.5 * STEP * forces / MASS
        if step % 500 == 0:
            kinetic = MASS * velocities.square().mean() / BOLTZMANN
            per_molecule = energy / len(x) / KCAL_PER_MOL
            print(f"{step * STEP:6.1f} ps  {float(kinetic):6.1f} K  {float(per_molecule):8.3f} kcal/mol", flush=True)
    return x % edge, edge


def shells(positions: torch.Tensor, edge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Structure factor |sum_a exp(-2 pi i k.r_a)|^2 / N of a periodic cube, averaged in shells of k.

    Returns
    -------
    counts, frequencies, values : tensors (shell,)
        Number of wave vectors, their mean length [1/Å], and the mean of S [1].
    """
    n = int(K_MAX * edge) + 1
    index = torch.arange(-n, n + 1)
    phases = -2 * torch.pi * index[:, None, None] * (positions.T / edge).double()  # (index, axis, molecule)
    waves = torch.polar(torch.ones_like(phases), phases).to(torch.complex64)
    x, y, z = waves.unbind(1)
    bins = round(K_MAX / K_STEP)
    sums = torch.zeros(3, bins, dtype=torch.float64)
    for i in range(n, 2 * n + 1):  # S(-k) = S(k), so half of the wave vectors do
        power = ((x[i] * y) @ z.T).abs().square().double() / len(positions)  # (index y, index z)
        k = (index[i] ** 2 + index[:, None] ** 2 + index**2).double().sqrt() / edge
        inside = (k < K_MAX) & (k > 0)
        shell = (k[inside] / K_STEP).long()
        for total, value in zip(sums, (torch.ones_like(k), k, power), strict=True):
            total.index_add_(0, shell, value[inside])
    counts, k, s = sums
    return counts, k / counts.clamp_min(1), s / counts.clamp_min(1)


def smooth(counts: torch.Tensor, k: torch.Tensor, s: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """S at the frequencies `at`: the value there of a parabola fitted to the nearby shells, S being even in k.

    Neighbourhoods are Gaussian, narrower than the resolution 1 / edge of the box but near k = 0, where shells hold few
    wave vectors and S is flat.
    """
    width = SMOOTHING * (1 + 2 * torch.exp(-((at / 0.05) ** 2)))
    k, s, counts = torch.cat([-k, k]), torch.cat([s, s]), torch.cat([counts, counts])
    away = (k - at[:, None]) / width[:, None]  # (at, shell)
    weights = counts * torch.exp(-0.5 * away**2)
    powers = torch.stack([torch.ones_like(away), away, away**2], 2)
    normal = torch.einsum("as,asi,asj->aij", weights, powers, powers)
    return torch.linalg.solve(normal, torch.einsum("as,asi,s->ai", weights, powers, s))[:, 0]


def main() -> None:
    """Make the boxes and write the two tables."""
    generator = torch.Generator().manual_seed(SEED)
    totals = torch.zeros(3, round(K_MAX / K_STEP), dtype=torch.float64)
    fractions = []
    for box in range(BOXES):
        print(f"box {box + 1} of {BOXES}", flush=True)
        positions, edge = quenched_box(generator)
        counts, k, s = shells(positions, edge)
        totals += torch.stack([counts, counts * k, counts * s])
        fractions.append((positions.double() / edge % 1).float().numpy() % 1)
    some = totals[0] > 0
    counts = totals[0, some]
    at = torch.arange(round(2.0 / K_STEP) + 1, dtype=torch.float64) * K_STEP
    values = smooth(counts, totals[1, some] / counts, totals[2, some] / counts, at)
    np.save(TABLES / "vitreous_water.npy", fractions[0].astype(np.float32), allow_pickle=False)
    with (TABLES / "vitreous_water_structure.csv").open("w", encoding="utf-8") as file:
        file.write(
            "# Structure factor of the oxygens of vitreous water, k in cycles/Å: molecular dynamics of the mW model "
            f"(Molinero & Moore 2009, doi:10.1021/jp805227c) at {DENSITY} g/cm^3 and {SCHEDULE[-1][1]} K by "
            "cryosim.specimen.vitreous_water\nk,s\n"
        )
        file.writelines(f"{a:.3f},{b:.4f}\n" for a, b in zip(at.tolist(), values.tolist(), strict=True))


if __name__ == "__main__":
    main()
