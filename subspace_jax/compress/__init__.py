"""Compression of trained networks after training: linear layers in fewer numbers, with calibration data."""
