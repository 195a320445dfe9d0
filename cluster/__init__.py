"""Connecting to Ray, planning its resources, submitting jobs. Imports Ray and envs.errors only."""
