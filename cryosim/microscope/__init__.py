"""What stands around the specimen: electron wave, lens, detector. It sees nothing but slices of potential."""
