"""Clocks: what a request costs on a device, in milliseconds."""
