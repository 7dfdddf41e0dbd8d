"""Estimates of the microscope and of the geometry, with standard errors."""
