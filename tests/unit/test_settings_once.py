"""Every setting has one declaration: no function, class or command declares a second default."""

from pathlib import Path

from pydantic import BaseModel

from ray_ctrl.config import Config

ROOT = Path(__file__).parents[2]
PACKAGES = ("envs", "policies", "ray_ctrl", "cluster")


def sections():
    """Name of every section of the configuration and its class."""
    return {name: field.annotation for name, field in Config.model_fields.items() if is_section(field.annotation)}


def is_section(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


if __name__ == "__main__":
    print(sections())
