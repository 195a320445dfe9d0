"""The commands of `ray-ctrl`, one module each."""
