"""Ground floor: constants, records, the Fourier convention, rotations, volumes."""
