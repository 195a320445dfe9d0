"""The recipe of the embedded model (`envs/embedded`): training from scenes to weights, and the figures of its card."""
