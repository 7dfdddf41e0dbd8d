# %% [markdown]
# # A crowded cell, and a thousand of them
#
# To train a network, or to test an algorithm on something harder than one protein in clean ice, one wants what a cell
# has: membranes, filaments, and so many molecules that they touch. And one wants to know where each of them is. Here we
# build such a scene, look at it through the microscope, and then let a file describe as many as we like.

# %%
import matplotlib.pyplot as plt
import torch

import cryosim as cs
from cryosim import io
from cryosim.dataset import make_dataset
from cryosim.description import describe
from cryosim.io.examples import example_path

generator = torch.Generator().manual_seed(7)
BOX, ICE = (1100.0, 1100.0, 400.0), cs.Ice(460.0)  # (x, y, z) [Å]

# %% [markdown]
# **A vesicle** is a sphere with the undulations that the heat gives a bilayer (Helfrich's spectrum, by spherical
# harmonics). `membrane` covers it with lipids: sites that carry the atoms of a real lipid across its profile. Proteins
# stand upright in it, and the lipids make room for them.

# %%
surface = cs.irregular_vesicle(150.0, amplitude=0.06, generator=generator)
ubiquitin = io.read_atoms(example_path("ubiquitin")).centred()
in_membrane = cs.embed(surface, ubiquitin, 8, height=20.0, generator=generator)
lipids = cs.cleared(cs.membrane(surface, generator=generator), ubiquitin, in_membrane)
place = torch.tensor([-230.0, 120.0, 0.0], dtype=torch.float64)
vesicle = cs.Poses(torch.eye(3, dtype=torch.float64)[None], place[None])

# %% [markdown]
# **A filament** is one molecule on a helix, bent like a worm-like chain. All subunits carry one instance number.

# %%
subunit = ubiquitin.moved(shift=torch.tensor([22.0, 0.0, 0.0], dtype=torch.float64))
strand = cs.filament(
    cs.helix(cs.Helix(27.6, -166.6), length=900.0),
    persistence=4000.0,
    direction=(1.0, -0.35, 0.02),
    position=(80.0, -260.0, 0.0),
    generator=generator,
)
inside = (strand.positions.abs() < torch.tensor(BOX, dtype=torch.float64) / 2 - 45).all(1)
standing = cs.Specimen(
    (lipids, ubiquitin, subunit),
    (vesicle, in_membrane.replace(positions=in_membrane.positions + place), strand.index(inside)),
    BOX,
    ICE,
    names=("membrane", "receptor", "filament"),
    kinds=("membrane", "protein", "filament"),
)

# %% [markdown]
# **A crowd** fills what room is left, by the shapes of the molecules and not by spheres around them, so that neighbours
# touch. Every third apoferritin sticks to the air-water interface.

# %%
species = [
    cs.Species(
        io.read_atoms(example_path("apoferritin"), assembly=1),
        "apoferritin",
        interface=cs.Interface(fraction=1 / 3, depth=60.0),
    ),
    cs.Species(ubiquitin, "ubiquitin", abundance=4.0),
    cs.Species(cs.gold_bead(50.0, generator=generator), "gold bead", "gold", copies=2),
]
crowd = cs.crowd(species, BOX, occupancy=0.06, obstacles=standing, voxel_size=4.0, generator=generator)
specimen = crowd.specimen.replace(absorption=cs.Absorption(), damage=cs.Damage())
print(f"molecules fill {crowd.occupancy:.1%} of the box:")
for name, poses in zip(specimen.names, specimen.poses, strict=True):
    print(f"{len(poses.positions):6d} {name}")
assert abs(crowd.occupancy - 0.06) < 0.006

# %% [markdown]
# **The truth** is known: of every voxel what it is, and which one. The scene can be saved whole and opened again.

# %%
VOXEL = 10.0  # [Å]
labels = cs.label_volumes(specimen, (46, 110, 110), VOXEL)
potential = cs.potential_volume(specimen, (46, 110, 110), VOXEL)
print(f"{len(labels.table)} things; the first: {labels.table[0]}")
io.write_specimen("cell.npz", specimen)
assert torch.equal(io.read_specimen("cell.npz").poses[3].positions, specimen.poses[3].positions)

# %% [markdown]
# **Through the microscope.** Pixels of 10 Å are coarse beside atoms, so copies may be placed by a reference (1e-3 off,
# several times faster; `cryosim.specimen.references` says how). Gold absorbs and scatters as gold does.

# %%
tilts = cs.TiltScheme([0.0], [60.0])  # far more electrons than a tilt would get, to see something
optics = cs.Optics(300.0, 60000.0, spherical_aberration=2.7)
detector = cs.Detector((110, 110), VOXEL)
sampling = cs.sampling_for(detector, optics, thickness=20.0, width=6, copies="reference")
series = cs.simulate(specimen, tilts, optics, detector, sampling=sampling, generator=generator)

figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
axes[0].imshow(potential.values[18:28].mean(0), cmap="gray_r", origin="lower")
axes[0].set_title("potential, 100 Å of it")
shown = labels.semantic[23].float()
axes[1].imshow(shown.where(shown > 0, torch.nan), cmap="tab10", vmin=1, vmax=10, interpolation="none", origin="lower")
axes[1].set_title("what is what")
axes[2].imshow(series.images[0], cmap="gray", origin="lower")
axes[2].set_title("image, 60 e⁻/Å²")
for axis in axes:
    axis.set_axis_off()
figure.savefig("crowded_cell.png", dpi=110)

# %% [markdown]
# **A thousand of them.** A file describes a run; where a value could be anything of a kind, it names a distribution.
# `cryosim config new --dataset > run.yaml` writes one to begin with, and
#
#     cryosim dataset run.yaml -n 1000 --out DIR
#
# makes them, each in a folder of its own that is whole or is not there. Stop it, and go on with `--resume`; spread it
# over a cluster with `--shard I/N` or `--scheduler ADDRESS`: the bytes are the same. In Python, with two small items:

# %%
description = describe(
    {
        "seed": 5,
        "specimen": {
            "molecules": [{"structure": "ubiquitin", "copies": {"integers": [3, 9]}}],
            "size": [300, 300, 100],
            "ice": {"thickness": {"normal": [150, 15], "between": [120, 200]}},
        },
        "tilts": {"extent": 40, "step": 20, "angle_error": 0.2},
        "optics": {"defocus": {"uniform": [20000, 40000]}},
        "detector": {"shape": [32, 32], "pixel_size": 10},
        "output": {"files": ["labels", "alignments"]},
    }
)
summary = make_dataset(description, "dataset", 2, workers=1)
print(summary)
items = cs.TiltSeriesDataset("dataset")
for volume, images, *_ in items:
    print("truth", tuple(volume.shape), "images", tuple(images.shape), f"mean count {float(images.mean()):.0f}")
assert len(items) == 2
