"""Triton kernels. Importing a module of this package needs Triton; nothing outside imports one before it is needed."""
